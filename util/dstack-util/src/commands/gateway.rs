//! `gateway-refresh`. Owns: telling what there is to refresh. Never: imitates a registration: the gateway's own protocol (its registration
//! call and WireGuard's keys) is no part of this build.
//! Source: util and deploy reference §9.

use std::path::Path;

use anyhow::{Context as _, bail};

use crate::files;
use crate::setup::host_shared::{FOLDER, SYS_CONFIG, SysConfig};

/// Nothing to do where no gateway is configured; else it says what is missing.
///
/// # Errors
/// A gateway is configured.
pub fn refresh(work_dir: &Path) -> anyhow::Result<()> {
    let folder = work_dir.join(FOLDER);
    let config = files::read(&folder.join(SYS_CONFIG.name), SYS_CONFIG.limit_bytes).context("run setup first")?;
    let config = SysConfig::parse(&config)?;
    if config.gateway_urls.is_empty() {
        eprintln!("no gateway is configured");
        return Ok(());
    }
    bail!(
        "{} gateway(s) configured, but this build does not speak the gateway's registration protocol: use upstream's dstack-util for it; keys and \
         certificates in {} are those it reads",
        config.gateway_urls.len(),
        folder.display()
    )
}
