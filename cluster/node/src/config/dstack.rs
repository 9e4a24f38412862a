//! Section `[dstack]`: the listener for dstack's guests, and the two of upstream's operators. Owns: its keys, defaults, relations.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use dstack_protocol::limits::ISSUING_HOSTS_MAX;
use dstack_protocol::sign::host_is_well_formed;
use dstack_runtime::config::Loader;
use dstack_secret::SecretBytes;
use serde::{Deserialize, Deserializer};

use crate::dstack::admin::credentials::Credentials;

/// Longest name of a site, bytes.
const SITE_NAME_BYTES_MAX: usize = 256;
/// How long a call of onboarding may wait, seconds: less than its listener gives a request.
const WAIT_S: std::ops::RangeInclusive<u64> = 1..=50;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawDstack {
    listen: SocketAddr,
    hosts: Vec<String>,
    #[serde(default)]
    gateway_app_id: String,
    #[serde(default)]
    admin: Option<RawAdmin>,
    #[serde(default)]
    onboard: Option<RawOnboard>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAdmin {
    #[serde(default = "default_admin_listen")]
    listen: SocketAddr,
    #[serde(default)]
    auth_token: RawSecret,
    #[serde(default)]
    htpasswd_file: String,
    #[serde(default)]
    insecure_no_auth: bool,
}

fn default_admin_listen() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 8001))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawOnboard {
    listen: SocketAddr,
    #[serde(default)]
    site_name: String,
    #[serde(default = "default_wait_s")]
    wait_s: u64,
}

/// Clients of upstream's libraries wait 60 s.
fn default_wait_s() -> u64 {
    40
}

/// Text that nobody prints.
#[derive(Debug)]
struct RawSecret(SecretBytes);

impl Default for RawSecret {
    fn default() -> Self {
        Self(SecretBytes::take(Vec::new()))
    }
}

impl<'de> Deserialize<'de> for RawSecret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(SecretBytes::take(text.into_bytes())))
    }
}

/// The listener of dstack's KMS protocol.
#[derive(Debug, Clone)]
pub(crate) struct DstackConfig {
    /// TLS listener.
    pub(crate) listen: SocketAddr,
    /// Host names and addresses that guests reach it by, ascending.
    pub(crate) hosts: Vec<String>,
    /// What guests are told as their gateway's app id; may be empty. The same on every node.
    pub(crate) gateway_app_id: String,
    /// The listener of service `Admin`.
    pub(crate) admin: Option<AdminConfig>,
    /// The listener of service `Onboard`.
    pub(crate) onboard: Option<OnboardConfig>,
}

/// The listener of service `Admin`.
#[derive(Debug, Clone)]
pub(crate) struct AdminConfig {
    /// Plain HTTP.
    pub(crate) listen: SocketAddr,
    /// Who may call; `None` with `insecure_no_auth`.
    pub(crate) credentials: Option<Arc<Credentials>>,
}

/// The listener of service `Onboard`.
#[derive(Debug, Clone)]
pub(crate) struct OnboardConfig {
    /// Plain HTTP; may be the address of the TLS listener, which begins when onboarding has ended.
    pub(crate) listen: SocketAddr,
    /// What `GetAttestationInfo` tells as `site_name`.
    pub(crate) site_name: String,
    /// How long `Bootstrap` and `Onboard` wait before they say what they wait for.
    pub(crate) wait: Duration,
}

/// The keys of the section that are secret, and the variables by which upstream's deployments set them.
pub(super) fn sources(loader: Loader) -> Loader {
    const TOKEN: &str = "dstack.admin.auth_token";
    loader.secret(TOKEN).fallback("DSTACK_KMS_ADMIN_TOKEN", TOKEN).fallback("ADMIN_API_TOKEN", TOKEN)
}

impl DstackConfig {
    /// Checks the section; `taken`: addresses of the node's own listeners.
    pub(super) fn checked(raw: RawDstack, taken: &[SocketAddr]) -> anyhow::Result<Self> {
        let RawDstack { listen, mut hosts, gateway_app_id, admin, onboard } = raw;
        hosts.sort_unstable();
        hosts.dedup();
        if hosts.is_empty() || hosts.len() > ISSUING_HOSTS_MAX {
            bail!("dstack.hosts: 1 to {ISSUING_HOSTS_MAX} host names or addresses that guests reach this node by, got {}", hosts.len());
        }
        if let Some(host) = hosts.iter().find(|host| !host_is_well_formed(host)) {
            bail!("dstack.hosts: `{host}` is neither a host name in lower case nor an IP address (no port, no wildcard)");
        }
        if gateway_app_id.len() > 256 {
            bail!("dstack.gateway_app_id: at most 256 bytes, got {}", gateway_app_id.len());
        }
        let (admin, onboard) = (admin.map(AdminConfig::checked).transpose()?, onboard.map(OnboardConfig::checked).transpose()?);
        let mut known: BTreeSet<SocketAddr> = taken.iter().copied().collect();
        let listeners = [("dstack.listen", Some(listen)), ("dstack.admin.listen", admin.as_ref().map(|admin| admin.listen))];
        for (key, address) in listeners.into_iter().filter_map(|(key, address)| Some((key, address?))) {
            if address.port() != 0 && !known.insert(address) {
                bail!("{key}: {address} is the address of another listener of this node");
            }
        }
        // The TLS listener begins when that of onboarding has ended, so these two may share an address.
        known.remove(&listen);
        if let Some(address) = onboard.as_ref().map(|onboard| onboard.listen).filter(|address| known.contains(address)) {
            bail!("dstack.onboard.listen: {address} is the address of another listener of this node; only dstack.listen may be the same");
        }
        Ok(Self { listen, hosts, gateway_app_id, admin, onboard })
    }
}

impl AdminConfig {
    fn checked(raw: RawAdmin) -> anyhow::Result<Self> {
        let RawAdmin { listen, auth_token: RawSecret(token), htpasswd_file, insecure_no_auth } = raw;
        if insecure_no_auth {
            return Ok(Self { listen, credentials: None });
        }
        let htpasswd = match htpasswd_file.as_str() {
            "" => None,
            path => Some(super::Config::read(&PathBuf::from(path)).context("dstack.admin.htpasswd_file")?),
        };
        let credentials = Credentials::new(&token, htpasswd.as_deref()).map_err(|error| anyhow::anyhow!("dstack.admin: {error}"))?;
        Ok(Self { listen, credentials: Some(Arc::new(credentials)) })
    }
}

impl OnboardConfig {
    fn checked(raw: RawOnboard) -> anyhow::Result<Self> {
        let RawOnboard { listen, site_name, wait_s } = raw;
        if site_name.len() > SITE_NAME_BYTES_MAX {
            bail!("dstack.onboard.site_name: at most {SITE_NAME_BYTES_MAX} bytes, got {}", site_name.len());
        }
        if !WAIT_S.contains(&wait_s) {
            bail!("dstack.onboard.wait_s: {} to {} seconds, got {wait_s}", WAIT_S.start(), WAIT_S.end());
        }
        Ok(Self { listen, site_name, wait: Duration::from_secs(wait_s) })
    }
}
