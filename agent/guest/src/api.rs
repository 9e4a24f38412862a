//! Methods of dstack's guest API, v0 (frozen at the shape of 0.5.11). Owns: their arguments and answers as JSON values.
//! Never: transport; keys in a log. Source: guest API reference §3, §10, §15.
//!
//! Empty until the cluster has the roots `ca` and `id`: `app_cert`, and the second element of `signature_chain`.

use std::sync::Arc;

use dstack_attest::AttestError;
use dstack_attest::wire::TdxEvent;
use dstack_protocol::Platform;
use dstack_tee::TeeError;
use serde_json::{Map, Value, json};

use crate::app_key::{Algorithm, AppKeyError, derive};
use crate::boot::Guest;
use crate::identity::stripped_log;

/// SHA-256 of nothing: what dstack says as `device_id`, for nothing of it is verified here.
const DEVICE_ID: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// Methods served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// What runs here.
    Info,
    /// A key by path.
    GetKey,
    /// A quote over the caller's bytes.
    GetQuote,
    /// A versioned attestation over the caller's bytes.
    Attest,
    /// Of the agent.
    Version,
}

impl Method {
    /// All methods.
    pub const ALL: [Self; 5] = [Self::Info, Self::GetKey, Self::GetQuote, Self::Attest, Self::Version];

    /// Its name, exact in case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Info => "Info",
            Self::GetKey => "GetKey",
            Self::GetQuote => "GetQuote",
            Self::Attest => "Attest",
            Self::Version => "Version",
        }
    }

    /// The method of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }
}

/// Why a method has no answer. Its text is what the caller sees.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// An argument is of another type. Caller's fault.
    #[error("{field}: expected {expected}")]
    Argument {
        /// Its name.
        field: &'static str,
        /// What it may be.
        expected: &'static str,
    },
    /// More than 64 bytes of report data. Caller's fault.
    #[error("Report data is too long")]
    ReportData,
    /// The key cannot be derived. Caller's fault.
    #[error(transparent)]
    Key(#[from] AppKeyError),
    /// The app key was not fetched. The configuration's fault.
    #[error("the k256 key is not held: add it to key_classes")]
    NoAppKey,
    /// The device failed. Not the caller's fault: retry.
    #[error(transparent)]
    Device(#[from] TeeError),
    /// The device's event log is none. Not the caller's fault.
    #[error("event log of the device: {0}")]
    EventLog(AttestError),
    /// The device's thread failed. Our bug.
    #[error("internal error")]
    Internal,
}

/// Arguments by name; unknown ones are ignored, missing ones are their type's default.
pub type Arguments = Map<String, Value>;

/// Answers a method.
///
/// # Errors
/// [`ApiError`].
pub async fn answer(guest: &Arc<Guest>, method: Method, arguments: &Arguments) -> Result<Value, ApiError> {
    match method {
        Method::Info => info(guest).await,
        Method::GetKey => key(guest, arguments),
        Method::GetQuote => quote(guest, report_data(arguments)?).await,
        Method::Attest => Ok(json!({ "attestation": hex::encode(evidence(guest, report_data(arguments)?).await?) })),
        Method::Version => Ok(json!({ "version": env!("CARGO_PKG_VERSION"), "rev": option_env!("DSTACK_BUILD_REV").unwrap_or("") })),
    }
}

async fn info(guest: &Arc<Guest>) -> Result<Value, ApiError> {
    let own = &guest.identity;
    let quote = on_device(guest, |guest| Ok(guest.device.quote([0; 64])?)).await?;
    let event_log: Vec<Value> = serde_json::from_str(&quote.event_log).unwrap_or_default();
    // Strings also where there is no TD report: SDKs read these members strictly (reference §15.3).
    let register =
        |read: fn(&crate::identity::TdMeasurements) -> &[u8; 48]| own.td.as_ref().map_or_else(String::new, |td| hex::encode(read(td)));
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
    let (cloud_vendor, cloud_product) = cloud(guest.device.is_software()).await;
    Ok(json!({
        "app_id": own.app_id.to_string(),
        "instance_id": hex::encode(&own.instance_id),
        "app_cert": "",
        "tcb_info": format!("{tcb_info:#}"),
        "app_name": guest.app_name,
        "device_id": DEVICE_ID,
        "mr_aggregated": hex::encode(&own.mr_aggregated),
        "os_image_hash": hex::encode(&own.os_image_hash),
        "key_provider_info": if own.key_provider.is_empty() { json!({ "name": "kms", "id": guest.pin.cluster_id.to_string() }).to_string() } else { own.key_provider.clone() },
        "compose_hash": hex::encode(&own.compose_hash),
        "vm_config": own.vm_config,
        "cloud_vendor": cloud_vendor,
        "cloud_product": cloud_product,
    }))
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

fn key(guest: &Guest, arguments: &Arguments) -> Result<Value, ApiError> {
    let app_key = guest.keys.k256.as_ref().ok_or(ApiError::NoAppKey)?;
    let algorithm = Algorithm::from_name(text(arguments, "algorithm")?)?;
    let derived = derive(app_key, text(arguments, "path")?, text(arguments, "purpose")?, algorithm)?;
    // The cluster's own signature over the app key needs root `id`: empty until it exists.
    Ok(json!({ "key": derived.key.expose(|key| hex::encode(key)), "signature_chain": [hex::encode(derived.signature), ""] }))
}

async fn quote(guest: &Arc<Guest>, report_data: [u8; 64]) -> Result<Value, ApiError> {
    if guest.identity.platform == Platform::Tdx || guest.identity.platform == Platform::GcpTdx {
        let quote = on_device(guest, move |guest| Ok(guest.device.quote(report_data)?)).await?;
        let event_log = stripped_log(&quote.event_log).map_err(ApiError::EventLog)?;
        return Ok(json!({
            "quote": hex::encode(&quote.quote),
            "event_log": event_log,
            "report_data": hex::encode(report_data),
            "vm_config": quote.vm_config,
        }));
    }
    let attestation = evidence(guest, report_data).await?;
    Ok(json!({
        "quote": "",
        "event_log": TdxEvent::log_to_json(&[]),
        "report_data": hex::encode(report_data),
        "vm_config": guest.identity.vm_config,
        "attestation": hex::encode(attestation),
    }))
}

async fn evidence(guest: &Arc<Guest>, report_data: [u8; 64]) -> Result<Vec<u8>, ApiError> {
    on_device(guest, move |guest| Ok(guest.device.evidence(report_data)?)).await
}

/// Devices block: a thread of its own.
async fn on_device<T: Send + 'static>(
    guest: &Arc<Guest>,
    call: impl FnOnce(&Guest) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let guest = Arc::clone(guest);
    tokio::task::spawn_blocking(move || call(&guest)).await.unwrap_or(Err(ApiError::Internal))
}

/// At most 64 bytes of hex, zeros to the right.
fn report_data(arguments: &Arguments) -> Result<[u8; 64], ApiError> {
    let mut digits = text(arguments, "report_data")?;
    while let Some(rest) = digits.strip_prefix("0x") {
        digits = rest;
    }
    let bytes = hex::decode(digits).map_err(|_| ApiError::Argument { field: "report_data", expected: "hex" })?;
    let mut report_data = [0; 64];
    report_data.get_mut(..bytes.len()).ok_or(ApiError::ReportData)?.copy_from_slice(&bytes);
    Ok(report_data)
}

fn text<'a>(arguments: &'a Arguments, field: &'static str) -> Result<&'a str, ApiError> {
    match arguments.get(field) {
        None | Some(Value::Null) => Ok(""),
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(ApiError::Argument { field, expected: "a string" }),
    }
}
