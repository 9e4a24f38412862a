//! A vsock port of the host, seen as a unix socket inside. Owns: carrying bytes both ways until either side ends. Never: reads them.

use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use anyhow::Context as _;
use vsock::{VsockAddr, VsockStream};

/// Where the image names them.
const RELAYS: &str = "/app/relays";

/// Listens at every socket that the image names.
pub(crate) fn begin() -> anyhow::Result<()> {
    let Ok(text) = fs::read_to_string(RELAYS) else { return Ok(()) };
    for line in text.lines() {
        let (socket, place) = line.split_once(' ').with_context(|| format!("{RELAYS}: {line:?}"))?;
        let (cid, port) = place.split_once(':').with_context(|| format!("{RELAYS}: {line:?}"))?;
        let to = VsockAddr::new(cid.parse().context("CID")?, port.parse().context("port")?);
        let listener = UnixListener::bind(socket).with_context(|| format!("cannot listen at {socket}"))?;
        thread::spawn(move || {
            for inside in listener.incoming().flatten() {
                thread::spawn(move || carry(&inside, to));
            }
        });
    }
    Ok(())
}

fn carry(inside: &UnixStream, to: VsockAddr) -> io::Result<()> {
    let outside = VsockStream::connect(&to)?;
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = io::copy(&mut &*inside, &mut &outside);
            outside.shutdown(Shutdown::Both)
        });
        let _ = io::copy(&mut &outside, &mut &*inside);
        inside.shutdown(Shutdown::Both)
    })
}
