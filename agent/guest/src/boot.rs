//! From the compose file to a guest with keys. Owns: the order of the steps at start, the instance seed.
//! Never: goes on with a compose file that is not the measured one, or with a key whose check value differs.
//!
//! Keys come from the cluster (mode C) or from the file that `dstack-util setup` left at boot; all that follows is the same.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, bail};
use dstack_attest::x509ext::CertificateClaims;
use dstack_client::{CaPub, EvidenceOf, KcvStore, KmsClient, NodeUrl, Pin};
use dstack_protocol::release::{KeyClass, Wish};
use dstack_ratls::Now;
use dstack_tee::software::protocol::{HexArray, HexBytes};
use dstack_tee::{Boot, Device, KeyProvider, Opened, TeeError};
use serde::Deserialize;

use crate::certify::{Authority, KmsAuthority, KnownRoot, LocalAuthority, pem_der};
use crate::config::{Config, KeySource};
use crate::guest::{ComposeFacts, Guest, NowSource, Surroundings};
use crate::identity::Identity;
use crate::identity_signature;
use crate::keys::AppKeys;
use crate::keys_file::{KeysFile, Provider};

/// File of check values in the state directory.
pub const KCV_FILE: &str = "kcv.json";
/// File of the instance seed in the state directory.
pub const SEED_FILE: &str = "instance-seed";
/// Largest sys-config, bytes: dstack's own limit.
const SYS_CONFIG_BYTES_MAX: u64 = 32 * 1024;

/// Members of the host's `.sys-config.json` that matter here. It is not measured, so nothing is trusted for it.
#[derive(Debug, Default, Deserialize)]
struct SysConfig {
    #[serde(default)]
    vm_config: Option<String>,
    #[serde(default)]
    host_api_url: Option<String>,
}

/// Boots the guest and gets its keys.
///
/// # Errors
/// What failed and what to do; a refusal of the cluster in its own words.
pub async fn start(config: &Config, now: Now) -> anyhow::Result<Guest> {
    let shown = config.app_compose.display();
    let bytes = fs::read(&config.app_compose).with_context(|| format!("cannot read the compose file {shown}"))?;
    let sys_config = sys_config(config)?;
    match &config.keys {
        KeySource::Cluster { state_dir, .. } => {
            let pin = Pin::of_compose(&bytes).with_context(|| format!("no pin in {shown}"))?;
            prepare(state_dir).with_context(|| format!("cannot use the state directory {}", state_dir.display()))?;
            let provider = ("kms".to_owned(), pin.cluster_id.to_string());
            let booted = booted(config, bytes, &provider, &sys_config).await?;
            from_cluster(config, now, pin, booted, sys_config).await
        }
        KeySource::File { file, dstack_urls } => {
            let keys = KeysFile::read(file)?;
            let (name, id) = keys.key_provider.name_and_id();
            let provider = (name.to_owned(), id.to_owned());
            let booted = booted(config, bytes, &provider, &sys_config).await?;
            from_file(config, dstack_urls, now, keys, booted, sys_config)
        }
    }
}

/// A guest without keys.
struct Booted {
    device: Opened,
    identity: Identity,
    compose: String,
    facts: ComposeFacts,
    provider: (String, String),
    is_software: bool,
}

async fn booted(config: &Config, compose: Vec<u8>, provider: &(String, String), sys_config: &SysConfig) -> anyhow::Result<Booted> {
    let compose = String::from_utf8(compose).context("the compose file is not UTF-8")?;
    let facts: ComposeFacts = serde_json::from_str(&compose).context("the compose file is no app-compose.json")?;
    let boot = Boot {
        compose: HexBytes(compose.clone().into_bytes()),
        app_id: config.app_id.map(HexArray),
        instance_seed: if facts.no_instance_id { None } else { instance_seed(config)?.map(HexBytes) },
        key_provider: Some(KeyProvider { name: provider.0.clone(), id: provider.1.clone() }),
    };
    let text = config.device.clone();
    // The device blocks.
    let (device, evidence) = tokio::task::spawn_blocking(move || measured(&text, boot)).await.context("the device's thread failed")??;
    let identity = Identity::of_evidence(&evidence, compose.as_bytes(), sys_config.vm_config.as_deref().unwrap_or_default())?;
    let is_software = device.is_software() || !config.trust.software_roots.is_empty();
    tracing::info!(
        app_id = %identity.app_id,
        instance_id = hex::encode(&identity.instance_id),
        platform = identity.platform.name(),
        software = is_software,
        "guest measured"
    );
    Ok(Booted { device, identity, compose, facts, provider: provider.clone(), is_software })
}

async fn from_cluster(config: &Config, now: Now, pin: Pin, booted: Booted, sys_config: SysConfig) -> anyhow::Result<Guest> {
    let KeySource::Cluster { kms_urls, dstack_urls, state_dir } = &config.keys else { bail!("no cluster is configured") };
    let evidence_of: EvidenceOf = {
        let device = Arc::clone(&booted.device);
        Arc::new(move |report_data| device.evidence(report_data).map_err(|error| error.to_string()))
    };
    let judge = config.trust.judge().context("cannot judge the evidence of nodes")?;
    let kcvs = KcvStore::new(state_dir.join(KCV_FILE));
    let client =
        KmsClient::new(pin, kms_urls.clone(), config.settings, judge, Arc::clone(&now), evidence_of, Some(kcvs))?.by(config.route.clone());
    let wishes = wishes(&config.key_classes, &booted.identity)?;
    let released = client.release(&booted.identity.app_id, &wishes).await.context("the cluster releases no keys to this guest")?;
    let keys = AppKeys::of(released);
    identity_signature::first(&client, &booted.identity.app_id, &keys).await;
    let authority = if dstack_urls.is_empty() {
        Authority::None("set dstack_urls to the cluster's dstack listeners")
    } else {
        let root = pinned_root(pin.ca_pub.as_ref(), &booted.facts)?;
        Authority::Kms(KmsAuthority::new(dstack_urls.clone(), config.route.clone(), root, None))
    };
    Ok(assembled(config, now, booted, sys_config, keys, authority, Some((pin, client))))
}

/// SubjectPublicKeyInfo of the root CA: by our pin, else by dstack's.
fn pinned_root(ca_pub: Option<&CaPub>, facts: &ComposeFacts) -> anyhow::Result<Option<Vec<u8>>> {
    match ca_pub {
        Some(key) => key.spki().context("ca_pub of the pin is no public key").map(Some),
        None if facts.key_provider_id.is_empty() => Ok(None),
        None => {
            let id =
                hex::decode(facts.key_provider_id.trim_start_matches("0x")).context("key_provider_id of the compose file is not hex")?;
            Ok(Some(id))
        }
    }
}

fn from_file(
    config: &Config,
    named: &[NodeUrl],
    now: Now,
    mut file: KeysFile,
    booted: Booted,
    sys_config: SysConfig,
) -> anyhow::Result<Guest> {
    let keys = file.take_keys()?;
    let ca_cert = std::mem::take(&mut file.ca_cert);
    let authority = match file.key_provider {
        Provider::Kms { .. } if ca_cert.is_empty() => Authority::None("the keys file holds no CA certificate of the KMS"),
        // Mode C: the address is that of the cluster's own protocol, and its temp CA was not asked for.
        Provider::Kms { tmp_ca_key, tmp_ca_cert, .. } if tmp_ca_key.is_empty() && tmp_ca_cert.is_empty() && named.is_empty() => {
            Authority::None("the keys came by the cluster's own protocol: set dstack_urls to its dstack listeners")
        }
        Provider::Kms { url, pubkey, tmp_ca_key, tmp_ca_cert } => {
            let base = url.trim_end_matches('/');
            let base = base.strip_suffix("/prpc").unwrap_or(base);
            let urls = match named {
                [] => vec![base.parse::<NodeUrl>().with_context(|| format!("keys file: {base:?} is no address of a KMS"))?],
                named => named.to_vec(),
            };
            let spki =
                pem_der(&ca_cert).and_then(|der| CertificateClaims::read(&der).ok()).context("keys file: ca_cert is no certificate")?.spki;
            let pinned = hex::decode(pubkey).context("keys file: pubkey is not hex")?;
            if !pinned.is_empty() && pinned != spki {
                bail!("keys file: ca_cert is not of the key that pubkey names");
            }
            let temp_ca = (!tmp_ca_cert.is_empty() && !tmp_ca_key.is_empty()).then_some((tmp_ca_cert, tmp_ca_key));
            Authority::Kms(KmsAuthority::new(urls, config.route.clone(), Some(spki), Some(KnownRoot { ca_cert, temp_ca })))
        }
        Provider::None { key } | Provider::Local { key, .. } | Provider::Tpm { key, .. } => {
            Authority::Local(LocalAuthority::new(key.0, ca_cert).context("keys file")?)
        }
    };
    Ok(assembled(config, now, booted, sys_config, keys, authority, None))
}

fn assembled(
    config: &Config,
    now: Now,
    booted: Booted,
    sys_config: SysConfig,
    keys: AppKeys,
    authority: Authority,
    cluster: Option<(Pin, KmsClient)>,
) -> Guest {
    let Booted { device, identity, compose, facts, provider, is_software } = booted;
    tracing::info!(app_id = %identity.app_id, keys = keys.names().join(","), provider = provider.0, "keys held");
    let vm_config = sys_config.vm_config.filter(|text| !text.is_empty()).unwrap_or_else(|| identity.vm_config.clone());
    let surroundings = Surroundings { host_api_url: sys_config.host_api_url.unwrap_or_default(), ..config.surroundings.clone() };
    Guest {
        device,
        identity,
        compose,
        facts,
        vm_config,
        provider,
        cluster: cluster.as_ref().map(|(pin, _)| (pin.cluster_id, pin.generation)),
        client: cluster.map(|(_, client)| client),
        keys,
        authority,
        now: NowSource(now),
        surroundings,
        is_software,
        app_cert: Mutex::default(),
        app_cert_tried: AtomicU64::new(0),
    }
}

fn sys_config(config: &Config) -> anyhow::Result<SysConfig> {
    let Some(path) = &config.sys_config else { return Ok(SysConfig::default()) };
    let shown = path.display();
    let file = match fs::File::open(path) {
        Ok(file) => file,
        // An enclave has none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(SysConfig::default()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {shown}")),
    };
    let mut text = Vec::new();
    file.take(SYS_CONFIG_BYTES_MAX.saturating_add(1)).read_to_end(&mut text).with_context(|| format!("cannot read {shown}"))?;
    if u64::try_from(text.len()).is_ok_and(|length| length > SYS_CONFIG_BYTES_MAX) {
        bail!("{shown} has more than {SYS_CONFIG_BYTES_MAX} bytes");
    }
    serde_json::from_slice(&text).with_context(|| format!("{shown} is no sys-config"))
}

/// The disk key is that of the instance, the others are the app's (threshold.md §1.1).
fn wishes(classes: &[KeyClass], identity: &Identity) -> anyhow::Result<Vec<Wish>> {
    let of = |class: &KeyClass| Wish::new(*class, if *class == KeyClass::Disk { identity.instance_id.clone() } else { Vec::new() });
    Ok(classes.iter().map(of).collect::<Result<_, _>>()?)
}

fn measured(text: &str, boot: Boot) -> Result<(Opened, Vec<u8>), TeeError> {
    let device = dstack_tee::open(text)?;
    match device.boot_app(boot) {
        // Hardware: this program is part of the guest that was booted.
        Ok(_) | Err(TeeError::NoGuests) => {}
        Err(error) => return Err(error),
    }
    let evidence = Device::evidence(device.as_ref(), [0; 64])?;
    Ok((device, evidence))
}

fn prepare(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// The seed of the configuration, or the one made at the first start. With keys from a file the boot had its own.
fn instance_seed(config: &Config) -> anyhow::Result<Option<Vec<u8>>> {
    if let Some(seed) = &config.instance_seed {
        return Ok(Some(seed.clone()));
    }
    let KeySource::Cluster { state_dir, .. } = &config.keys else { return Ok(None) };
    let file = state_dir.join(SEED_FILE);
    let shown = file.display();
    match fs::read_to_string(&file) {
        Ok(text) => match hex::decode(text.trim()) {
            Ok(seed) if seed.len() == 32 => Ok(Some(seed)),
            _ => bail!("{shown} is no instance seed (64 hex digits): restore it, else the disk key is another"),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut seed = [0; 32];
            getrandom::fill(&mut seed).context("no randomness")?;
            let write = || -> io::Result<()> {
                // Whole or not at all: a torn seed would be another instance.
                let beside = file.with_extension("new");
                let _ = fs::remove_file(&beside);
                let mut out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
                out.write_all(hex::encode(seed).as_bytes())?;
                out.sync_all()?;
                fs::rename(&beside, &file)?;
                fs::File::open(state_dir)?.sync_all()
            };
            write().with_context(|| format!("cannot keep the instance seed in {shown}"))?;
            Ok(Some(seed.to_vec()))
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {shown}")),
    }
}
