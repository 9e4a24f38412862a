//! From the compose file to a guest with keys. Owns: the order of the steps at start, the instance seed, the keys in locked memory.
//! Never: goes on with a compose file that is not the measured one, or with a key whose check value differs.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use dstack_client::{EvidenceOf, KcvStore, KmsClient, Pin, ReleasedKeys};
use dstack_protocol::release::{KeyClass, Wish};
use dstack_ratls::Now;
use dstack_secret::Locked;
use dstack_tee::software::protocol::{HexArray, HexBytes};
use dstack_tee::{Boot, Device, KeyProvider, Opened, TeeError};
use serde::Deserialize;

use crate::config::Config;
use crate::identity::Identity;

/// File of check values in the state directory.
pub const KCV_FILE: &str = "kcv.json";
/// File of the instance seed in the state directory.
pub const SEED_FILE: &str = "instance-seed";

/// A guest that has its keys.
#[derive(Debug)]
pub struct Guest {
    /// Makes evidence and quotes of this guest.
    pub device: Opened,
    /// What the evidence says.
    pub identity: Identity,
    /// app-compose.json, the very text.
    pub compose: String,
    /// Member `name` of it.
    pub app_name: String,
    /// What the cluster is known by.
    pub pin: Pin,
    /// Keys by class.
    pub keys: AppKeys,
    /// Whether a software root is trusted, or the device is one.
    pub is_software: bool,
}

/// The app's keys, in locked memory for as long as the agent runs.
#[derive(Debug, Default)]
pub struct AppKeys {
    /// Of the instance's disk.
    pub disk: Option<Locked<32>>,
    /// X25519 key of the encrypted environment.
    pub env: Option<Locked<32>>,
    /// secp256k1 app key, from which `GetKey` derives.
    pub k256: Option<Locked<32>>,
    /// P-256 key of the app CA.
    pub p256: Option<Locked<32>>,
}

impl AppKeys {
    /// Moves released keys into locked memory.
    #[must_use]
    pub fn of(released: ReleasedKeys) -> Self {
        let mut keys = Self::default();
        for key in released.keys {
            let place = match key.class() {
                KeyClass::Disk => &mut keys.disk,
                KeyClass::Env => &mut keys.env,
                KeyClass::K256 => &mut keys.k256,
                KeyClass::P256 => &mut keys.p256,
                // Not fetched at start: applications name their paths later.
                KeyClass::Custom => continue,
            };
            let locked = Locked::new(key.into_bytes());
            for warning in locked.warnings() {
                tracing::warn!(reason = %warning, "a key is less protected than it could be");
            }
            *place = Some(locked);
        }
        keys
    }

    /// Names of the keys held.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        let held = [(KeyClass::Disk, &self.disk), (KeyClass::Env, &self.env), (KeyClass::K256, &self.k256), (KeyClass::P256, &self.p256)];
        held.iter().filter(|(_, key)| key.is_some()).map(|(class, _)| class.name()).collect()
    }
}

/// What the agent reads of app-compose.json beside the pin.
#[derive(Debug, Default, Deserialize)]
struct ComposeFacts {
    #[serde(default)]
    name: String,
    #[serde(default)]
    no_instance_id: bool,
}

/// Boots the guest and fetches its keys.
///
/// # Errors
/// What failed and what to do; a refusal of the cluster in its own words.
pub async fn start(config: &Config, now: Now) -> anyhow::Result<Guest> {
    let bytes = fs::read(&config.app_compose).with_context(|| format!("cannot read the compose file {}", config.app_compose.display()))?;
    let pin = Pin::of_compose(&bytes).with_context(|| format!("no pin in {}", config.app_compose.display()))?;
    let compose = String::from_utf8(bytes).context("the compose file is not UTF-8")?;
    let facts: ComposeFacts = serde_json::from_str(&compose).context("the compose file is no app-compose.json")?;
    prepare(&config.state_dir).with_context(|| format!("cannot use the state directory {}", config.state_dir.display()))?;

    let boot = Boot {
        compose: HexBytes(compose.clone().into_bytes()),
        app_id: config.app_id.map(HexArray),
        instance_seed: if facts.no_instance_id { None } else { Some(HexBytes(instance_seed(config)?)) },
        key_provider: Some(KeyProvider { name: "kms".to_owned(), id: pin.cluster_id.to_string() }),
    };
    let text = config.device.clone();
    // The device blocks.
    let (device, evidence) = tokio::task::spawn_blocking(move || measured(&text, boot)).await.context("the device's thread failed")??;
    let identity = Identity::of_evidence(&evidence, compose.as_bytes())?;
    let is_software = device.is_software() || !config.trust.software_roots.is_empty();
    tracing::info!(
        app_id = %identity.app_id,
        instance_id = hex::encode(&identity.instance_id),
        platform = identity.platform.name(),
        software = is_software,
        "guest measured"
    );

    let evidence_of: EvidenceOf = {
        let device = Arc::clone(&device);
        Arc::new(move |report_data| device.evidence(report_data).map_err(|error| error.to_string()))
    };
    let judge = config.trust.judge().context("cannot judge the evidence of nodes")?;
    let kcvs = KcvStore::new(config.state_dir.join(KCV_FILE));
    let client = KmsClient::new(pin, config.kms_urls.clone(), config.settings, judge, now, evidence_of, Some(kcvs))?;
    let wishes = wishes(&config.key_classes, &identity)?;
    let released = client.release(&identity.app_id, &wishes).await.context("the cluster releases no keys to this guest")?;
    let keys = AppKeys::of(released);
    tracing::info!(app_id = %identity.app_id, keys = keys.names().join(","), "keys held");
    Ok(Guest { device, identity, compose, app_name: facts.name, pin, keys, is_software })
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

/// The seed of the configuration, or the one made at the first start.
fn instance_seed(config: &Config) -> anyhow::Result<Vec<u8>> {
    if let Some(seed) = &config.instance_seed {
        return Ok(seed.clone());
    }
    let file = config.state_dir.join(SEED_FILE);
    let shown = file.display();
    match fs::read_to_string(&file) {
        Ok(text) => match hex::decode(text.trim()) {
            Ok(seed) if seed.len() == 32 => Ok(seed),
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
                fs::File::open(&config.state_dir)?.sync_all()
            };
            write().with_context(|| format!("cannot keep the instance seed in {shown}"))?;
            Ok(seed.to_vec())
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {shown}")),
    }
}
