//! A TCP proxy before the server, one for each process: connections through it can be cut, stalled and delayed, and lose what is sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Where all proxies lead: to a port of this machine, or to nobody.
#[derive(Clone, Debug)]
pub(crate) struct Address(Arc<AtomicU16>);

impl Address {
    pub(crate) fn of(port: u16) -> Self {
        Self(Arc::new(AtomicU16::new(port)))
    }

    /// Whoever connects from now on comes out there.
    pub(crate) fn lead_to(&self, port: u16) {
        self.0.store(port, Ordering::SeqCst);
    }

    /// Whoever connects from now on is turned away.
    pub(crate) fn close(&self) {
        self.lead_to(0);
    }

    fn port(&self) -> Option<u16> {
        Some(self.0.load(Ordering::SeqCst)).filter(|port| *port != 0)
    }
}

/// Connections go on through a process's death, but not through this one's drop.
#[derive(Debug)]
pub(crate) struct Proxy {
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
    /// Raised whenever an end begins to be half open.
    half_opens: u64,
    half_open: Option<HalfOpen>,
}

/// What is sent is taken and does not come out, and neither does the end of a connection: whoever sends it cannot tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HalfOpen {
    pub(crate) way: Way,
    pub(crate) swallowed: Swallowed,
    /// Whether connections that are made meanwhile suffer the same.
    pub(crate) takes_new: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    ToServer,
    ToClient,
    Both,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Swallowed {
    /// For good: a connection that lost something stays dead, and open, when the network is well again.
    Lost,
    /// It comes out, all at once, when the network is well again.
    Held,
}

impl Weather {
    /// What becomes of what is sent this way, on a connection before which so many half-open ends had begun.
    fn swallows(&self, way: Way, before: u64) -> Option<Swallowed> {
        self.half_open
            .filter(|half| half.way == way || half.way == Way::Both)
            .filter(|half| half.takes_new || before < self.half_opens)
            .map(|half| half.swallowed)
    }
}

impl Proxy {
    pub(crate) async fn open(address: Address) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .context("cannot listen on 127.0.0.1")?;
        let port = listener.local_addr()?.port();
        let (weather, watching) = watch::channel(Weather::default());
        let listening = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((client, _)) => {
                        tokio::spawn(carry(client, address.clone(), watching.clone()));
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

    /// `None`: the network is well again. What it lost is not.
    pub(crate) fn half_open(&self, half_open: Option<HalfOpen>) {
        self.weather.send_modify(|weather| {
            weather.half_opens += u64::from(half_open.is_some());
            weather.half_open = half_open;
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.listening.abort();
        self.cut();
    }
}

/// Both ends are closed as soon as one is, even when it stalls; but for what is swallowed, the end of the connection is too.
async fn carry(client: TcpStream, address: Address, weather: watch::Receiver<Weather>) {
    let now = *weather.borrow();
    let Some(port) = address.port() else { return };
    let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else {
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let mut watching = weather.clone();
    let cut = watching.wait_for(|weather| weather.cuts != now.cuts);
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let before = now.half_opens;
    tokio::select! {
        _ = cut => {}
        () = pump(Way::ToServer, before, from_client, to_server, weather.clone()) => {}
        () = pump(Way::ToClient, before, from_server, to_client, weather.clone()) => {}
    }
}

/// Reads on while nothing gets through, so that an end that closes is noticed.
async fn pump(
    way: Way,
    before: u64,
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut weather: watch::Receiver<Weather>,
) {
    let mut waiting = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    let mut due = Instant::now();
    // Something was lost, so that nothing which comes after it would be understood.
    let mut is_dead = false;
    let mut has_ended = false;
    loop {
        let now = *weather.borrow_and_update();
        let swallowed = match is_dead {
            true => Some(Swallowed::Lost),
            false => now.swallows(way, before),
        };
        let is_held = now.stalled || swallowed.is_some();
        if has_ended && !is_held && waiting.is_empty() {
            return;
        }
        tokio::select! {
            read = from.read(&mut buffer), if !has_ended => match (read, swallowed) {
                (Ok(0) | Err(_), None) => {
                    if !now.stalled {
                        let _ = to.write_all(&waiting).await;
                    }
                    return;
                }
                (read, Some(Swallowed::Lost)) => {
                    is_dead = true;
                    has_ended = !matches!(read, Ok(1..));
                    waiting.clear();
                }
                (Ok(0) | Err(_), Some(Swallowed::Held)) => has_ended = true,
                (Ok(count), _) => {
                    if waiting.is_empty() {
                        due = Instant::now() + now.delay;
                    }
                    waiting.extend_from_slice(&buffer[..count]);
                }
            },
            () = tokio::time::sleep_until(due), if !is_held && !waiting.is_empty() => {
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

    /// A server that echoes, and a connection to it through a proxy.
    async fn echo() -> (Proxy, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut buffer = [0; 64];
            while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                stream.write_all(&buffer[..count]).await.expect("an echo");
            }
        });
        let proxy = Proxy::open(Address::of(port)).await.expect("a proxy");
        let stream = TcpStream::connect(("127.0.0.1", proxy.port()))
            .await
            .expect("a connection");
        (proxy, stream)
    }

    async fn reply(stream: &mut TcpStream, within: Duration) -> Option<u8> {
        let read = tokio::time::timeout(within, stream.read_u8()).await;
        read.ok().map(|byte| byte.expect("a byte"))
    }

    #[tokio::test]
    async fn what_is_sent_arrives_unless_the_proxy_is_stalled_and_then_afterwards() {
        let (proxy, mut stream) = echo().await;
        stream.write_u8(1).await.expect("sent");
        assert_eq!(reply(&mut stream, Duration::from_secs(5)).await, Some(1));
        proxy.stall(true);
        stream.write_u8(2).await.expect("sent");
        assert_eq!(reply(&mut stream, Duration::from_millis(100)).await, None);
        proxy.stall(false);
        assert_eq!(reply(&mut stream, Duration::from_secs(5)).await, Some(2));
    }

    #[tokio::test]
    async fn a_delay_is_kept_each_way() {
        let (proxy, mut stream) = echo().await;
        proxy.delay(Duration::from_millis(60));
        let since = Instant::now();
        stream.write_u8(1).await.expect("sent");
        assert_eq!(reply(&mut stream, Duration::from_secs(5)).await, Some(1));
        assert!(since.elapsed() >= Duration::from_millis(120));
    }

    #[tokio::test]
    async fn a_cut_ends_the_connection() {
        let (proxy, mut stream) = echo().await;
        stream.write_u8(1).await.expect("sent");
        assert_eq!(reply(&mut stream, Duration::from_secs(5)).await, Some(1));
        proxy.cut();
        let mut rest = Vec::new();
        // Closed, or reset.
        let end = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest));
        assert!(matches!(end.await, Ok(Ok(0) | Err(_))));
    }

    fn half_open(way: Way, swallowed: Swallowed, takes_new: bool) -> Option<HalfOpen> {
        Some(HalfOpen {
            way,
            swallowed,
            takes_new,
        })
    }

    #[tokio::test]
    async fn what_is_held_back_comes_out_when_the_network_is_well_again() {
        for way in [Way::ToServer, Way::ToClient, Way::Both] {
            let (proxy, mut stream) = echo().await;
            proxy.half_open(half_open(way, Swallowed::Held, true));
            stream.write_u8(1).await.expect("sent");
            assert_eq!(reply(&mut stream, Duration::from_millis(100)).await, None);
            proxy.half_open(None);
            assert_eq!(
                reply(&mut stream, Duration::from_secs(5)).await,
                Some(1),
                "{way:?}"
            );
            stream.write_u8(2).await.expect("sent");
            assert_eq!(
                reply(&mut stream, Duration::from_secs(5)).await,
                Some(2),
                "{way:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_connection_that_lost_something_stays_dead_and_open() {
        for way in [Way::ToServer, Way::ToClient, Way::Both] {
            let (proxy, mut stream) = echo().await;
            proxy.half_open(half_open(way, Swallowed::Lost, true));
            stream.write_u8(1).await.expect("sent");
            assert_eq!(reply(&mut stream, Duration::from_millis(100)).await, None);
            proxy.half_open(None);
            stream.write_u8(2).await.expect("sent");
            // A byte, or the end of the connection.
            let read = tokio::time::timeout(Duration::from_millis(100), stream.read_u8()).await;
            assert!(read.is_err(), "{way:?}: {read:?}");
        }
    }

    #[tokio::test]
    async fn what_did_not_lose_anything_goes_on_and_new_connections_may_be_spared() {
        let (proxy, mut stream) = echo().await;
        stream.write_u8(1).await.expect("sent");
        assert_eq!(reply(&mut stream, Duration::from_secs(5)).await, Some(1));
        proxy.half_open(half_open(Way::ToServer, Swallowed::Lost, true));
        proxy.half_open(None);
        stream.write_u8(2).await.expect("sent");
        assert_eq!(reply(&mut stream, Duration::from_secs(5)).await, Some(2));
        let weather = *proxy.weather.borrow();
        let spares = Weather {
            half_opens: 2,
            half_open: half_open(Way::Both, Swallowed::Lost, false),
            ..weather
        };
        assert_eq!(spares.swallows(Way::ToClient, 1), Some(Swallowed::Lost));
        assert_eq!(spares.swallows(Way::ToClient, 2), None);
    }

    #[tokio::test]
    async fn nobody_gets_through_to_an_address_that_is_closed() {
        let (proxy, _stream) = echo().await;
        drop(proxy);
        let address = Address::of(1);
        address.close();
        let proxy = Proxy::open(address).await.expect("a proxy");
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port()))
            .await
            .expect("a connection");
        let mut rest = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest));
        assert!(matches!(end.await, Ok(Ok(0) | Err(_))));
    }
}
