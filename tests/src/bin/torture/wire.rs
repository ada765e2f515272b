//! A wire to the server that can be cut, stalled and delayed: a TCP proxy, one for each process.

use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Connections go on through a process's death, but not through this one's drop.
#[derive(Debug)]
pub(crate) struct Wire {
    port: u16,
    weather: watch::Sender<Weather>,
    listening: JoinHandle<()>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Weather {
    /// Raised by every cut.
    cuts: u64,
    stalled: bool,
    delay: Duration,
}

impl Wire {
    pub(crate) async fn open(server_port: u16) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .context("cannot listen on 127.0.0.1")?;
        let port = listener.local_addr()?.port();
        let (weather, watching) = watch::channel(Weather::default());
        let listening = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((client, _)) => {
                        tokio::spawn(carry(client, server_port, watching.clone()));
                    }
                    // Out of descriptors, say: the process will try again.
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        });
        Ok(Self {
            port,
            weather,
            listening,
        })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Closes all connections.
    pub(crate) fn cut(&self) {
        self.weather.send_modify(|weather| weather.cuts += 1);
    }

    /// Whether anything gets through.
    pub(crate) fn stall(&self, stalled: bool) {
        self.weather.send_modify(|weather| weather.stalled = stalled);
    }

    /// How long everything takes, each way.
    pub(crate) fn delay(&self, delay: Duration) {
        self.weather.send_modify(|weather| weather.delay = delay);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.listening.abort();
        self.cut();
    }
}

/// Both ends are closed as soon as one is, even when it stalls. A consumer whose connection is gone at the server and seems well on its
/// own side is a frozen one in other words: only its lease could tell.
async fn carry(client: TcpStream, server_port: u16, weather: watch::Receiver<Weather>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", server_port)).await else {
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let cuts = weather.borrow().cuts;
    let mut watching = weather.clone();
    let cut = watching.wait_for(|weather| weather.cuts != cuts);
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::select! {
        _ = cut => {}
        () = pump(from_client, to_server, weather.clone()) => {}
        () = pump(from_server, to_client, weather.clone()) => {}
    }
}

/// Reads on while nothing gets through, so that an end that closes is noticed.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut weather: watch::Receiver<Weather>) {
    let mut waiting = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    let mut due = Instant::now();
    loop {
        let now = *weather.borrow_and_update();
        tokio::select! {
            read = from.read(&mut buffer) => match read {
                Ok(0) | Err(_) => {
                    if !now.stalled {
                        let _ = to.write_all(&waiting).await;
                    }
                    return;
                }
                Ok(count) => {
                    if waiting.is_empty() {
                        due = Instant::now() + now.delay;
                    }
                    waiting.extend_from_slice(&buffer[..count]);
                }
            },
            () = tokio::time::sleep_until(due), if !now.stalled && !waiting.is_empty() => {
                if to.write_all(&waiting).await.is_err() {
                    return;
                }
                waiting.clear();
            }
            changed = weather.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that echoes, and a connection to it through a wire.
    async fn echo() -> (Wire, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut buffer = [0; 64];
            while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                stream.write_all(&buffer[..count]).await.expect("an echo");
            }
        });
        let wire = Wire::open(port).await.expect("a wire");
        let stream = TcpStream::connect(("127.0.0.1", wire.port()))
            .await
            .expect("a connection");
        (wire, stream)
    }

    async fn reply(stream: &mut TcpStream, within: Duration) -> Option<u8> {
        let read = tokio::time::timeout(within, stream.read_u8()).await;
        read.ok().map(|byte| byte.expect("a byte"))
    }

    #[tokio::test]
    async fn what_is_sent_arrives_unless_the_wire_is_stalled_and_then_afterwards() {
        let (wire, mut stream) = echo().await;
        stream.write_u8(1).await.expect("sent");
        assert_eq!(reply(&mut stream, Duration::from_secs(5)).await, Some(1));
        wire.stall(true);
        stream.write_u8(2).await.expect("sent");
        assert_eq!(reply(&mut stream, Duration::from_millis(100)).await, None);
        wire.stall(false);
        assert_eq!(reply(&mut stream, Duration::from_secs(5)).await, Some(2));
    }

    #[tokio::test]
    async fn a_delay_is_kept_each_way() {
        let (wire, mut stream) = echo().await;
        wire.delay(Duration::from_millis(60));
        let since = Instant::now();
        stream.write_u8(1).await.expect("sent");
        assert_eq!(reply(&mut stream, Duration::from_secs(5)).await, Some(1));
        assert!(since.elapsed() >= Duration::from_millis(120));
    }

    #[tokio::test]
    async fn a_cut_ends_the_connection() {
        let (wire, mut stream) = echo().await;
        stream.write_u8(1).await.expect("sent");
        assert_eq!(reply(&mut stream, Duration::from_secs(5)).await, Some(1));
        wire.cut();
        let mut rest = Vec::new();
        // Closed, or reset.
        let end = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest));
        assert!(matches!(end.await, Ok(Ok(0) | Err(_))));
    }
}
