//! `DstackGuest` v0: what each method does. Owns: their rules and error texts. Never: HTTP.
//! Source: guest API reference §3. Frozen; quirks are kept.

use std::sync::Arc;

use dstack_attest::AttestError;
use dstack_attest::wire::{CertificateConfig, TdxEvent};
use dstack_protocol::Platform;
use dstack_prpc::RpcError;
use dstack_prpc::guest::{
    AttestResponse, EmitEventArgs, GetKeyArgs, GetKeyResponse, GetQuoteResponse, GetTlsKeyArgs, GetTlsKeyResponse, GpuInfoResponse,
    RawQuoteArgs, SignRequest, SignResponse, VerifyRequest, VerifyResponse,
};
use dstack_secret::Locked;
use dstack_tee::{Quote, TeeError};

use crate::app_key::{Algorithm, AppKeyError, derive};
use crate::certify::{Certified, CertifyError, certify, fresh_scalar};
use crate::guest::Guest;
use crate::identity::stripped_log;
use crate::report_data::{ReportDataError, padded};
use crate::signing::{self, SigningError};

/// What `EmitEvent` answers, always.
pub const EMIT_EVENT_REMOVED: &str =
    "EmitEvent was removed in dstack 0.6.0; runtime RTMR3 events are system-owned and cannot be extended by apps";
/// What the boot found out of GPUs.
pub const GPU_ATTESTATION_FILE: &str = "/run/nvidia-gpu-attestation/attestation.out";
/// Largest part of it that is read, bytes.
const GPU_ATTESTATION_BYTES_MAX: u64 = 4 << 20;

/// Why a method has no answer. Its text is what the caller sees.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Report data that is none. Caller's fault.
    #[error(transparent)]
    ReportData(#[from] ReportDataError),
    /// The key cannot be derived. Caller's fault.
    #[error(transparent)]
    Key(#[from] AppKeyError),
    /// No signature, or no verdict. Caller's fault.
    #[error(transparent)]
    Signing(#[from] SigningError),
    /// No certificate; its own words.
    #[error(transparent)]
    Certify(#[from] CertifyError),
    /// The app key is not held. The configuration's fault.
    #[error("the k256 key is not held: add it to key_classes")]
    NoAppKey,
    /// Another argument is wrong. Caller's fault.
    #[error("{field}: expected {expected}")]
    Argument {
        /// Its name.
        field: &'static str,
        /// What it may be.
        expected: &'static str,
    },
    /// Not on this platform. Ask another method.
    #[error("{method} needs Intel TDX, this is {platform}: use Attest")]
    Platform {
        /// The method.
        method: &'static str,
        /// What it runs on.
        platform: &'static str,
    },
    /// Taken away for good.
    #[error("{}", EMIT_EVENT_REMOVED)]
    EmitEvent,
    /// The device failed. Not the caller's fault: retry.
    #[error(transparent)]
    Device(#[from] TeeError),
    /// The device's event log or evidence is none. Not the caller's fault.
    #[error("evidence of the device: {0}")]
    Evidence(#[from] AttestError),
    /// Something of the machine cannot be asked. Its words.
    #[error("{what}: {reason}")]
    Machine {
        /// What was asked.
        what: &'static str,
        /// Why there is no answer.
        reason: String,
    },
}

impl From<ApiError> for RpcError {
    fn from(error: ApiError) -> Self {
        Self::refused(error)
    }
}

/// The app key, which everything is derived from.
///
/// # Errors
/// [`ApiError::NoAppKey`].
pub(crate) fn app_key(guest: &Guest) -> Result<&Locked<32>, ApiError> {
    guest.keys.k256.as_ref().ok_or(ApiError::NoAppKey)
}

/// `GetTlsKey`, also `IssueCert`.
pub(crate) async fn tls_key(guest: &Arc<Guest>, args: GetTlsKeyArgs) -> Result<GetTlsKeyResponse, ApiError> {
    let config = CertificateConfig {
        org_name: None,
        subject: args.subject,
        alt_names: args.alt_names,
        usage_server_auth: args.usage_server_auth,
        usage_client_auth: args.usage_client_auth,
        ext_quote: args.usage_ra_tls,
        ext_app_info: args.with_app_info,
        not_before: args.not_before,
        not_after: args.not_after,
    };
    Ok(tls_key_response(certify(guest, &fresh_scalar()?, config).await?))
}

pub(crate) fn tls_key_response(certified: Certified) -> GetTlsKeyResponse {
    let mut response = GetTlsKeyResponse::default();
    response.key = certified.key.expose(|pem| String::from_utf8_lossy(pem).into_owned());
    response.certificate_chain = certified.chain;
    response
}

/// `GetKey`.
pub(crate) fn key(guest: &Guest, args: &GetKeyArgs) -> Result<GetKeyResponse, ApiError> {
    let derived = derive(app_key(guest)?, &args.path, &args.purpose, Algorithm::from_name(&args.algorithm)?)?;
    let mut response = GetKeyResponse::default();
    response.key = derived.key.expose(|key| key.to_vec());
    response.signature_chain = vec![derived.signature.to_vec(), guest.keys.identity_signature()];
    Ok(response)
}

/// `Sign`.
pub(crate) fn sign(guest: &Guest, request: &SignRequest) -> Result<SignResponse, ApiError> {
    let signed = signing::sign(app_key(guest)?, &request.algorithm, &request.data)?;
    Ok(SignResponse {
        signature: signed.signature.to_vec(),
        signature_chain: vec![signed.signature.to_vec(), signed.key_signature.to_vec(), guest.keys.identity_signature()],
        public_key: signed.public_key,
    })
}

/// `Verify`.
pub(crate) fn verify(request: &VerifyRequest) -> Result<VerifyResponse, ApiError> {
    Ok(VerifyResponse { valid: signing::verify(&request.algorithm, &request.data, &request.signature, &request.public_key)? })
}

/// `EmitEvent`.
pub(crate) fn emit_event(_args: &EmitEventArgs) -> Result<dstack_prpc::Empty, ApiError> {
    Err(ApiError::EmitEvent)
}

/// `GetQuote`: where there is no TD quote, an attestation stands beside an empty one.
pub(crate) async fn quote(guest: &Arc<Guest>, report_data: [u8; 64]) -> Result<GetQuoteResponse, ApiError> {
    if has_td_quote(guest) {
        let (quote, event_log) = td_quote(guest, "GetQuote", report_data).await?;
        let vm_config = if guest.vm_config.is_empty() { quote.vm_config } else { guest.vm_config.clone() };
        return Ok(GetQuoteResponse {
            quote: quote.quote,
            event_log,
            report_data: report_data.to_vec(),
            vm_config,
            attestation: Vec::new(),
        });
    }
    Ok(GetQuoteResponse {
        quote: Vec::new(),
        event_log: TdxEvent::log_to_json(&[]),
        report_data: report_data.to_vec(),
        vm_config: guest.vm_config.clone(),
        attestation: guest.evidence(report_data).await?,
    })
}

/// A TD quote with its log as callers get it.
pub(crate) async fn td_quote(guest: &Arc<Guest>, method: &'static str, report_data: [u8; 64]) -> Result<(Quote, String), ApiError> {
    if !has_td_quote(guest) {
        return Err(ApiError::Platform { method, platform: guest.identity.platform.name() });
    }
    let quote = guest.quote(report_data).await?;
    let event_log = stripped_log(&quote.event_log)?;
    Ok((quote, event_log))
}

fn has_td_quote(guest: &Guest) -> bool {
    matches!(guest.identity.platform, Platform::Tdx | Platform::GcpTdx)
}

/// `Attest`.
pub(crate) async fn attest(guest: &Arc<Guest>, args: &RawQuoteArgs) -> Result<AttestResponse, ApiError> {
    Ok(AttestResponse { attestation: guest.evidence(padded(&args.report_data)?).await? })
}

/// `GpuInfo`.
pub(crate) async fn gpu_info() -> Result<GpuInfoResponse, ApiError> {
    let attestation = String::from_utf8_lossy(&boot_gpu_evidence().await?).into_owned();
    Ok(GpuInfoResponse { attestation })
}

/// What the boot found out of GPUs; empty where it found none.
pub(crate) async fn boot_gpu_evidence() -> Result<Vec<u8>, ApiError> {
    use tokio::io::AsyncReadExt as _;
    let wrong = |reason: String| ApiError::Machine { what: "GPU attestation of the boot", reason };
    let file = match tokio::fs::File::open(GPU_ATTESTATION_FILE).await {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(wrong(error.to_string())),
    };
    let mut evidence = Vec::new();
    file.take(GPU_ATTESTATION_BYTES_MAX).read_to_end(&mut evidence).await.map_err(|error| wrong(error.to_string()))?;
    Ok(evidence)
}
