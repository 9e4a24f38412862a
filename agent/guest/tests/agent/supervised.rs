//! Under systemd's protocol: sockets handed over, readiness and watchdog messages to a real datagram socket.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::local::{Local, rpc};
use crate::{ANY_ANSWER, Running};

#[test]
fn takes_over_sockets_says_ready_and_earns_the_watchdog() {
    let local = Local::new(true);
    let agent = local.command(&Local::compose(&json!({})));
    let (dstack, tappd) = (local.path("handed-dstack.sock"), local.path("handed-tappd.sock"));
    let listeners = [UnixListener::bind(&dstack).unwrap(), UnixListener::bind(&tappd).unwrap()];
    for listener in &listeners {
        rustix::io::fcntl_setfd(listener, rustix::io::FdFlags::empty()).unwrap();
    }
    let notify = UnixDatagram::bind(local.path("notify.sock")).unwrap();
    notify.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let [first, second] = [listeners[0].as_raw_fd(), listeners[1].as_raw_fd()];
    // Descriptors 3 and 4, and the number of the process that they are for.
    let script = format!("exec 63<&{first} 64<&{second}; exec 3<&63 4<&64; LISTEN_PID=$$ LISTEN_FDS=2 exec \"$0\" \"$@\" --watchdog");
    let mut command = Command::new("bash");
    command.arg("-c").arg(script).arg(agent.get_program()).args(agent.get_args());
    command.env("NOTIFY_SOCKET", local.path("notify.sock")).env("WATCHDOG_USEC", "2000000");
    command.env("DSTACK_AGENT__API__CONNECTIONS_MAX", "3");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = local.wait(Running(Some(command.spawn().unwrap())));

    let mut messages = Vec::new();
    let began = Instant::now();
    while messages.iter().filter(|message: &&String| message.contains("WATCHDOG=1")).count() < 2 {
        let mut buffer = [0; 512];
        if let Ok(length) = notify.recv(&mut buffer) {
            messages.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        assert!(began.elapsed() < ANY_ANSWER, "{messages:?}");
        assert!(running.0.as_mut().unwrap().try_wait().unwrap().is_none(), "the agent ended");
    }
    assert!(messages[0].contains("READY=1"), "{messages:?}");

    // Callers that hold every connection of the external port have nobody ended.
    let holding = || {
        let mut stream = TcpStream::connect(local.external).unwrap();
        stream.write_all(b"POST /prpc/Worker.Version HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n").unwrap();
        stream
    };
    let _held = [holding(), holding(), holding()];
    let mut waiting = TcpStream::connect(local.external).unwrap();
    waiting.write_all(b"GET /prpc/Worker.Version HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    waiting.set_nonblocking(true).unwrap();
    let is_waiting = |mut stream: &TcpStream| stream.read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
    let mut earned = 0;
    // The first ones may be of before.
    while earned < 3 && is_waiting(&waiting) {
        let mut buffer = [0; 512];
        if let Ok(length) = notify.recv(&mut buffer) {
            earned += usize::from(buffer[..length].starts_with(b"WATCHDOG=1"));
        }
        assert!(running.0.as_mut().unwrap().try_wait().unwrap().is_none(), "the agent ended");
    }
    assert_eq!(earned, 3, "messages come while nobody else is served");

    assert_eq!(rpc(UnixStream::connect(&dstack).unwrap(), "/GetKey", &json!({ "path": "p" })).0, 200);
    assert_eq!(rpc(UnixStream::connect(&tappd).unwrap(), "/prpc/Tappd.Version", &json!({})).0, 200);
    assert!(!local.path("dstack.sock").exists() && !local.path("tappd.sock").exists(), "its own are not made");
    let output = running.terminate();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(dstack.exists() && tappd.exists(), "systemd's files stay");
}
