//! One socket, its connections, their end. Owns: the socket file, a bounded number of threads.
//! Never: more than `CONNECTIONS_MAX` connections at once; a client beyond is closed at once and may retry.

use std::collections::HashMap;
use std::io::{Error, ErrorKind, Result};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use dstack_runtime::clock::Clock;

use crate::device::connection::Connection;
use crate::device::peer::Executables;
use crate::host::Host;

/// A machine being served. Dropping it stops it.
pub struct Serving {
    shared: Arc<Shared>,
    path: PathBuf,
    /// Device and inode of our socket file: another server's file at the same path is not ours to remove.
    file: (u64, u64),
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    host: Host,
    clock: Arc<dyn Clock>,
    executables: Arc<Executables>,
    listener: UnixListener,
    stopping: AtomicBool,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    next: u64,
    streams: HashMap<u64, UnixStream>,
}

/// Serves `host` on a new socket at `path` with permissions `mode`. A dead server's socket file is replaced.
///
/// # Errors
/// `AddrInUse` when a server answers there or the file is no socket; else what the system says.
pub fn serve(host: Host, path: &Path, mode: u32, executables: Arc<Executables>, clock: Arc<dyn Clock>) -> Result<Serving> {
    remove_stale(path)?;
    let listener = bind(path, mode)?;
    let file = std::fs::symlink_metadata(path)?;
    let shared = Arc::new(Shared { host, clock, executables, listener, stopping: AtomicBool::new(false), open: Mutex::default() });
    let acceptor = Arc::clone(&shared);
    let accepting = std::thread::Builder::new().name("accept".to_owned()).spawn(move || acceptor.accept())?;
    Ok(Serving { shared, path: path.to_owned(), file: (file.dev(), file.ino()), accepting: Some(accepting) })
}

impl Serving {
    /// The machine.
    pub fn host(&self) -> &Host {
        &self.shared.host
    }

    /// Its socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ends every connection and removes the socket file.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let Some(accepting) = self.accepting.take() else {
            return;
        };
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes the blocked accept on Linux.
        let _ = rustix::net::shutdown(&self.shared.listener, rustix::net::Shutdown::Both);
        let _ = accepting.join();
        for stream in self.shared.open().streams.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "socket not removed");
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn open(&self) -> std::sync::MutexGuard<'_, Open> {
        // Plain data: a thread that panicked left it whole.
        self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn accept(self: Arc<Self>) {
        while !self.stopping.load(Ordering::SeqCst) {
            match self.listener.accept() {
                Ok((stream, _)) => self.clone().admit(stream),
                Err(_) if self.stopping.load(Ordering::SeqCst) => return,
                Err(error) => {
                    // Descriptors ran out, most likely; they come back as connections end.
                    tracing::warn!(%error, "accept failed");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    /// Starts a thread for the connection, or closes it when there are too many.
    fn admit(self: Arc<Self>, stream: UnixStream) {
        let Ok(handle) = stream.try_clone() else {
            return;
        };
        let number = {
            let mut open = self.open();
            if open.streams.len() >= CONNECTIONS_MAX {
                tracing::warn!(machine = self.host.name(), "too many connections, closing one");
                return;
            }
            let number = open.next;
            open.next = number.wrapping_add(1);
            open.streams.insert(number, handle);
            number
        };
        let shared = Arc::clone(&self);
        let spawned = std::thread::Builder::new().name("connection".to_owned()).stack_size(STACK_BYTES).spawn(move || {
            let _closed = Closed { shared: &shared, number };
            let executable = shared.executables.of_peer(&stream);
            if let Err(error) = Connection::new(&shared.host, &*shared.clock, executable).run(&stream) {
                tracing::debug!(machine = shared.host.name(), %error, "connection ended");
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a connection");
            self.open().streams.remove(&number);
        }
    }
}

/// Forgets the connection however its thread ends.
struct Closed<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.shared.open().streams.remove(&self.number);
    }
}

/// The socket file never has wider permissions than `mode`: they are set before it has a name.
fn bind(path: &Path, mode: u32) -> Result<UnixListener> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::fs::fchmod(&socket, rustix::fs::Mode::from_raw_mode(mode))?;
    rustix::net::bind(&socket, &address)?;
    // The umask may have narrowed it.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    rustix::net::listen(&socket, 128)?;
    Ok(UnixListener::from(socket))
}

fn remove_stale(path: &Path) -> Result<()> {
    let file = match std::fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !file.file_type().is_socket() {
        return Err(Error::new(ErrorKind::AddrInUse, format!("{} is there and is no socket", path.display())));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        _ => Err(Error::new(ErrorKind::AddrInUse, format!("a server answers at {}", path.display()))),
    }
}

const CONNECTIONS_MAX: usize = 512;
/// Signing and JSON need little; the default of 2 MiB a thread would not.
const STACK_BYTES: usize = 512 * 1024;
