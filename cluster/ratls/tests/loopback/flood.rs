//! Connection floods: bounded connections and memory, peers and administration still served.
//!
//! The floods come from processes of their own: this executable, started again with one ignored test.

use std::collections::{HashSet, VecDeque};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use dstack_ratls::plain::{PlainLimits, PlainServer};
use dstack_ratls::{ALPN_NODE, Limits};
use dstack_runtime::hardening::raise_descriptor_limit;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use crate::raw;
use crate::world::*;

const ORDER: &str = "DSTACK_TEST_FLOOD";

/// What one flooding process does.
#[derive(Clone, Copy)]
struct Order {
    target: SocketAddr,
    attempts: usize,
    /// Held open at once.
    held: usize,
    /// Third byte of the source addresses 127.0.x.1 to 127.0.x.8; 0: 127.0.0.1 alone. Several, or ports run out.
    network: u8,
    /// Send a whole ClientHello for the node protocol, and then nothing.
    hello: bool,
}

impl Order {
    fn to_text(self) -> String {
        format!("{} {} {} {} {}", self.target, self.attempts, self.held, self.network, self.hello)
    }

    fn from_text(text: &str) -> Self {
        let part = |at: usize| text.split(' ').nth(at).unwrap();
        let number = |at: usize| part(at).parse().unwrap();
        Self { target: part(0).parse().unwrap(), attempts: number(1), held: number(2), network: number(3) as u8, hello: part(4) == "true" }
    }

    fn start(self) -> Child {
        in_child("flood::flooder").env(ORDER, self.to_text()).spawn().unwrap()
    }
}

fn in_child(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", test, "--nocapture"]);
    command
}

#[test]
#[ignore = "a flood for the tests below, in a process of its own"]
#[expect(clippy::disallowed_methods, reason = "how this process gets its order")]
fn flooder() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let Order { target, attempts, held: held_max, network, hello } = Order::from_text(&order);
    raise_descriptor_limit();
    let hello = if hello { raw::client_hello(ALPN_NODE) } else { Vec::new() };
    let mut held = VecDeque::new();
    let mut connected = 0usize;
    for attempt in 0..attempts {
        let source = if network == 0 { Ipv4Addr::LOCALHOST } else { Ipv4Addr::new(127, 0, network, 1 + (attempt % 8) as u8) };
        if let Ok(mut stream) = connect_from(source, target) {
            connected += 1;
            match attempt % 4 {
                _ if !hello.is_empty() => drop(stream.write_all(&hello)),
                // A record header and silence, something that is not TLS, or nothing at all.
                0 => drop(stream.write_all(&[22, 3, 1, 2, 0])),
                1 => drop(stream.write_all(b"GET / HTTP/1.1\r\n")),
                _ => {}
            }
            held.push_back(stream);
        }
        if held.len() > held_max {
            held.pop_front();
        }
    }
    assert!(connected > attempts / 2, "{connected}");
}

fn connect_from(source: Ipv4Addr, target: SocketAddr) -> std::io::Result<std::net::TcpStream> {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    bind(&socket, &SocketAddr::from((source, 0)))?;
    connect(&socket, &target)?;
    Ok(std::net::TcpStream::from(socket))
}

/// Resident memory of this process, bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// What a flood did to those who must be served.
#[derive(Debug, Default)]
struct Seen {
    connections_max: usize,
    memory_grown: usize,
    newcomers: u32,
    retries: u32,
}

/// Runs the flood against a server. All the while one kept node connection, new node connections from 127.0.0.1, which
/// is a known peer's address, and the admin listener are asked and must answer. A newcomer may try again.
async fn endure(limits: Limits, flood: impl FnOnce(SocketAddr) -> Vec<Order>) -> Seen {
    raise_descriptor_limit();
    let world = World::new();
    let descriptors_max = limits.descriptors_max();
    let server = world.server(2, limits).await;
    server.handle.set_known_peers(HashSet::from([IpAddr::V4(Ipv4Addr::LOCALHOST)]));
    let admin = PlainServer::bind("127.0.0.1:0".parse().unwrap(), PlainLimits::default()).await.unwrap();
    let admin_address = admin.local_address().unwrap();
    let shutdown = CancellationToken::new();
    let admin_task = tokio::spawn(admin.run(Router::new().route("/healthz", get(async || "ok")), shutdown.clone()));
    let kept = world.dialer(1).peer(server.address, Default::default());
    text(kept.post("/echo", "x", 5 * SECOND).await.unwrap());

    let (memory_before, mut seen) = (resident(), Seen::default());
    let mut flooders: Vec<Child> = flood(server.address).into_iter().map(Order::start).collect();
    while flooders.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
        text(kept.post("/echo", "x", 5 * SECOND).await.unwrap());
        let connecting = Instant::now();
        let newcomer = world.dialer(3).peer(server.address, Default::default());
        while let Err(error) = newcomer.post("/echo", "x", 5 * SECOND).await {
            assert!(connecting.elapsed() < 20 * SECOND, "a known peer cannot connect: {error}");
            seen.retries += 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        seen.newcomers += 1;
        let mut stream = tokio::net::TcpStream::connect(admin_address).await.unwrap();
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        tokio::time::timeout(5 * SECOND, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(answer.ends_with("ok"), "{answer}");
        seen.connections_max = seen.connections_max.max(server.handle.connections());
        seen.memory_grown = seen.memory_grown.max(resident().saturating_sub(memory_before));
    }
    for mut child in flooders {
        assert!(child.wait().unwrap().success());
    }
    assert!(seen.newcomers > 3, "{seen:?}");
    assert!(seen.connections_max <= descriptors_max, "{seen:?}");
    assert!(seen.memory_grown < 192 << 20, "{seen:?}");
    tokio::time::timeout(20 * SECOND, async {
        while server.handle.connections() > 8 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("the flood's connections were not forgotten");
    shutdown.cancel();
    admin_task.await.unwrap();
    server.stop().await;
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_attempts_leave_peers_and_administration_served() {
    let limits = Limits { greeting_timeout: 2 * SECOND, ..Limits::default() };
    // 4 × 25,000 attempts = 10⁵, 4 × 5,000 = 20,000 held at once.
    let seen =
        endure(limits, |target| (10..14).map(|network| Order { target, attempts: 25_000, held: 5_000, network, hello: false }).collect())
            .await;
    assert!(seen.connections_max > 500, "the flood did not reach the server: {seen:?}");
    assert_eq!(seen.retries, 0, "strangers took nothing from a known peer: {seen:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_from_a_peers_own_address_does_not_shut_it_out() {
    endure(Limits::default(), |target| (0..2).map(|_| Order { target, attempts: 6_000, held: 3_000, network: 0, hello: false }).collect())
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_half_handshakes_is_counted_out() {
    let limits = Limits { handshake_timeout: 2 * SECOND, ..Limits::default() };
    endure(limits, |target| (20..22).map(|network| Order { target, attempts: 6_000, held: 3_000, network, hello: true }).collect()).await;
}

#[test]
fn a_process_out_of_descriptors_recovers() {
    let output = in_child("flood::out_of_descriptors").env(ORDER, "here").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by a_process_out_of_descriptors_recovers in a process of its own, whose limit it lowers"]
#[expect(clippy::disallowed_methods, reason = "how this process knows that it is the child")]
async fn out_of_descriptors() {
    if std::env::var(ORDER).is_err() {
        return;
    }
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let peer = world.dialer(1).peer(server.address, Default::default());
    text(peer.post("/echo", "x", 5 * SECOND).await.unwrap());
    let maximum = getrlimit(Resource::Nofile).maximum;
    // Our own ends count as well: of 100 descriptors a few dozen connections find no second one.
    setrlimit(Resource::Nofile, Rlimit { current: Some(100), maximum }).unwrap();
    let mut held = Vec::new();
    while let Ok(stream) = std::net::TcpStream::connect(server.address) {
        held.push(stream);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(held.len() > 20);
    text(peer.post("/echo", "x", 5 * SECOND).await.unwrap());
    drop(held);
    let newcomer = world.dialer(3).peer(server.address, Default::default());
    tokio::time::timeout(10 * SECOND, async {
        while newcomer.post("/echo", "x", 2 * SECOND).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
    server.stop().await;
}
