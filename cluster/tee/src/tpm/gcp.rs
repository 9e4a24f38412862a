//! A TD of Google Cloud as a [`Device`]: two quotes, the TPM's over the hash of the TD's. Owns: how both are made to fit and handed out.
//! Never: seals (the vTPM is run by the host); judges the certificate of the attestation key.
//! Source: dstack attestation reference, sections 2.1, 4 and 5.2.

use super::quote::RUNTIME_PCR;
use super::{AkKind, Pcr14, Quoted, Tpm};
use crate::options::Options;
use crate::software::protocol::{Boot, Booted};
use crate::tdx::{Attested, TdGuest, firmware_log};
use crate::{Description, Device, Quote, TeeError};
use dstack_attest::eventlog;
use dstack_attest::tpm::Bank;
use dstack_attest::wire::{Attestation, PcrValue, PlatformEvidence, RuntimeEvent, TdxEvent, TpmEvent, TpmPlatform, TpmQuote};
use dstack_protocol::Platform;
use dstack_secret::Secret;
use sha2::{Digest as _, Sha256};

/// The PCRs of the SHA-256 bank that are quoted: firmware, option ROMs and the UKI, runtime events.
pub const QUOTED_PCRS: [u32; 3] = [0, 2, RUNTIME_PCR];
/// How often the quotes are made anew when an event was measured between them.
const TRIES_MAX: u32 = 4;

/// The TD this program runs in, and its vTPM.
#[derive(Debug)]
pub struct GcpDevice {
    guest: TdGuest,
    tpm: Tpm,
    /// Boot events of the quoted PCRs.
    boot_log: Vec<TpmEvent>,
}

impl GcpDevice {
    /// Opens both as the config says.
    ///
    /// # Errors
    /// As [`TdGuest::open`] and [`Tpm::open`]; [`NoTemplate`](super::TpmError::NoTemplate), `NoCertificate` and `BadCertificate`
    /// where no verifier would believe the TPM.
    pub fn open(options: &Options) -> Result<Self, TeeError> {
        let guest = TdGuest::open(options)?;
        let tpm = Tpm::open(&options.tpm)?;
        let mut boot_log = firmware_log(&options.tpm_log, "tpm-log", |log| eventlog::tpm::events(log, Bank::Sha256))?;
        boot_log.retain(|event| QUOTED_PCRS.contains(&event.pcr_index));
        // now rather than at the first request of a peer
        tpm.quote(&QUOTED_PCRS, [0; 32], AkKind::Cloud)?;
        Ok(Self { guest, tpm, boot_log })
    }

    /// The TPM below.
    #[must_use]
    pub const fn tpm(&self) -> &Tpm {
        &self.tpm
    }

    /// Both quotes, with one list of events behind RTMR3 and PCR 14.
    fn attest(&self, report_data: &[u8; 64]) -> Result<(Attested, Quoted), TeeError> {
        for _ in 0..TRIES_MAX {
            let attested = self.guest.attest(report_data)?;
            let quoted = self.tpm.quote(&QUOTED_PCRS, Sha256::digest(&attested.quote).into(), AkKind::Cloud)?;
            // the TD's events are proven against its own quote; these have to be the same ones
            let pcr14 = eventlog::tpm::replay_runtime(attested.events.all(), Bank::Sha256);
            if quoted.pcr_values.iter().any(|(pcr, value)| *pcr == RUNTIME_PCR && value[..] == pcr14) {
                return Ok((attested, quoted));
            }
        }
        Err(TeeError::LogDiverged { register: "PCR14" })
    }

    fn attestation(&self, report_data: [u8; 64]) -> Result<Attestation, TeeError> {
        let (attested, quoted) = self.attest(&report_data)?;
        let runtime_events = attested.events.all().to_vec();
        let td = self.guest.evidence(attested.quote, &runtime_events);
        let platform = PlatformEvidence::GcpTdx(td, self.tpm_quote(quoted));
        let config = self.guest.vm_config().to_owned();
        Ok(Attestation { platform, report_data, runtime_events, config, report_data_payload: None })
    }

    fn tpm_quote(&self, quoted: Quoted) -> TpmQuote {
        let value = |(index, value): (u32, [u8; 32])| PcrValue { index, algorithm: "sha256".to_owned(), value: value.to_vec() };
        TpmQuote {
            message: quoted.message,
            signature: quoted.signature,
            pcr_values: quoted.pcr_values.into_iter().map(value).collect(),
            ak_cert: quoted.certificate,
            platform: TpmPlatform::Gcp,
            event_log: self.boot_log.clone(),
        }
    }
}

impl Device for GcpDevice {
    fn platform(&self) -> Platform {
        Platform::GcpTdx
    }

    fn evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, TeeError> {
        Ok(self.attestation(report_data)?.stripped().encode())
    }

    fn whole_evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, TeeError> {
        Ok(self.attestation(report_data)?.encode())
    }

    fn quote(&self, report_data: [u8; 64]) -> Result<Quote, TeeError> {
        let Attested { quote, events, .. } = self.guest.attest(&report_data)?;
        let evidence = self.guest.evidence(quote, events.all());
        let event_log = TdxEvent::log_to_json(&evidence.event_log);
        Ok(Quote { quote: evidence.quote, event_log, vm_config: self.guest.vm_config().to_owned() })
    }

    fn platform_key(&self, _purpose: &[u8]) -> Result<Option<Secret<32>>, TeeError> {
        Ok(None)
    }

    fn boot_app(&self, _boot: Boot) -> Result<Booted, TeeError> {
        Err(TeeError::NoGuests)
    }

    fn measure(&self, event: &RuntimeEvent) -> Result<(), TeeError> {
        self.guest.log().append(event, &[self.guest.rtmr(), &Pcr14(&self.tpm)])
    }

    fn runtime_events(&self) -> Result<Vec<RuntimeEvent>, TeeError> {
        self.guest.log().read()
    }

    /// SHA-256 of the attestation key's public area.
    fn instance_binding(&self) -> Result<Option<[u8; 32]>, TeeError> {
        Ok(Some(self.tpm.key_hash(AkKind::Cloud)?))
    }

    /// Measurement: the TD's 224 bytes, then PCR 0 and PCR 2.
    fn describe(&self) -> Result<Description, TeeError> {
        let (attested, quoted) = self.attest(&[0; 64])?;
        let mut measurement = attested.measurement()?;
        for (_, value) in quoted.pcr_values.iter().filter(|(pcr, _)| [0, 2].contains(pcr)) {
            measurement.extend(value);
        }
        Ok(Description { platform: Platform::GcpTdx, measurement, platform_identity: Vec::new(), software: None })
    }

    fn is_software(&self) -> bool {
        false
    }
}
