//! Configuration of a node: raw from file, environment and flags, checked once.
//!
//! Owns: keys, defaults, relations. Trust roots, members and policy have no default. Source: style.md §8.

mod dstack;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use dstack_attest::TcbPolicy;
use dstack_protocol::limits::TCB_GRACE_S_MAX;
use dstack_protocol::{Seat, TcbStatus};
use dstack_runtime::config::Loader;
use dstack_runtime::telemetry::LogFormat;
use dstack_storage::EngineKind;
use serde::Deserialize;

use crate::authority_config::{AuthorityConfig, RawAuthority};
use dstack::RawDstack;
pub(crate) use dstack::{AdminConfig, DstackConfig, OnboardConfig};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    cluster: RawCluster,
    node: RawNode,
    #[serde(default)]
    collateral: RawCollateral,
    #[serde(default)]
    dstack: Option<RawDstack>,
    #[serde(default)]
    authority: Option<RawAuthority>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCluster {
    genesis: PathBuf,
    collateral: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawCollateral {
    mode: String,
    intel: Vec<String>,
    refresh_every_s: u64,
    renew_before_s: u64,
    age_s_max: u64,
    amd: Vec<String>,
    link_hosts: Vec<String>,
    accept_missing_crl: bool,
}

impl Default for RawCollateral {
    fn default() -> Self {
        Self {
            mode: "fetch".to_owned(),
            intel: vec!["https://api.trustedservices.intel.com".to_owned()],
            refresh_every_s: 6 * 3600,
            renew_before_s: 7 * 86_400,
            age_s_max: 30 * 86_400,
            amd: vec!["https://kdsintf.amd.com".to_owned()],
            // Where Google's attestation keys say that their issuers and revocation lists are.
            link_hosts: vec!["storage.googleapis.com".to_owned(), "pki.goog".to_owned()],
            accept_missing_crl: false,
        }
    }
}

/// How collateral is kept fresh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CollateralConfig {
    /// Whether this node fetches while it leads; otherwise operators bring collateral.
    pub(crate) fetch: bool,
    /// Base addresses of Intel's service or of caches with its interface, tried in order.
    pub(crate) intel: Vec<String>,
    /// Collateral is asked for this often.
    pub(crate) refresh_every: Duration,
    /// And at every turn when it ends within this time.
    pub(crate) renew_before: Duration,
    /// Hard maximum age since issue, ms.
    pub(crate) age_ms_max: u64,
    /// Base addresses of AMD's key distribution service or of mirrors of it, tried in order.
    pub(crate) amd: Vec<String>,
    /// Hosts that the addresses inside certificates may lead to.
    pub(crate) link_hosts: Vec<String>,
    /// Whether chains of AMD and Google are judged without the revocation lists that they name.
    pub(crate) accept_missing_crl: bool,
}

impl Default for CollateralConfig {
    fn default() -> Self {
        Self::of(RawCollateral::default(), true)
    }
}

impl CollateralConfig {
    fn of(raw: RawCollateral, fetch: bool) -> Self {
        Self {
            fetch,
            intel: raw.intel,
            refresh_every: Duration::from_secs(raw.refresh_every_s),
            renew_before: Duration::from_secs(raw.renew_before_s),
            age_ms_max: raw.age_s_max.saturating_mul(1000),
            amd: raw.amd,
            link_hosts: raw.link_hosts,
            accept_missing_crl: raw.accept_missing_crl,
        }
    }

    fn checked(raw: RawCollateral) -> anyhow::Result<Self> {
        let fetch = match raw.mode.as_str() {
            "fetch" => true,
            "pinned" => false,
            other => bail!("collateral.mode: `fetch` or `pinned`, got `{other}`"),
        };
        if fetch && raw.intel.is_empty() {
            bail!("collateral.intel: at least one address with mode `fetch`");
        }
        for (key, urls) in [("intel", &raw.intel), ("amd", &raw.amd)] {
            for url in urls {
                dstack_collateral::Endpoint::parse(url).map_err(|error| anyhow::anyhow!("collateral.{key}: {error}"))?;
            }
        }
        dstack_collateral::LinkHosts::new(&raw.link_hosts).map_err(|error| anyhow::anyhow!("collateral.link_hosts: {error}"))?;
        if raw.refresh_every_s > 30 * 86_400 {
            bail!("collateral.refresh_every_s: at most 30 days, got {}", raw.refresh_every_s);
        }
        if raw.refresh_every_s == 0 || raw.age_s_max == 0 {
            bail!("collateral.refresh_every_s and collateral.age_s_max must be at least 1");
        }
        Ok(Self::of(raw, fetch))
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    seat: u16,
    data_dir: PathBuf,
    listen: SocketAddr,
    admin_listen: SocketAddr,
    device: String,
    #[serde(default)]
    software_roots: Vec<PathBuf>,
    #[serde(default = "default_engine")]
    engine: String,
    #[serde(default = "default_format")]
    log_format: LogFormat,
    #[serde(default = "default_level")]
    log_level: String,
    #[serde(default = "default_tcb")]
    node_tcb_allowed: Vec<String>,
    #[serde(default = "default_grace_s")]
    node_tcb_grace_s: u32,
    #[serde(default)]
    node_min_evaluation: u32,
    #[serde(default)]
    node_refused_advisories: Vec<String>,
    #[serde(default)]
    node_accept_vlek: bool,
    #[serde(default = "default_certificate_s")]
    certificate_lifetime_s: u64,
    #[serde(default = "default_releases")]
    releases_max: usize,
    #[serde(default = "default_checkpoint")]
    checkpoint_every_entries: u64,
    #[serde(default)]
    log_kept_entries: Option<u64>,
    #[serde(default)]
    heartbeat_ms: Option<u64>,
    #[serde(default)]
    election_min_ms: Option<u64>,
    #[serde(default)]
    election_max_ms: Option<u64>,
}

fn default_engine() -> String {
    "redb".to_owned()
}
fn default_format() -> LogFormat {
    LogFormat::Json
}
fn default_level() -> String {
    // openraft warns of each heartbeat that a dead peer missed; `dstack_raft` says it once.
    "info,openraft=error".to_owned()
}
fn default_tcb() -> Vec<String> {
    vec![TcbStatus::UpToDate.name().to_owned()]
}
fn default_grace_s() -> u32 {
    // A TCB recovery must not stop the cluster at once.
    30 * 86_400
}
fn default_certificate_s() -> u64 {
    3000
}
fn default_releases() -> usize {
    512
}
fn default_checkpoint() -> u64 {
    5000
}

/// The checked configuration.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// Genesis document file.
    pub(crate) genesis: PathBuf,
    /// Collateral bundle file of the genesis document.
    pub(crate) first_collateral: PathBuf,
    /// This node's seat.
    pub(crate) seat: Seat,
    /// Where everything durable is.
    pub(crate) data_dir: PathBuf,
    /// RA-TLS listener.
    pub(crate) listen: SocketAddr,
    /// Plain HTTP listener for metrics and health.
    pub(crate) admin_listen: SocketAddr,
    /// Device, as `dstack_tee::open` takes it.
    pub(crate) device: String,
    /// Software roots trusted; the genesis document must name them too.
    pub(crate) software_roots: Vec<PathBuf>,
    /// Storage engine.
    pub(crate) engine: EngineKind,
    /// Log format.
    pub(crate) log_format: LogFormat,
    /// Log filter.
    pub(crate) log_level: String,
    /// What is asked of the TCB of nodes. The same in the configuration of every node, or they disagree about a peer.
    pub(crate) node_tcb: TcbPolicy,
    /// Lifetime of this node's certificate, seconds; below the age at which its evidence expires.
    pub(crate) certificate_lifetime_s: u64,
    /// Releases coordinated at once.
    pub(crate) releases_max: usize,
    /// Log entries after which the leader asks for a checkpoint.
    pub(crate) checkpoint_every_entries: u64,
    /// Raft timing.
    pub(crate) raft: dstack_raft::RaftConfig,
    /// How collateral is kept fresh.
    pub(crate) collateral: CollateralConfig,
    /// dstack's KMS protocol, where this node serves it.
    pub(crate) dstack: Option<DstackConfig>,
    /// The webhook authority that this node asks, where it has one.
    pub(crate) authority: Option<AuthorityConfig>,
}

/// A configuration with the text that `--check-config` prints.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// Checked.
    pub(crate) config: Config,
    /// In force, as TOML.
    pub(crate) effective: String,
}

impl Config {
    /// Loads file and environment, checks.
    pub(crate) fn load(path: &Path) -> anyhow::Result<Loaded> {
        let loader = Loader::new().file(path).environment("DSTACK_KMS");
        let loaded = dstack::sources(loader).load::<Raw>()?;
        let effective = loaded.effective();
        Ok(Loaded { config: Self::checked(loaded.raw)?, effective })
    }

    fn checked(raw: Raw) -> anyhow::Result<Self> {
        let Raw { cluster, node, collateral, dstack, authority } = raw;
        let authority = authority.map(AuthorityConfig::checked).transpose()?;
        let dstack = dstack.map(|dstack| DstackConfig::checked(dstack, &[node.listen, node.admin_listen])).transpose()?;
        let collateral = CollateralConfig::checked(collateral)?;
        if node.seat == 0 {
            bail!("node.seat: seats are 1..=n");
        }
        if node.listen == node.admin_listen && node.listen.port() != 0 {
            bail!("node.admin_listen: must differ from node.listen");
        }
        if !(60..=3600).contains(&node.certificate_lifetime_s) {
            bail!("node.certificate_lifetime_s: 60 to 3600, Nitro evidence lives one hour; got {}", node.certificate_lifetime_s);
        }
        if node.releases_max == 0 || node.checkpoint_every_entries < 100 {
            bail!("node.releases_max must be at least 1 and node.checkpoint_every_entries at least 100");
        }
        let engine = node.engine.parse::<EngineKind>().map_err(|error| anyhow::anyhow!("node.engine: {error}"))?;
        let mut node_tcb_allowed = Vec::new();
        for name in &node.node_tcb_allowed {
            match TcbStatus::from_name(name) {
                Some(TcbStatus::Revoked | TcbStatus::None) | None => {
                    bail!("node.node_tcb_allowed: `{name}` is no status that may be allowed")
                }
                Some(status) => node_tcb_allowed.push(status),
            }
        }
        if node.node_tcb_grace_s > TCB_GRACE_S_MAX {
            bail!("node.node_tcb_grace_s: at most {TCB_GRACE_S_MAX} (two years), got {}", node.node_tcb_grace_s);
        }
        let node_tcb = TcbPolicy::allowing(&node_tcb_allowed)
            .with_grace_ms(u64::from(node.node_tcb_grace_s) * 1000)
            .refusing_advisories(&node.node_refused_advisories)
            .with_min_evaluation(node.node_min_evaluation);
        let node_tcb = if node.node_accept_vlek { node_tcb.accepting_vlek() } else { node_tcb };
        let defaults = dstack_raft::RaftConfig::default();
        let raft = dstack_raft::RaftConfig {
            heartbeat_ms: node.heartbeat_ms.unwrap_or(defaults.heartbeat_ms),
            election_min_ms: node.election_min_ms.unwrap_or(defaults.election_min_ms),
            election_max_ms: node.election_max_ms.unwrap_or(defaults.election_max_ms),
            log_kept_entries: node.log_kept_entries.unwrap_or(defaults.log_kept_entries),
            ..defaults
        };
        Ok(Self {
            genesis: cluster.genesis,
            first_collateral: cluster.collateral,
            seat: Seat(node.seat),
            data_dir: node.data_dir,
            listen: node.listen,
            admin_listen: node.admin_listen,
            device: node.device,
            software_roots: node.software_roots,
            engine,
            log_format: node.log_format,
            log_level: node.log_level,
            node_tcb,
            certificate_lifetime_s: node.certificate_lifetime_s,
            releases_max: node.releases_max,
            checkpoint_every_entries: node.checkpoint_every_entries,
            raft,
            collateral,
            dstack,
            authority,
        })
    }

    /// Reads a file that the configuration names.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
        std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(change: &str) -> anyhow::Result<Config> {
        let text = format!(
            "[cluster]\ngenesis='g'\ncollateral='c'\n[node]\nseat=1\ndata_dir='d'\nlisten='127.0.0.1:1'\nadmin_listen='127.0.0.1:2'\ndevice='software:/s'\n{change}"
        );
        let dir = std::env::temp_dir().join(format!("dstack-kms-config-{}-{}", std::process::id(), change.len()));
        std::fs::write(&dir, text)?;
        let loaded = Config::load(&dir).map(|loaded| loaded.config);
        std::fs::remove_file(&dir)?;
        loaded
    }

    #[test]
    fn listeners_of_operators_are_off_by_default_and_their_secrets_are_not_printed() {
        let section = "[dstack]\nlisten='127.0.0.1:3'\nhosts=['a']";
        let plain = raw(section).unwrap().dstack.unwrap();
        assert!(plain.admin.is_none() && plain.onboard.is_none());
        let both = format!("{section}\n[dstack.admin]\nauth_token='hunter2'\n[dstack.onboard]\nlisten='127.0.0.1:3'");
        let config = raw(&both).unwrap();
        let dstack = config.dstack.clone().unwrap();
        assert_eq!(dstack.admin.unwrap().listen.to_string(), "127.0.0.1:8001");
        let onboard = dstack.onboard.unwrap();
        assert_eq!((onboard.listen, onboard.wait.as_secs()), (dstack.listen, 40));
        assert!(!format!("{config:?}").contains("hunter2"));
        let open = raw(&format!("{section}\n[dstack.admin]\ninsecure_no_auth=true")).unwrap();
        assert!(open.dstack.unwrap().admin.unwrap().credentials.is_none());
    }

    #[test]
    fn defaults_hold_and_wrong_values_are_named() {
        assert_eq!(raw("").unwrap().engine, EngineKind::Redb);
        assert_eq!(raw("engine='sled'").unwrap().engine, EngineKind::Sled);
        for (change, word) in [
            ("engine='mysql'", "engine"),
            ("certificate_lifetime_s=7200", "certificate_lifetime_s"),
            ("node_tcb_allowed=['Revoked']", "node_tcb_allowed"),
            ("node_tcb_grace_s=4000000000", "node_tcb_grace_s"),
            ("unknown=1", "unknown"),
            ("releases_max=0", "releases_max"),
            ("[collateral]\nmode='sometimes'", "collateral.mode"),
            ("[collateral]\nintel=[]", "collateral.intel"),
            ("[collateral]\nintel=['http://pccs.example']", "collateral.intel"),
            ("[collateral]\nage_s_max=0", "collateral.age_s_max"),
            ("[dstack]\nlisten='127.0.0.1:3'\nhosts=[]", "dstack.hosts"),
            ("[dstack]\nlisten='127.0.0.1:3'\nhosts=['kms.example:8000']", "dstack.hosts"),
            ("[dstack]\nlisten='127.0.0.1:1'\nhosts=['kms.example']", "dstack.listen"),
            ("[dstack]\nhosts=['kms.example']", "listen"),
            ("[dstack]\nlisten='127.0.0.1:3'\nhosts=['a']\n[dstack.admin]", "nobody may call it"),
            ("[dstack]\nlisten='127.0.0.1:3'\nhosts=['a']\n[dstack.admin]\nauth_token='a b'", "auth_token"),
            ("[dstack]\nlisten='127.0.0.1:3'\nhosts=['a']\n[dstack.admin]\nauth_token=7777", "value not shown"),
            ("[dstack]\nlisten='127.0.0.1:3'\nhosts=['a']\n[dstack.admin]\nhtpasswd_file='/nowhere'", "htpasswd_file"),
            ("[dstack]\nlisten='127.0.0.1:3'\nhosts=['a']\n[dstack.admin]\nauth_token='t'\nlisten='127.0.0.1:3'", "dstack.admin.listen"),
            ("[dstack]\nlisten='127.0.0.1:3'\nhosts=['a']\n[dstack.onboard]\nlisten='127.0.0.1:2'", "dstack.onboard.listen"),
            ("[dstack]\nlisten='127.0.0.1:3'\nhosts=['a']\n[dstack.onboard]", "listen"),
            ("[dstack]\nlisten='127.0.0.1:3'\nhosts=['a']\n[dstack.onboard]\nlisten='127.0.0.1:3'\nwait_s=0", "dstack.onboard.wait_s"),
            ("[dstack]\nlisten='127.0.0.1:3'\nhosts=['a']\n[dstack.onboard]\nlisten='127.0.0.1:3'\nwait_s=51", "dstack.onboard.wait_s"),
            ("[authority]\nurl='http://auth-api:8000'", "authority.url"),
            ("[authority]\nurl='http://127.0.0.1:8000'\nlease_s=0", "authority.lease_s"),
            ("[authority]\nurl='http://127.0.0.1:8000'\nlease_s=301", "authority.lease_s"),
            ("[authority]\nurl='http://127.0.0.1:8000'\ntimeout_ms=3000", "authority.timeout_ms"),
            ("[authority]\ntoken='secret'", "authority"),
            ("[authority]\nurl='http://127.0.0.1:8000'\nos_images={'00'='00'}", "authority.os_images: expected"),
            (
                &format!(
                    "[authority]\nurl='http://127.0.0.1:8000'\nos_images={{'{0}'='{0}', '{1}'='{0}'}}",
                    "ab".repeat(32),
                    "AB".repeat(32)
                ),
                "twice",
            ),
            ("[collateral]\namd=['ftp://kds']", "collateral.amd"),
            ("[collateral]\nlink_hosts=['a/b']", "collateral.link_hosts"),
        ] {
            let error = format!("{:#}", raw(change).unwrap_err());
            assert!(error.contains(word), "{change}: {error}");
        }
    }
}
