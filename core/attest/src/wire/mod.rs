//! The versioned attestation: what X.509 extension `.8`, a certificate request or an API answer carries.
//! Owns: its two encodings (SCALE V0, msgpack V1), the types they decode into, stripping, AppInfo, requests. Never: verifies
//! anything; what is decoded here is a claim until a platform module has judged it.
//! Source: dstack attestation reference, section 2.

mod app_info;
mod csr;
mod event_json;
mod msgpack;
mod scale;
mod strip;
mod v0;
mod v1;

pub use app_info::AppInfo;
pub use csr::{ALT_NAMES_MAX, CONFIRM, CSR_BYTES_MAX, CertificateConfig, CertificateRequest, CsrError, verify_csr_signature};

use crate::AttestError;
use dstack_protocol::Platform;

/// Largest versioned attestation, in bytes (section 2).
pub const ATTESTATION_BYTES_MAX: usize = 10 << 20;
/// Most events of one log. A real log has about 30; an application may append some.
pub const EVENTS_MAX: usize = 16_384;
/// Most certificates of a SEV-SNP chain, and most PCR values of a TPM quote.
pub const ITEMS_MAX: usize = 64;
/// `event_type` of runtime events: those that dstack or an application measures after boot (section 4).
pub const RUNTIME_EVENT_TYPE: u32 = 0x0800_0001;

/// A decoded versioned attestation, the same for both encodings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attestation {
    /// What the hardware signed, with what is needed to check it.
    pub platform: PlatformEvidence,
    /// Copy of the report data; must equal the one that the hardware signed.
    pub report_data: [u8; 64],
    /// Runtime events in the order they were measured.
    pub runtime_events: Vec<RuntimeEvent>,
    /// VmConfig JSON text; may be empty. Unverified, whatever the hardware said.
    pub config: String,
    /// Stack `dstack-pod`: the text that `report_data` = SHA-512("app-data:" ‖ text) was made of. V1 only.
    pub report_data_payload: Option<String>,
}

/// Evidence of one platform, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlatformEvidence {
    /// Intel TDX.
    Tdx(TdxEvidence),
    /// Intel TDX on Google Cloud, with its vTPM.
    GcpTdx(TdxEvidence, TpmQuote),
    /// AWS Nitro Enclave.
    NitroEnclave {
        /// COSE_Sign1 of the NSM.
        nsm_quote: Vec<u8>,
    },
    /// AMD SEV-SNP.
    SevSnp {
        /// Attestation report.
        report: Vec<u8>,
        /// Certificates, or none.
        cert_chain: Vec<Vec<u8>>,
        /// MrConfigV3 document.
        mr_config: String,
    },
    /// AWS NitroTPM.
    NitroTpm {
        /// COSE_Sign1 of the TPM's vendor command.
        attestation_doc: Vec<u8>,
    },
}

impl PlatformEvidence {
    /// Which platform this claims to be of.
    #[must_use]
    pub const fn platform(&self) -> Platform {
        match self {
            Self::Tdx(_) => Platform::Tdx,
            Self::GcpTdx(..) => Platform::GcpTdx,
            Self::NitroEnclave { .. } => Platform::Nitro,
            Self::SevSnp { .. } => Platform::SevSnp,
            Self::NitroTpm { .. } => Platform::NitroTpm,
        }
    }
}

/// A TD quote and its event log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TdxEvidence {
    /// DCAP quote.
    pub quote: Vec<u8>,
    /// Boot and runtime events.
    pub event_log: Vec<TdxEvent>,
}

/// How the digest of a runtime event is made (section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EventVersion {
    /// Over `LE32(event_type) ‖ ":" ‖ name ‖ ":" ‖ payload`.
    #[default]
    V1,
    /// Over canonical JSON.
    V2,
}

/// A runtime event: a name and what was measured under it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RuntimeEvent {
    /// Its name, `app-id` for one.
    pub event: String,
    /// Its payload.
    pub payload: Vec<u8>,
    /// How its digest is made.
    pub version: EventVersion,
}

/// One entry of a TD's event log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TdxEvent {
    /// Register: 0 to 3 for RTMR0 to RTMR3.
    pub imr: u32,
    /// TCG event type, or [`RUNTIME_EVENT_TYPE`].
    pub event_type: u32,
    /// SHA-384; empty in a stripped runtime event.
    pub digest: Vec<u8>,
    /// Name; empty for most boot events.
    pub event: String,
    /// Payload; empty in a stripped boot event.
    pub event_payload: Vec<u8>,
    /// How its digest is made.
    pub version: EventVersion,
    /// What `digest` is the hash of, where the event says so (V2). Not in V0.
    pub preimage: Option<Vec<u8>>,
}

impl TdxEvent {
    /// Whether dstack or an application measured it after boot.
    #[must_use]
    pub const fn is_runtime(&self) -> bool {
        self.event_type == RUNTIME_EVENT_TYPE
    }

    /// Parses an event log in its JSON form: an array of objects with hex digests and payloads (extension `.2`).
    ///
    /// # Errors
    /// [`AttestError::Length`] above [`ATTESTATION_BYTES_MAX`] or [`EVENTS_MAX`], [`AttestError::Malformed`] otherwise.
    pub fn parse_log(json: &[u8]) -> Result<Vec<Self>, AttestError> {
        event_json::parse(json)
    }

    /// The JSON form of a log, compact; a decoder of the vectors' `event_log` files reads it.
    #[must_use]
    pub fn log_to_json(log: &[Self]) -> String {
        event_json::to_json(log)
    }
}

/// Runtime events of a log, in order.
#[must_use]
pub fn runtime_events_of(log: &[TdxEvent]) -> Vec<RuntimeEvent> {
    let runtime = log.iter().filter(|event| event.is_runtime());
    runtime.map(|event| RuntimeEvent { event: event.event.clone(), payload: event.event_payload.clone(), version: event.version }).collect()
}

/// Quote of a vTPM (GCP).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TpmQuote {
    /// TPMS_ATTEST.
    pub message: Vec<u8>,
    /// TPMT_SIGNATURE.
    pub signature: Vec<u8>,
    /// Values of the quoted PCRs.
    pub pcr_values: Vec<PcrValue>,
    /// Certificate of the attestation key, DER.
    pub ak_cert: Vec<u8>,
    /// Where the quote was made.
    pub platform: TpmPlatform,
    /// Events by PCR, for replay.
    pub event_log: Vec<TpmEvent>,
}

/// One PCR of a TPM quote.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PcrValue {
    /// PCR number.
    pub index: u32,
    /// Bank, `sha256` for one.
    pub algorithm: String,
    /// Its value.
    pub value: Vec<u8>,
}

/// One event of a TPM log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TpmEvent {
    /// PCR it was extended into.
    pub pcr_index: u32,
    /// Its digest.
    pub digest: Vec<u8>,
}

/// Where a TPM quote was made, by its SCALE index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TpmPlatform {
    /// A dstack host.
    #[default]
    Dstack = 0,
    /// Google Cloud.
    Gcp = 1,
    /// AWS Nitro Enclave.
    NitroEnclave = 2,
    /// AWS EC2.
    AwsEc2 = 3,
}

impl TpmPlatform {
    const ALL: [Self; 4] = [Self::Dstack, Self::Gcp, Self::NitroEnclave, Self::AwsEc2];

    const fn name(self) -> &'static str {
        match self {
            Self::Dstack => "Dstack",
            Self::Gcp => "Gcp",
            Self::NitroEnclave => "NitroEnclave",
            Self::AwsEc2 => "AwsEc2",
        }
    }

    fn from_index(index: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|platform| *platform as u64 == index)
    }

    /// Upper or lower case, with or without hyphens and underscores: writers differ.
    fn from_name(name: &str) -> Option<Self> {
        let plain = |text: &str| text.chars().filter(|c| !matches!(c, '-' | '_')).map(|c| c.to_ascii_lowercase()).collect::<String>();
        Self::ALL.into_iter().find(|platform| plain(platform.name()) == plain(name))
    }
}

/// Which of the two encodings bytes are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// SCALE V0.
    ScaleV0,
    /// msgpack V1.
    MsgpackV1,
}

impl Encoding {
    /// Tells by the first byte (section 2): `0x00` is V0, a msgpack map is V1.
    ///
    /// # Errors
    /// [`AttestError::Truncated`] when empty, [`AttestError::Malformed`] for any other first byte.
    pub fn of(bytes: &[u8]) -> Result<Self, AttestError> {
        match bytes.first() {
            None => Err(AttestError::Truncated { part: "attestation", need_bytes: 1, have_bytes: 0 }),
            Some(0x00) => Ok(Self::ScaleV0),
            Some(0x80..=0x8f | 0xde | 0xdf) => Ok(Self::MsgpackV1),
            Some(_) => Err(AttestError::Malformed { part: "attestation", why: "unknown wire format" }),
        }
    }
}

impl Attestation {
    /// Decodes either encoding.
    ///
    /// # Errors
    /// Classes `parse.*` and `type.unsupported_version`: the sender's fault.
    pub fn decode(bytes: &[u8]) -> Result<Self, AttestError> {
        if bytes.len() > ATTESTATION_BYTES_MAX {
            let (length_bytes, limit_bytes) = (bytes.len(), ATTESTATION_BYTES_MAX);
            return Err(AttestError::Length { part: "attestation", length_bytes, limit_bytes });
        }
        match Encoding::of(bytes)? {
            Encoding::ScaleV0 => v0::decode(bytes),
            Encoding::MsgpackV1 => v1::decode(bytes),
        }
    }

    /// Encodes as dstack does (section 2.3): V0 where it can carry all of it, else V1.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.encode_v0().unwrap_or_else(|| self.encode_v1())
    }

    /// SCALE V0; `None` where it cannot carry all of this: V2 runtime events, a stack other than `dstack`.
    #[must_use]
    pub fn encode_v0(&self) -> Option<Vec<u8>> {
        let carries_all = self.report_data_payload.is_none() && self.runtime_events.iter().all(|event| event.version == EventVersion::V1);
        carries_all.then(|| v0::encode(self))
    }

    /// msgpack V1.
    #[must_use]
    pub fn encode_v1(&self) -> Vec<u8> {
        v1::encode(self)
    }

    /// Drops what a certificate need not carry (section 2.5). What is left still verifies.
    #[must_use]
    pub fn stripped(self) -> Self {
        strip::strip(self)
    }

    /// The attestation a legacy certificate carries in `.1` and `.2` (section 1).
    ///
    /// # Errors
    /// As [`TdxEvent::parse_log`], and [`AttestError::Truncated`] when `quote` is too short to hold report data.
    pub fn from_legacy_pair(quote: &[u8], event_log_json: &[u8]) -> Result<Self, AttestError> {
        // header 48 bytes; a v5 quote has 6 more before its body; report data is the body's last field in TD 1.0
        let body_at = match quote.first() {
            Some(5) => 54_usize,
            _ => 48,
        };
        let at = body_at.saturating_add(520);
        let need_bytes = at.saturating_add(64);
        let truncated = AttestError::Truncated { part: "quote", need_bytes, have_bytes: quote.len() };
        let report_data = quote.get(at..need_bytes).and_then(|bytes| bytes.try_into().ok()).ok_or(truncated)?;
        let event_log = TdxEvent::parse_log(event_log_json)?;
        let runtime_events = runtime_events_of(&event_log);
        let platform = PlatformEvidence::Tdx(TdxEvidence { quote: quote.to_vec(), event_log });
        Ok(Self { platform, report_data, runtime_events, config: String::new(), report_data_payload: None })
    }
}

#[cfg(test)]
mod tests;
