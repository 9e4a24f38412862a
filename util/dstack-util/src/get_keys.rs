//! `get-keys`: boots or measures this machine, asks for its keys. Owns: the order of the steps, the choice between the cluster's own release
//! (mode C) and dstack's protocol (mode L). Never: asks in the name of an app that the evidence does not name.
//! Source: util and deploy reference §2; architecture.md §4.

use std::fs;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use dstack_attest::wire::{Attestation, PlatformEvidence};
use dstack_client::{ClientError, EvidenceOf, KcvStore, KmsClient, Pin, PinError};
use dstack_protocol::codec::sha256;
use dstack_protocol::release::{KeyClass, Wish};
use dstack_protocol::{AppId, Platform};
use dstack_ratls::Now;
use dstack_tee::software::protocol::{HexArray, HexBytes};
use dstack_tee::{Boot, Opened, TeeError};

use crate::app_keys::AppKeys;
use crate::config::{Config, Mode};
use crate::dstack_kms::{self, Answered, DstackKmsError, Question};
use crate::machine::Machine;
use crate::published::Published;

/// Exit statuses, as `--help` lists them.
pub mod exit {
    /// Settings, files or the device are at fault.
    pub const FAILED: u8 = 1;
    /// The cluster refuses; trying again changes nothing.
    pub const REFUSED: u8 = 3;
    /// No node served the request; try again later.
    pub const UNAVAILABLE: u8 = 4;
    /// A key differs from the one used before, or holders lied.
    pub const WRONG_KEY: u8 = 5;
}

/// The exit status of an error.
#[must_use]
pub fn status(error: &anyhow::Error) -> u8 {
    if let Some(error) = error.downcast_ref::<DstackKmsError>() {
        return match error {
            error if error.retryable() => exit::UNAVAILABLE,
            error if error.is_refusal() => exit::REFUSED,
            _ => exit::FAILED,
        };
    }
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Kcv(_) | ClientError::Partials { .. } | ClientError::Key(_)) => exit::WRONG_KEY,
        Some(error) if error.retryable() => exit::UNAVAILABLE,
        Some(ClientError::Refused { .. }) => exit::REFUSED,
        _ => exit::FAILED,
    }
}

/// Fetches the keys.
///
/// # Errors
/// What failed; [`status`] tells kinds apart.
pub async fn run(config: &Config, now: Now) -> anyhow::Result<AppKeys> {
    let read = |file: &std::path::PathBuf| fs::read(file).with_context(|| format!("cannot read {}", file.display()));
    let compose = config.compose.as_ref().map(read).transpose()?;
    match mode_of(config, compose.as_deref())? {
        (Mode::Native, Some(pin)) => native(config, now, compose.unwrap_or_default(), pin).await,
        _ => dstack(config, now, compose).await,
    }
}

/// The mode that is named; else native where the compose file pins our cluster.
fn mode_of(config: &Config, compose: Option<&[u8]>) -> anyhow::Result<(Mode, Option<Pin>)> {
    let shown = || config.compose.as_ref().map(|file| file.display().to_string()).unwrap_or_default();
    match (config.mode, compose) {
        (Some(Mode::Dstack), _) | (None, None) => Ok((Mode::Dstack, None)),
        (Some(Mode::Native), None) => bail!("mode native needs --compose: the measured file whose member dstack_kms pins the cluster"),
        (wished, Some(compose)) => match Pin::of_compose(compose) {
            Ok(pin) => Ok((Mode::Native, Some(pin))),
            Err(PinError::Missing) if wished.is_none() => Ok((Mode::Dstack, None)),
            Err(error) => Err(error).with_context(|| format!("no pin in {}", shown())),
        },
    }
}

async fn native(config: &Config, now: Now, compose: Vec<u8>, pin: Pin) -> anyhow::Result<AppKeys> {
    let (text, events, app_id) = (config.device.clone(), config.events.clone(), config.app_id);
    // The device blocks.
    let measured = tokio::task::spawn_blocking(move || Own::measure(text.as_deref(), events, compose, app_id)).await;
    let own = measured.context("the device's thread failed")??;
    tracing::info!(app_id = %own.app_id, platform = own.device.platform().name(), software = own.device.is_software(), "machine measured");
    if let Some(wanted) = config.app_id.filter(|wanted| *wanted != own.app_id) {
        bail!("the evidence names app {}, --app-id is {wanted}", own.app_id);
    }
    let evidence_of = evidence_of(&own.device);
    let kcvs = config.kcv_file.as_ref().map(KcvStore::new);
    let judge = config.trust.judge().context("cannot judge the evidence of nodes")?;
    let client = KmsClient::new(pin, config.kms_urls.clone(), config.settings, judge, now, evidence_of, kcvs)?.by(config.route.clone());
    let wish = |class: &KeyClass| Wish::new(*class, if *class == KeyClass::Disk { own.instance_id.clone() } else { Vec::new() });
    let wishes: Vec<Wish> = config.key_classes.iter().map(wish).collect::<Result<_, _>>()?;
    let released = client.release(&own.app_id, &wishes).await?;
    let url = config.kms_urls.first().map(ToString::to_string).unwrap_or_default();
    let published = Published::of(&client, &own.app_id, &released.keys).await;
    Ok(AppKeys::released(&released.keys, &url, published))
}

/// dstack's way. The id of an enclave's app is its claim; elsewhere the measured one counts and `--app-id` is not looked at, as in dstack.
async fn dstack(config: &Config, now: Now, compose: Option<Vec<u8>>) -> anyhow::Result<AppKeys> {
    let (text, events, app_id) = (config.device.clone(), config.events.clone(), config.app_id);
    let opened = tokio::task::spawn_blocking(move || open(text.as_deref(), events, compose, app_id)).await;
    let device = opened.context("the device's thread failed")??;
    let root_ca = match &config.root_ca {
        None => None,
        Some(file) => Some(fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?),
    };
    let evidence_of = evidence_of(&device);
    let question = Question {
        urls: &config.kms_urls,
        route: &config.route,
        settings: config.settings,
        now: &now,
        root_ca: root_ca.as_deref(),
        vm_config: "",
        evidence_of: &evidence_of,
    };
    let Answered { keys, root_spki, .. } = dstack_kms::fetch(&question).await?;
    tracing::info!(key_provider_id = hex::encode(root_spki), "this KMS's id, for key_provider_id in app-compose.json");
    Ok(keys)
}

fn evidence_of(device: &Opened) -> EvidenceOf {
    let device = Arc::clone(device);
    Arc::new(move |report_data| device.evidence(report_data).map_err(|error| error.to_string()))
}

/// Opens the device; boots an emulated guest from its compose file, tells an enclave's which app it claims.
fn open(
    device: Option<&str>,
    events: Option<std::path::PathBuf>,
    compose: Option<Vec<u8>>,
    app_id: Option<AppId>,
) -> anyhow::Result<Opened> {
    let machine = Machine::open(device, events.as_deref())?;
    let device = Arc::clone(machine.device());
    let is_booted = events.is_some() && device.is_software();
    let claims = device.platform() == Platform::Nitro && app_id.is_some();
    if !is_booted && (compose.is_some() || claims) {
        let app_id = app_id.map(|id| HexArray(id.0));
        let boot = Boot { compose: HexBytes(compose.unwrap_or_default()), app_id, instance_seed: None, key_provider: None };
        match device.boot_app(boot) {
            // Hardware: this program is part of what was measured.
            Ok(_) | Err(TeeError::NoGuests) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(device)
}

/// What this machine's evidence says.
struct Own {
    device: Opened,
    app_id: AppId,
    /// Empty in an enclave: all enclaves of an app share its disk key.
    instance_id: Vec<u8>,
}

impl Own {
    fn measure(text: Option<&str>, events: Option<std::path::PathBuf>, compose: Vec<u8>, app_id: Option<AppId>) -> anyhow::Result<Self> {
        let file = sha256(&[&compose]);
        let device = open(text, events, Some(compose), app_id)?;
        let attestation = Attestation::decode(&device.evidence([0; 64])?).context("own evidence does not decode")?;
        let payload =
            |name: &str| attestation.runtime_events.iter().find(|event| event.event == name).map(|event| event.payload.as_slice());
        let is_td = matches!(attestation.platform, PlatformEvidence::Tdx(_) | PlatformEvidence::GcpTdx(..));
        // threshold.md §1.6: a pin counts because it is measured. In an enclave the file is part of the image.
        if is_td && payload("compose-hash") != Some(&file) {
            bail!("the compose file is not the measured one");
        }
        let app_id =
            payload("app-id").and_then(|bytes| <[u8; 20]>::try_from(bytes).ok()).context("own evidence names no app: give --app-id")?;
        let instance_id = payload("instance-id").unwrap_or_default().to_vec();
        Ok(Self { device, app_id: AppId(app_id), instance_id })
    }
}
