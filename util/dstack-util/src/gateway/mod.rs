//! Registering with a gateway, as a guest does at boot and `gateway-refresh` later. Owns: the order of the steps, which gateway is believed.
//! Never: brings an interface up, changes the firewall: those are the system's (`wg-quick@dstack-wg0`); takes an answer of a server that is
//! not the app which the KMS names as gateway.
//! Source: util and deploy reference §9; the public definition of dstack's gateway RPC.
//!
//! | module | what |
//! | --- | --- |
//! | [`certificate`] | a client certificate of the app, by the KMS |
//! | [`wireguard`] | the interface's key and configuration |

pub mod certificate;
pub mod wireguard;

use std::path::{Path, PathBuf};
use std::time::Duration;

use dstack_client::dstack::ask;
use dstack_client::{EvidenceOf, NodeUrl, Route, UrlError};
use dstack_prpc::gateway::{RegisterCvmRequest, RegisterCvmResponse};
use dstack_ratls::prpc_client::{RpcCallError, RpcClient, ServerTrust};
use dstack_ratls::{Now, RatlsError};
use dstack_secret::SecretBytes;
use serde::Deserialize;

use crate::app_keys::{AppKeys, DOCUMENT_BYTES_MAX, ProviderKeys};
use crate::dstack_kms::base_of;
use crate::files::{self, FileError};
use crate::setup::APP_KEYS;
use crate::setup::host_shared::{APP_COMPOSE, FOLDER, SYS_CONFIG, SysConfig};
use wireguard::{AnswerError, Key};

/// The interface's configuration, where `wg-quick` looks for it.
pub const CONFIG: &str = "/etc/wireguard/dstack-wg0.conf";
/// The interface's key: of one boot.
pub const KEY: &str = "/run/dstack/wireguard.key";
/// For one call.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Why there is no registration.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// A file of the boot is missing or too large. Run setup first.
    #[error("{0}")]
    File(#[from] FileError),
    /// A file of the boot is not of its form.
    #[error("{name}: {reason}")]
    Document {
        /// The file.
        name: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The host names no gateway. The operator's to fix.
    #[error("a gateway is enabled, but .sys-config.json names none (gateway_urls)")]
    NoUrls,
    /// An address is none.
    #[error("gateway_urls in .sys-config.json: {0}")]
    Url(#[from] UrlError),
    /// The KMS names no app that may be the gateway. The cluster's operator sets it: `gateway_app_id` of its dstack listener.
    #[error("the KMS names no gateway's app (gateway_app_id is empty): no gateway would be believed")]
    NoAppId,
    /// Keys of another provider: nobody signs the certificate that a gateway asks for.
    #[error("a gateway needs a certificate by a KMS; the keys are of another provider")]
    Provider,
    /// The keys came in mode C: their address is not that of a dstack listener.
    #[error("the keys came by the cluster's own protocol: name its dstack listeners (--dstack-url), which sign certificates")]
    NoListener,
    /// Our own side.
    #[error("no certificate to register with: {0}")]
    Own(#[from] RatlsError),
    /// No KMS signs.
    #[error("no certificate to register with: {0}")]
    Certificate(#[source] RpcCallError),
    /// The KMS's chain is not for our key.
    #[error("the certificate chain of {url} is not for this key")]
    Chain {
        /// The KMS.
        url: String,
    },
    /// No gateway registered this guest; the first one's words.
    #[error("no gateway registers this guest: {0}")]
    Refused(#[source] RpcCallError),
    /// A gateway's answer cannot become a configuration.
    #[error("{url}: {error}")]
    Answer {
        /// The gateway.
        url: String,
        /// What is wrong.
        error: AnswerError,
    },
    /// The system gives no randomness.
    #[error("the system gives no randomness")]
    Randomness,
}

/// What is to be refreshed, and where.
pub struct Refresh<'a> {
    /// Where setup worked.
    pub work_dir: &'a Path,
    /// The interface's configuration.
    pub config: &'a Path,
    /// The interface's key.
    pub key: &'a Path,
    /// Write the configuration also where it is the same.
    pub force: bool,
    /// dstack listeners of the KMS, instead of the one that the keys file names.
    pub dstack_urls: &'a [NodeUrl],
    /// The way to all servers.
    pub route: &'a Route,
    /// The clock.
    pub now: &'a Now,
    /// Asks the device.
    pub evidence_of: &'a EvidenceOf,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refreshed {
    /// The document enables no gateway.
    Disabled,
    /// Registered; the configuration is the same as before and was not written.
    Same,
    /// Registered, and the configuration was written: the interface is to be brought up anew.
    Written(PathBuf),
}

/// Members of app-compose.json that matter here.
#[derive(Default, Deserialize)]
struct Enabled {
    #[serde(default)]
    gateway_enabled: Option<bool>,
    #[serde(default)]
    tproxy_enabled: Option<bool>,
}

/// Registers with the first gateway that takes this guest.
///
/// # Errors
/// [`GatewayError`].
pub async fn refresh(refresh: &Refresh<'_>) -> Result<Refreshed, GatewayError> {
    let folder = refresh.work_dir.join(FOLDER);
    let document = |name, reason: String| GatewayError::Document { name, reason };
    let compose = files::read(&folder.join(APP_COMPOSE.name), APP_COMPOSE.limit_bytes)?;
    let enabled: Enabled = files::json_object(&compose).map_err(|error| document(APP_COMPOSE.name, error.to_string()))?;
    if enabled.gateway_enabled.or(enabled.tproxy_enabled) != Some(true) {
        return Ok(Refreshed::Disabled);
    }
    let config = files::read(&folder.join(SYS_CONFIG.name), SYS_CONFIG.limit_bytes)?;
    let config = SysConfig::parse(&config).map_err(|error| document(SYS_CONFIG.name, error.to_string()))?;
    let keys = SecretBytes::take(files::read(&folder.join(APP_KEYS), DOCUMENT_BYTES_MAX)?);
    let keys = AppKeys::parse(&keys).map_err(|reason| document(APP_KEYS, reason))?;
    let gateways = config.gateway_urls.iter().map(|url| base_of(url).parse::<NodeUrl>()).collect::<Result<Vec<_>, _>>()?;
    if gateways.is_empty() {
        return Err(GatewayError::NoUrls);
    }
    let signers = signers(refresh, &keys)?;
    if keys.gateway_app_id.is_empty() {
        return Err(GatewayError::NoAppId);
    }
    for file in [refresh.key, refresh.config] {
        files::make_folder_of(file)?;
    }
    let certified = certificate::certified(refresh, &keys, &signers, &config.vm_config).await?;
    let key = Key::kept(refresh.key)?;

    let trust = ServerTrust::App { root: &keys.ca_cert, app_ids: &keys.gateway_app_id };
    let client = certified.key.expose(|key| RpcClient::with_chain(trust, &certified.chain, key, refresh.now))?;
    let (url, answer) = register(refresh, &client, &gateways, &key).await?;
    let text = wireguard::configuration(&key, answer).map_err(|error| GatewayError::Answer { url: url.to_string(), error })?;
    let is_same = match files::read_if_there(refresh.config, wireguard::CONFIG_BYTES_MAX) {
        Ok(Some(there)) => text == SecretBytes::take(there),
        _ => false,
    };
    if is_same && !refresh.force {
        return Ok(Refreshed::Same);
    }
    text.expose(|text| files::write(refresh.config, text, 0o600))?;
    Ok(Refreshed::Written(refresh.config.to_owned()))
}

/// Who signs the app's certificate.
fn signers(refresh: &Refresh<'_>, keys: &AppKeys) -> Result<Vec<NodeUrl>, GatewayError> {
    let ProviderKeys::Kms { url, tmp_ca_key, .. } = &keys.key_provider else { return Err(GatewayError::Provider) };
    match refresh.dstack_urls {
        [] if tmp_ca_key.is_empty() => Err(GatewayError::NoListener),
        [] => Ok(vec![base_of(url).parse()?]),
        named => Ok(named.to_vec()),
    }
}

/// The first gateway's answer; else the first one's refusal, as dstack reports it.
async fn register<'a>(
    refresh: &Refresh<'_>,
    client: &RpcClient,
    gateways: &'a [NodeUrl],
    key: &Key,
) -> Result<(&'a NodeUrl, RegisterCvmResponse), GatewayError> {
    let request = RegisterCvmRequest { client_public_key: key.public() };
    let mut first = None;
    for url in gateways {
        match ask(refresh.route, client, url, "RegisterCvm", &request, TIMEOUT).await {
            Ok(answer) => return Ok((url, answer)),
            Err(error) => {
                tracing::warn!(gateway = %url, reason = %error, "this gateway did not register the guest");
                first.get_or_insert(error);
            }
        }
    }
    Err(first.map_or(GatewayError::NoUrls, GatewayError::Refused))
}
