//! A network that can lose everything without a word: what is sent through it then is taken, and never comes out.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A proxy on the way to a database.
pub struct Proxy {
    port: u16,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// How many connections there were.
    connections: AtomicU64,
    /// Those before this one lose what is sent to the server, and what it answers.
    lost_up: AtomicU64,
    lost_down: AtomicU64,
    /// All that is sent comes so many milliseconds later.
    delay: AtomicU64,
    /// New ones lose all, too.
    is_dark: AtomicBool,
}

/// Which way is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    ToServer,
    ToClient,
    Both,
}

impl Proxy {
    pub async fn to(options: &PgConnectOptions) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(State::default());
        let (host, to) = (options.get_host().to_owned(), options.get_port());
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = shared.connections.fetch_add(1, Ordering::SeqCst);
                let Ok(server) = TcpStream::connect((host.as_str(), to)).await else {
                    continue;
                };
                let (client_in, client_out) = client.into_split();
                let (server_in, server_out) = server.into_split();
                tokio::spawn(carry(client_in, server_out, shared.clone(), number, true));
                tokio::spawn(carry(server_in, client_out, shared.clone(), number, false));
            }
        });
        Self { port, state }
    }

    /// The same database, through here.
    pub fn options(&self, options: &PgConnectOptions) -> PgConnectOptions {
        options.clone().host("127.0.0.1").port(self.port)
    }

    /// All that is sent comes later by this.
    pub fn slow(&self, by: Duration) {
        self.state.delay.store(by.as_millis() as u64, Ordering::SeqCst);
    }

    /// All connections that there are lose everything from now on, for good. New ones are well.
    pub fn lose(&self, way: Way) {
        let now = self.state.connections.load(Ordering::SeqCst);
        if way != Way::ToClient {
            self.state.lost_up.store(now, Ordering::SeqCst);
        }
        if way != Way::ToServer {
            self.state.lost_down.store(now, Ordering::SeqCst);
        }
    }

    /// So do new ones, until there is light again.
    pub fn dark(&self, is_dark: bool) {
        self.lose(Way::Both);
        self.state.is_dark.store(is_dark, Ordering::SeqCst);
    }
}

/// A connection that lost something is not closed at the other end either.
async fn carry(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    state: Arc<State>,
    number: u64,
    up: bool,
) {
    let mut buffer = vec![0; 64 * 1024];
    let mut has_lost = false;
    loop {
        let read = from.read(&mut buffer).await.unwrap_or(0);
        let lost = match up {
            true => &state.lost_up,
            false => &state.lost_down,
        };
        let delay = Duration::from_millis(state.delay.load(Ordering::SeqCst));
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        has_lost |= number < lost.load(Ordering::SeqCst) || state.is_dark.load(Ordering::SeqCst);
        match (read, has_lost) {
            (0, true) => std::future::pending::<()>().await,
            (0, false) => return,
            (_, true) => {}
            (read, false) => {
                if to.write_all(&buffer[..read]).await.is_err() {
                    return;
                }
            }
        }
    }
}
