//! `get-keys`: boots or measures this machine, asks for its keys. Owns: the order of the steps.
//! Never: asks in the name of an app that the evidence does not name.

use std::fs;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use dstack_attest::wire::{Attestation, PlatformEvidence};
use dstack_client::{ClientError, EvidenceOf, KcvStore, KmsClient, Pin, ReleasedKeys};
use dstack_protocol::AppId;
use dstack_protocol::codec::sha256;
use dstack_protocol::release::{KeyClass, Wish};
use dstack_ratls::Now;
use dstack_tee::software::protocol::{HexArray, HexBytes};
use dstack_tee::{Boot, Opened, TeeError};

use crate::config::Config;

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
pub async fn run(config: &Config, now: Now) -> anyhow::Result<ReleasedKeys> {
    let compose = fs::read(&config.compose).with_context(|| format!("cannot read {}", config.compose.display()))?;
    let pin = Pin::of_compose(&compose).with_context(|| format!("no pin in {}", config.compose.display()))?;
    let (text, app_id) = (config.device.clone(), config.app_id);
    // The device blocks.
    let own = tokio::task::spawn_blocking(move || Own::measure(&text, compose, app_id)).await.context("the device's thread failed")??;
    tracing::info!(app_id = %own.app_id, platform = own.device.platform().name(), software = own.device.is_software(), "machine measured");
    if let Some(wanted) = config.app_id.filter(|wanted| *wanted != own.app_id) {
        bail!("the evidence names app {}, --app-id is {wanted}", own.app_id);
    }
    let device = Arc::clone(&own.device);
    let evidence_of: EvidenceOf = Arc::new(move |report_data| device.evidence(report_data).map_err(|error| error.to_string()));
    let kcvs = config.kcv_file.as_ref().map(KcvStore::new);
    let judge = config.trust.judge().context("cannot judge the evidence of nodes")?;
    let client = KmsClient::new(pin, config.kms_urls.clone(), config.settings, judge, now, evidence_of, kcvs)?.by(config.route.clone());
    let wish = |class: &KeyClass| Wish::new(*class, if *class == KeyClass::Disk { own.instance_id.clone() } else { Vec::new() });
    let wishes: Vec<Wish> = config.key_classes.iter().map(wish).collect::<Result<_, _>>()?;
    Ok(client.release(&own.app_id, &wishes).await?)
}

/// What this machine's evidence says.
struct Own {
    device: Opened,
    app_id: AppId,
    /// Empty in an enclave: all enclaves of an app share its disk key.
    instance_id: Vec<u8>,
}

impl Own {
    fn measure(text: &str, compose: Vec<u8>, app_id: Option<AppId>) -> anyhow::Result<Self> {
        let device = dstack_tee::open(text)?;
        let file = sha256(&[&compose]);
        let boot = Boot { compose: HexBytes(compose), app_id: app_id.map(|id| HexArray(id.0)), instance_seed: None, key_provider: None };
        match device.boot_app(boot) {
            // Hardware: this program is part of what was measured.
            Ok(_) | Err(TeeError::NoGuests) => {}
            Err(error) => return Err(error.into()),
        }
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
