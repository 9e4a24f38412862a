//! Quotes and PCRs. Owns: quoting with PCR values that fit the quote, PCR 14. Never: computes a nonce.

use super::context::with_object;
use super::key::{self, AkKind};
use super::{Tpm, TpmError};
use crate::TeeError;
use crate::runtime_log::Register;
use dstack_attest::eventlog::runtime_preimage;
use dstack_attest::eventlog::tpm::replay_runtime;
use dstack_attest::tpm::Bank;
use dstack_attest::wire::RuntimeEvent;
use sha2::{Digest as _, Sha256};
use tss_esapi::Context;
use tss_esapi::handles::PcrHandle;
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::structures::{AttestInfo, Data, Digest, DigestValues, PcrSelectionList, PcrSelectionListBuilder, PcrSlot, SignatureScheme};
use tss_esapi::traits::Marshall;

/// How often a quote is made anew when a PCR moved under it.
const TRIES_MAX: u32 = 4;
/// PCR of runtime events.
pub(super) const RUNTIME_PCR: u32 = 14;

/// A TPM quote with what is needed to check it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quoted {
    /// TPMS_ATTEST.
    pub message: Vec<u8>,
    /// TPMT_SIGNATURE.
    pub signature: Vec<u8>,
    /// Values of the quoted PCRs of the SHA-256 bank, in the order of their numbers.
    pub pcr_values: Vec<(u32, [u8; 32])>,
    /// Certificate of the key, DER; empty for [`AkKind::Own`].
    pub certificate: Vec<u8>,
}

impl Tpm {
    /// Quotes `pcrs` of the SHA-256 bank over `qualifying`, with the values that the quote is of.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn quote(&self, pcrs: &[u32], qualifying: [u8; 32], kind: AkKind) -> Result<Quoted, TpmError> {
        let selection = selection(pcrs)?;
        self.with(|context| {
            let key = key::make(context, kind)?;
            with_object(context, key.handle.into(), |context| {
                let certificate = key::certificate(context, &key)?;
                for _ in 0..TRIES_MAX {
                    let data = Data::try_from(qualifying.to_vec()).map_err(TpmError::of("take qualifying data"))?;
                    let (attest, signature) = context
                        .execute_with_nullauth_session(|context| context.quote(key.handle, data, SignatureScheme::Null, selection.clone()))
                        .map_err(TpmError::of("quote"))?;
                    let pcr_values = values(context, &selection)?;
                    let digest = Sha256::digest(pcr_values.iter().flat_map(|(_, value)| *value).collect::<Vec<u8>>());
                    let fits = matches!(attest.attested(), AttestInfo::Quote { info } if info.pcr_digest().value() == digest.as_slice());
                    if fits {
                        let message = attest.marshall().map_err(TpmError::of("encode its quote"))?;
                        let signature = signature.marshall().map_err(TpmError::of("encode its signature"))?;
                        return Ok(Quoted { message, signature, pcr_values, certificate });
                    }
                }
                Err(TpmError::Unstable { tries: TRIES_MAX })
            })
        })
    }

    /// SHA-256 of the attestation key's public area (TPMT_PUBLIC).
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn key_hash(&self, kind: AkKind) -> Result<[u8; 32], TpmError> {
        self.with(|context| {
            let key = key::make(context, kind)?;
            let public = key.public.marshall().map_err(TpmError::of("encode the attestation key"));
            with_object(context, key.handle.into(), |_| Ok(Sha256::digest(public?).into()))
        })
    }

    /// The value of one PCR of the SHA-256 bank.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn pcr(&self, pcr: u32) -> Result<[u8; 32], TpmError> {
        let selection = selection(&[pcr])?;
        let values = self.with(|context| values(context, &selection))?;
        values.first().map(|(_, value)| *value).ok_or(TpmError::Command { what: "read a PCR", cause: "it gave none".to_owned() })
    }

    /// Extends a PCR's SHA-256 bank by `digest`.
    ///
    /// # Errors
    /// [`TpmError`].
    pub fn extend(&self, pcr: u32, digest: [u8; 32]) -> Result<(), TpmError> {
        let handle = handle(pcr)?;
        self.with(|context| {
            let mut digests = DigestValues::new();
            digests.set(HashingAlgorithm::Sha256, Digest::try_from(&digest[..]).map_err(TpmError::of("take a digest"))?);
            let extended = context.execute_with_nullauth_session(|context| context.pcr_extend(handle, digests));
            extended.map_err(TpmError::of("extend a PCR"))
        })
    }
}

/// PCR 14 as the register of runtime events.
#[derive(Debug)]
pub struct Pcr14<'a>(pub &'a Tpm);

impl Register for Pcr14<'_> {
    fn require(&self, log: &[RuntimeEvent]) -> Result<(), TeeError> {
        if self.0.pcr(RUNTIME_PCR)?[..] == replay_runtime(log, Bank::Sha256) {
            Ok(())
        } else {
            Err(TeeError::LogDiverged { register: "PCR14" })
        }
    }

    fn measure(&self, event: &RuntimeEvent) -> Result<(), TeeError> {
        Ok(self.0.extend(RUNTIME_PCR, digest(event))?)
    }
}

fn digest(event: &RuntimeEvent) -> [u8; 32] {
    Sha256::digest(runtime_preimage(event)).into()
}

/// The SHA-256 bank's selection of `pcrs`.
pub(super) fn selection(pcrs: &[u32]) -> Result<PcrSelectionList, TpmError> {
    let slots = pcrs.iter().map(|pcr| slot(*pcr)).collect::<Result<Vec<_>, _>>()?;
    PcrSelectionListBuilder::new().with_selection(HashingAlgorithm::Sha256, &slots).build().map_err(TpmError::of("select PCRs"))
}

fn slot(pcr: u32) -> Result<PcrSlot, TpmError> {
    let bit = 1u32.checked_shl(pcr).filter(|_| pcr < 24);
    let no_such = || TpmError::Command { what: "name a PCR", cause: format!("there is no PCR {pcr}") };
    PcrSlot::try_from(bit.ok_or_else(no_such)?).map_err(TpmError::of("name a PCR"))
}

fn handle(pcr: u32) -> Result<PcrHandle, TpmError> {
    PcrHandle::try_from(pcr).map_err(TpmError::of("name a PCR"))
}

/// Values of the selected PCRs, by number. The TPM gives at most eight at once.
fn values(context: &mut Context, selection: &PcrSelectionList) -> Result<Vec<(u32, [u8; 32])>, TpmError> {
    let short = || TpmError::Command { what: "read PCRs", cause: "it gave other ones than asked for".to_owned() };
    let data = context
        .execute_without_session(|context| tss_esapi::abstraction::pcr::read_all(context, selection.clone()))
        .map_err(TpmError::of("read PCRs"))?;
    let bank = data.pcr_bank(HashingAlgorithm::Sha256).ok_or_else(short)?;
    let mut values = Vec::new();
    for slot in selection.get_selections().iter().flat_map(tss_esapi::structures::PcrSelection::selected) {
        let value = bank.get_digest(slot).ok_or_else(short)?.value().try_into().map_err(|_| short())?;
        values.push((u32::from(slot).trailing_zeros(), value));
    }
    values.sort_unstable_by_key(|(pcr, _)| *pcr);
    Ok(values)
}
