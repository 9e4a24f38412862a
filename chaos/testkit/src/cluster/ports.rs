//! Free ports of the loopback interface. Owns: choosing them outside the range that the system gives to outgoing connections, so that
//! a node that restarts finds its port free. Never: gives one port twice in a process.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Mutex, PoisonError};

use super::error::ClusterError;

static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// Lowest port we use.
const LOWEST: u16 = 11_000;
/// Tries until the machine counts as full.
const TRIES: usize = 2000;

/// A port that nobody listens at now.
///
/// # Errors
/// [`ClusterError::Process`] when none was found or the system gives no randomness.
pub fn free_port() -> Result<u16, ClusterError> {
    let highest = first_ephemeral().max(LOWEST + 1000);
    for _ in 0..TRIES {
        let mut bytes = [0; 2];
        getrandom::fill(&mut bytes).map_err(|error| failure(&error))?;
        let port = LOWEST + u16::from_be_bytes(bytes) % (highest - LOWEST);
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
        if free && GIVEN.lock().unwrap_or_else(PoisonError::into_inner).insert(port) {
            return Ok(port);
        }
    }
    Err(failure(&"no free port was found"))
}

fn failure(reason: &dyn ToString) -> ClusterError {
    ClusterError::Process { name: "port".to_owned(), reason: reason.to_string() }
}

fn first_ephemeral() -> u16 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    range.split_whitespace().next().and_then(|low| low.parse().ok()).unwrap_or(32_768)
}
