//! Verifies documents of AWS Nitro: COSE_Sign1 of an enclave's NSM, and of an instance's NitroTPM. Owns: the order of the checks and their
//! result. Never: fetches anything, reads the clock, decides policy beyond "no debug enclave".
//! Source: dstack attestation reference, sections 5.3 and 5.4; vectors' README for the stricter rules.
//!
//! Nothing binds runtime events or config to a document: of an enclave only its PCRs and its `user_data` are known.

mod chain;
pub(crate) mod checks;
mod claims;
mod cose;
mod document;
pub mod tpm;

pub use checks::{CHECKS, TPM_CHECKS};
pub use claims::{Claims, claims};

use crate::{AttestError, Trace, TrustRoots, window::Window};
use cose::Sign1;
use document::{Document, Maker};
use dstack_protocol::UnixMillis;
use dstack_protocol::binding::{self, Statement};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Bytes of a PCR (SHA-384).
pub const PCR_BYTES: usize = 48;
/// Largest document taken: real ones have 4 to 6 KiB; the fields' own limits add up to less than this.
pub const DOCUMENT_BYTES_MAX: usize = 32 * 1024;
/// Oldest document taken, in milliseconds (§5.3 rule 3).
pub const AGE_MS_MAX: u64 = 3_600_000;
/// How far a document's clock may be ahead of ours, in milliseconds (§5.3 rule 3).
pub const FUTURE_MS_MAX: u64 = 300_000;

const PART: &str = "nsm document";

/// PCR values by index, 0 to 31.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PcrMap(BTreeMap<u8, [u8; PCR_BYTES]>);

impl PcrMap {
    /// The PCR of that index, if the document lists it.
    #[must_use]
    pub fn pcr(&self, index: u8) -> Option<&[u8; PCR_BYTES]> {
        self.0.get(&index)
    }

    /// All, by index.
    pub fn iter(&self) -> impl Iterator<Item = (u8, &[u8; PCR_BYTES])> {
        self.0.iter().map(|(index, value)| (*index, value))
    }

    fn required(&self, index: u8) -> Result<&[u8; PCR_BYTES], AttestError> {
        self.pcr(index).ok_or(AttestError::Field { field: "pcrs", why: "one that is needed is missing" })
    }
}

/// What a verified document says. Made by [`verify`] only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedDocument {
    module_id: String,
    statement_id: [u8; 32],
    timestamp: UnixMillis,
    pcrs: PcrMap,
    image: [u8; 3 * PCR_BYTES],
    user_data: Option<Vec<u8>>,
    nonce: Option<Vec<u8>>,
    public_key: Option<Vec<u8>>,
    earliest_expiry: UnixMillis,
    root_spki_sha256: [u8; 32],
    software_root: bool,
}

impl VerifiedDocument {
    /// Name of the enclave (parent instance id, `-enc`, enclave id) or TPM (instance id, `-tpm`, sixteen digits).
    #[must_use]
    pub fn module_id(&self) -> &str {
        &self.module_id
    }

    /// Names what was signed: [`binding::statement_id`].
    #[must_use]
    pub const fn statement_id(&self) -> [u8; 32] {
        self.statement_id
    }

    /// When the NSM made the document.
    #[must_use]
    pub const fn timestamp(&self) -> UnixMillis {
        self.timestamp
    }

    /// All PCRs of the document.
    #[must_use]
    pub const fn pcrs(&self) -> &PcrMap {
        &self.pcrs
    }

    /// PCR0 ‖ PCR1 ‖ PCR2 of an enclave, PCR4 ‖ PCR7 ‖ PCR12 of a NitroTPM: the code that was started, 144 bytes.
    #[must_use]
    pub const fn image(&self) -> &[u8; 3 * PCR_BYTES] {
        &self.image
    }

    /// SHA-256 of [`Self::image`] (section 6): OS image hash, compose hash, `mr_system` and `mr_aggregated` in one.
    #[must_use]
    pub fn image_hash(&self) -> [u8; 32] {
        Sha256::digest(self.image).into()
    }

    /// PCR4: SHA-384 over the parent instance's id, set by Nitro.
    ///
    /// # Errors
    /// [`AttestError::Field`] where the document does not list it.
    pub fn parent(&self) -> Result<&[u8; PCR_BYTES], AttestError> {
        self.pcrs.required(4)
    }

    /// `user_data` of the request.
    #[must_use]
    pub fn user_data(&self) -> Option<&[u8]> {
        self.user_data.as_deref()
    }

    /// `user_data` as report data.
    ///
    /// # Errors
    /// [`AttestError::UserData`] where it is absent or not 64 bytes: the document was made for something else.
    pub fn report_data(&self) -> Result<&[u8; 64], AttestError> {
        self.user_data().and_then(|data| data.try_into().ok()).ok_or(AttestError::UserData)
    }

    /// `nonce` of the request.
    #[must_use]
    pub fn nonce(&self) -> Option<&[u8]> {
        self.nonce.as_deref()
    }

    /// `public_key` of the request.
    #[must_use]
    pub fn public_key(&self) -> Option<&[u8]> {
        self.public_key.as_deref()
    }

    /// When this judgement ends: the document's age limit or a certificate's end, whichever comes first.
    #[must_use]
    pub const fn earliest_expiry(&self) -> UnixMillis {
        self.earliest_expiry
    }

    /// SHA-256 of the root's SubjectPublicKeyInfo.
    #[must_use]
    pub const fn root_spki_sha256(&self) -> &[u8; 32] {
        &self.root_spki_sha256
    }

    /// Whether the path ended at a software root: then no hardware stands behind it.
    #[must_use]
    pub const fn software_root(&self) -> bool {
        self.software_root
    }
}

/// Verifies an enclave's document at `now` under `roots`, in the order of §5.3. The caller compares `user_data` or `nonce`.
///
/// # Errors
/// One variant per reason. The sender's fault, but for [`AttestError::UntrustedRoot`] (perhaps a root is missing in our
/// config) and the time variants (perhaps our clock is wrong, else ask for a fresh document).
pub fn verify(document: &[u8], roots: &TrustRoots, now: UnixMillis) -> Result<VerifiedDocument, AttestError> {
    verify_traced(document, roots, now, &Trace::new())
}

/// As [`verify`], and notes in `trace` every check that was begun.
/// # Errors
/// As [`verify`].
pub fn verify_traced(document: &[u8], roots: &TrustRoots, now: UnixMillis, trace: &Trace) -> Result<VerifiedDocument, AttestError> {
    let verified = verify_document(document, Maker::Nsm, roots, now, trace)?;
    // §5.3 rule 7: PCR0, PCR1, PCR2 required; zero in debug mode, in no other
    trace.enter(&checks::NOT_DEBUG);
    match verified.image.chunks_exact(PCR_BYTES).any(|pcr| pcr.iter().all(|byte| *byte == 0)) {
        true => Err(AttestError::Debug),
        false => Ok(verified),
    }
}

/// What both kinds of documents have in common: form, chain, signature, age, and the PCRs that name the image.
fn verify_document(
    document: &[u8],
    maker: Maker,
    roots: &TrustRoots,
    now: UnixMillis,
    trace: &Trace,
) -> Result<VerifiedDocument, AttestError> {
    let checks = match maker {
        Maker::Nsm => &checks::ENCLAVE,
        Maker::NitroTpm => &checks::TPM,
    };
    trace.enter(checks.form);
    if document.len() > DOCUMENT_BYTES_MAX {
        return Err(AttestError::Length { part: PART, length_bytes: document.len(), limit_bytes: DOCUMENT_BYTES_MAX });
    }
    let message = Sign1::decode(document)?;
    trace.enter(checks.fields);
    let fields = Document::decode(message.payload, maker)?;
    trace.enter(checks.chain);
    let path = chain::walk(fields.certificate, &fields.cabundle, roots, now)?;
    trace.enter(checks.signature);
    message.verify(path.key()?.bytes())?;
    trace.enter(checks.age);
    let mut window = Window::at(now.0);
    window.document(fields.timestamp_ms, AGE_MS_MAX, FUTURE_MS_MAX, PART)?;

    trace.enter(checks.pcrs);
    let mut image = [0; 3 * PCR_BYTES];
    let indices = match maker {
        Maker::Nsm => [0, 1, 2],
        Maker::NitroTpm => tpm::BOOT_PCRS,
    };
    for (index, slot) in indices.into_iter().zip(image.chunks_exact_mut(PCR_BYTES)) {
        slot.copy_from_slice(fields.pcrs.required(index)?);
    }
    Ok(VerifiedDocument {
        module_id: fields.module_id.to_owned(),
        statement_id: binding::statement_id(Statement::NsmDocument(message.payload)),
        timestamp: UnixMillis(fields.timestamp_ms),
        pcrs: fields.pcrs,
        image,
        user_data: fields.user_data.map(<[u8]>::to_vec),
        nonce: fields.nonce.map(<[u8]>::to_vec),
        public_key: fields.public_key.map(<[u8]>::to_vec),
        earliest_expiry: path.earliest_expiry().min(UnixMillis(window.earliest_expiry_ms())),
        root_spki_sha256: *path.root().spki_sha256(),
        software_root: path.root().is_software(),
    })
}
