//! Connection floods: bounded connections and memory, peers and administration still served.
//!
//! The flood comes from processes of its own: this executable, started again with one ignored test.

use std::collections::HashSet;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use dstack_ratls::Limits;
use dstack_ratls::plain::{PlainLimits, PlainServer};
use dstack_runtime::hardening::raise_descriptor_limit;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use crate::world::*;

const TARGET: &str = "DSTACK_TEST_FLOOD_TARGET";
const PROCESSES: usize = 4;
/// From each process. 4 × 25,000 = 10⁵.
const ATTEMPTS: usize = 25_000;
/// Held open by each process, half of them with some bytes sent: 4 × 5,000 = 20,000.
const HELD: usize = 5_000;

#[test]
#[ignore = "a flood for the tests below, in a process of its own"]
fn flooder() {
    #[expect(clippy::disallowed_methods, reason = "how a test finds its parent")]
    let (target, number) = match std::env::var(TARGET) {
        Ok(value) => {
            value.split_once('#').map(|(target, number)| (target.parse::<SocketAddr>().unwrap(), number.parse::<u8>().unwrap())).unwrap()
        }
        Err(_) => return,
    };
    raise_descriptor_limit();
    let mut held = std::collections::VecDeque::new();
    let (mut connected, began) = (0usize, Instant::now());
    for attempt in 0..ATTEMPTS {
        // Several source addresses, or this machine runs out of ports: 127.0.x.1 with x of this process.
        let source = Ipv4Addr::new(127, 0, 10 + number, 1 + (attempt % 8) as u8);
        if let Ok(mut stream) = connect_from(source, target) {
            connected += 1;
            match attempt % 4 {
                // A record header and silence, plain garbage, or nothing at all.
                0 => drop(stream.write_all(&[22, 3, 1, 2, 0])),
                1 => drop(stream.write_all(b"GET / HTTP/1.1\r\n")),
                _ => {}
            }
            held.push_back(stream);
        }
        if held.len() > HELD {
            held.pop_front();
        }
    }
    println!("flooder {number}: {connected} of {ATTEMPTS} connected, {} held, {:?}", held.len(), began.elapsed());
    assert!(connected > ATTEMPTS / 2, "{connected}");
}

fn connect_from(source: Ipv4Addr, target: SocketAddr) -> std::io::Result<std::net::TcpStream> {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    bind(&socket, &SocketAddr::from((source, 0)))?;
    connect(&socket, &target)?;
    Ok(std::net::TcpStream::from(socket))
}

fn flood(target: SocketAddr) -> Vec<Child> {
    let me = std::env::current_exe().unwrap();
    (0..PROCESSES)
        .map(|number| {
            Command::new(&me)
                .args(["--ignored", "--exact", "flood::flooder", "--nocapture"])
                .env(TARGET, format!("{target}#{number}"))
                .spawn()
                .unwrap()
        })
        .collect()
}

/// Resident memory of this process, bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_attempts_leave_peers_and_administration_served() {
    raise_descriptor_limit();
    let world = World::new();
    let limits = Limits { greeting_timeout: 2 * SECOND, ..Limits::default() };
    let descriptors_max = limits.descriptors_max();
    let server = world.server(2, limits).await;
    server.handle.set_known_peers(HashSet::from([IpAddr::V4(Ipv4Addr::LOCALHOST)]));
    let admin = PlainServer::bind("127.0.0.1:0".parse().unwrap(), PlainLimits::default()).await.unwrap();
    let admin_address = admin.local_address().unwrap();
    let shutdown = CancellationToken::new();
    let admin_task = tokio::spawn(admin.run(Router::new().route("/healthz", get(async || "ok")), shutdown.clone()));

    // One connection that exists already, and new ones while the flood runs.
    let kept = world.dialer(1).peer(server.address, Default::default());
    text(kept.post("/echo", "x", SECOND).await.unwrap());
    let memory_before = resident();
    let began = Instant::now();
    let mut flooders = flood(server.address);
    let (mut most, mut memory_most, mut fresh, mut slowest) = (0, 0, 0u32, Duration::ZERO);
    while flooders.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
        assert!(began.elapsed() < 240 * SECOND, "the flood does not end");
        text(kept.post("/echo", "x", 5 * SECOND).await.unwrap());
        let connecting = Instant::now();
        let newcomer = world.dialer(3).peer(server.address, Default::default());
        text(newcomer.post("/echo", "x", 10 * SECOND).await.unwrap());
        slowest = slowest.max(connecting.elapsed());
        fresh += 1;
        let mut stream = tokio::net::TcpStream::connect(admin_address).await.unwrap();
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        tokio::time::timeout(5 * SECOND, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(answer.ends_with("ok"), "{answer}");
        most = most.max(server.handle.connections());
        memory_most = memory_most.max(resident());
    }
    for mut child in flooders {
        assert!(child.wait().unwrap().success());
    }
    let grown = memory_most.saturating_sub(memory_before);
    println!(
        "flood: {:?}, at most {most} connections, {} KiB more memory, {fresh} fresh peers, slowest {slowest:?}",
        began.elapsed(),
        grown / 1024
    );
    assert!(fresh > 3);
    assert!(most <= descriptors_max, "{most}");
    assert!(most > 500, "the flood reached the server: {most}");
    assert!(grown < 192 << 20, "{grown} bytes");
    // An hour later nothing is left of it.
    tokio::time::timeout(15 * SECOND, async {
        while server.handle.connections() > 8 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
    shutdown.cancel();
    admin_task.await.unwrap();
    server.stop().await;
}
