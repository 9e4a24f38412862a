//! What the guest says of itself. Owns: `AppInfo` and its v1 form, the certificate shown in it, what strangers may read of it.
//! Never: proves anything; relying parties ask for evidence.
//! Source: guest API reference §3.6, §7 (`Info`), §15.3.

use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use dstack_attest::wire::CertificateConfig;
use dstack_prpc::guest::{AppInfo, WorkerVersion};
use dstack_prpc::guest_v1::InfoResponse;
use serde_json::{Value, json};

use crate::certify::{Authority, certify, fresh_scalar};
use crate::guest::Guest;
use crate::identity::TdMeasurements;

/// SHA-256 of nothing: what dstack says as `device_id`, for nothing of it is verified here.
const DEVICE_ID: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
/// Pause between tries for the shown certificate, ms.
const APP_CERT_PAUSE_MS: u64 = 60_000;

/// The same in bytes.
#[must_use]
pub fn device_id() -> Vec<u8> {
    hex::decode(DEVICE_ID).unwrap_or_default()
}

/// Who reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// The app itself.
    App,
    /// Anybody who reaches the external port: as much as the compose file makes public.
    Stranger,
}

impl Reader {
    fn may_read_tcb(self, guest: &Guest) -> bool {
        self == Self::App || guest.facts.public_tcbinfo
    }
}

/// Of the agent.
#[must_use]
pub fn version() -> WorkerVersion {
    WorkerVersion { version: env!("CARGO_PKG_VERSION").to_owned(), rev: option_env!("DSTACK_BUILD_REV").unwrap_or("").to_owned() }
}

/// `Info` of v0.
///
/// # Errors
/// The device's.
pub async fn app_info(guest: &Arc<Guest>, reader: Reader) -> Result<AppInfo, dstack_tee::TeeError> {
    let own = &guest.identity;
    let shows = reader.may_read_tcb(guest);
    let tcb_info = if shows { tcb_info(guest).await? } else { String::new() };
    let (cloud_vendor, cloud_product) = cloud(guest.device.is_software()).await;
    Ok(AppInfo {
        app_id: own.app_id.0.to_vec(),
        instance_id: own.instance_id.clone(),
        app_cert: app_cert(guest),
        tcb_info,
        app_name: guest.facts.name.clone(),
        device_id: device_id(),
        mr_aggregated: own.mr_aggregated.clone(),
        os_image_hash: own.os_image_hash.clone(),
        key_provider_info: guest.key_provider_info(),
        compose_hash: own.compose_hash.clone(),
        vm_config: if shows { guest.vm_config.clone() } else { String::new() },
        cloud_vendor,
        cloud_product,
    })
}

/// `Info` of v1.
pub async fn info_v1(guest: &Arc<Guest>, reader: Reader) -> InfoResponse {
    let own = &guest.identity;
    let shown = |text: String| if reader.may_read_tcb(guest) { text } else { String::new() };
    let (cloud_vendor, cloud_product) = cloud(guest.device.is_software()).await;
    InfoResponse {
        app_id: own.app_id.0.to_vec(),
        app_name: guest.facts.name.clone(),
        compose_hash: own.compose_hash.clone(),
        app_compose: shown(guest.compose.clone()),
        instance_id: own.instance_id.clone(),
        device_id: device_id(),
        os_image_hash: own.os_image_hash.clone(),
        mr_aggregated: own.mr_aggregated.clone(),
        vm_config: shown(guest.vm_config.clone()),
        key_provider_info: shown(guest.key_provider_info()),
        cloud_vendor,
        cloud_product,
    }
}

/// Registers, hashes, log and compose file, as pretty JSON text.
///
/// # Errors
/// The device's.
pub async fn tcb_info(guest: &Arc<Guest>) -> Result<String, dstack_tee::TeeError> {
    let own = &guest.identity;
    let quote = guest.quote([0; 64]).await?;
    let event_log: Vec<Value> = serde_json::from_str(&quote.event_log).unwrap_or_default();
    // Strings also where there is no TD report: SDKs read these members strictly (reference §15.3).
    let register = |read: fn(&TdMeasurements) -> &[u8; 48]| own.td.as_ref().map_or_else(String::new, |td| hex::encode(read(td)));
    let tcb_info = json!({
        "mrtd": register(|td| &td.mrtd),
        "rtmr0": register(|td| { let [rtmr, ..] = &td.rtmr; rtmr }),
        "rtmr1": register(|td| { let [_, rtmr, ..] = &td.rtmr; rtmr }),
        "rtmr2": register(|td| { let [_, _, rtmr, _] = &td.rtmr; rtmr }),
        "rtmr3": register(|td| { let [.., rtmr] = &td.rtmr; rtmr }),
        "mr_aggregated": hex::encode(&own.mr_aggregated),
        "os_image_hash": hex::encode(&own.os_image_hash),
        "compose_hash": hex::encode(&own.compose_hash),
        "device_id": DEVICE_ID,
        "event_log": event_log,
        "app_compose": guest.compose,
    });
    Ok(format!("{tcb_info:#}"))
}

/// The certificate shown, or nothing until there is one. The first reader has it made, in the background.
pub fn app_cert(guest: &Arc<Guest>) -> String {
    let shown = guest.app_cert.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if !shown.is_empty() || matches!(guest.authority, Authority::None(_)) {
        return shown;
    }
    let (now_ms, tried) = ((guest.now.0)().0, guest.app_cert_tried.load(Ordering::Acquire));
    let is_due = tried == 0 || now_ms.abs_diff(tried) >= APP_CERT_PAUSE_MS;
    if is_due && guest.app_cert_tried.compare_exchange(tried, now_ms.max(1), Ordering::AcqRel, Ordering::Acquire).is_ok() {
        let guest = Arc::clone(guest);
        tokio::spawn(async move {
            let made = async {
                let config = CertificateConfig {
                    subject: "demo-cert".to_owned(),
                    usage_server_auth: true,
                    usage_client_auth: true,
                    ext_quote: true,
                    ..CertificateConfig::default()
                };
                certify(&guest, &fresh_scalar()?, config).await
            };
            match made.await {
                Ok(certified) => *guest.app_cert.lock().unwrap_or_else(PoisonError::into_inner) = certified.chain.join("\n"),
                Err(error) => tracing::warn!(reason = %error, "no certificate to show"),
            }
        });
    }
    shown
}

/// What the firmware says of the machine; of an emulated one, that it is one.
async fn cloud(is_software: bool) -> (String, String) {
    if is_software {
        return (String::new(), "software TEE, no hardware".to_owned());
    }
    let read = async |name: &str| {
        let text = tokio::fs::read_to_string(format!("/sys/class/dmi/id/{name}")).await.unwrap_or_default();
        text.trim().chars().take(128).collect::<String>()
    };
    (read("sys_vendor").await, read("product_name").await)
}
