//! The accept loop of the kit's plain HTTP servers. Owns: the listener, a thread a connection, their end. Never: listens on anything but
//! loopback; a byte of a request.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::TestkitError;

/// How long a client may take with its request.
const PATIENCE: Duration = Duration::from_secs(5);

/// A running loop; ends when dropped.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) address: SocketAddr,
    stop: Arc<AtomicBool>,
}

impl Listening {
    /// On a free port of loopback (0), or on this one. `answer`: what is done with a connection.
    ///
    /// # Errors
    /// [`TestkitError::File`]: the port is taken.
    pub(crate) fn start(name: &str, port: u16, answer: impl Fn(TcpStream) + Send + Sync + 'static) -> Result<Self, TestkitError> {
        let io = |error: std::io::Error| TestkitError::file(name, error);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(io)?;
        let address = listener.local_addr().map_err(io)?;
        let (answer, stop) = (Arc::new(answer), Arc::<AtomicBool>::default());
        let stopped = Arc::clone(&stop);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(stream), answer) = (stream, Arc::clone(&answer)) else { continue };
                std::thread::spawn(move || {
                    let _ = stream.set_read_timeout(Some(PATIENCE));
                    answer(stream);
                });
            }
        });
        Ok(Self { address, stop })
    }

    /// Base address.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the listener, so that it sees.
        let _ = TcpStream::connect(self.address);
    }
}
