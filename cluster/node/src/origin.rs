//! What a node comes from: the genesis document that its configuration names, and the addresses in that. Owns: reading both. Never: a rule.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;

use anyhow::Context as _;
use dstack_raft::machine::Birth;

use crate::config::Config;

/// An address of the genesis document.
///
/// # Errors
/// It resolves to nothing.
pub(crate) fn resolve(address: &str) -> anyhow::Result<SocketAddr> {
    let mut found = address.to_socket_addrs().with_context(|| format!("address {address} of the genesis document"))?;
    found.next().with_context(|| format!("address {address} of the genesis document resolves to nothing"))
}

/// Genesis document, its bundle, and the roots that every node judges collateral under.
pub(crate) fn birth(config: &Config) -> anyhow::Result<Arc<Birth>> {
    let birth = Birth::new(&Config::read(&config.genesis)?, &Config::read(&config.first_collateral)?);
    let birth = birth.map_err(anyhow::Error::msg).context("genesis")?;
    let roots = crate::trust::roots(&config.software_roots, &birth.genesis().software_roots)?;
    birth.with_roots(roots).map(Arc::new).map_err(anyhow::Error::msg).context("node.software_roots")
}
