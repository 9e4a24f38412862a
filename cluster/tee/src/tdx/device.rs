//! A TD as a [`Device`]. Owns: the forms in which a TD's evidence is handed out. Never: seals: a plain TD has no key of its own.

use super::TdGuest;
use super::guest::Attested;
use crate::options::Options;
use crate::software::protocol::{Boot, Booted};
use crate::{Description, Device, Quote, TeeError};
use dstack_attest::wire::{Attestation, PlatformEvidence, RuntimeEvent, TdxEvent};
use dstack_protocol::Platform;
use dstack_secret::Secret;

/// The TD this program runs in. Several threads may ask at once: each request has an entry of its own.
#[derive(Debug)]
pub struct TdxDevice {
    guest: TdGuest,
}

impl TdxDevice {
    /// Opens it as the config says.
    ///
    /// # Errors
    /// As [`TdGuest::open`].
    pub fn open(options: &Options) -> Result<Self, TeeError> {
        Ok(Self { guest: TdGuest::open(options)? })
    }

    fn attestation(&self, report_data: [u8; 64]) -> Result<Attestation, TeeError> {
        let Attested { quote, events, .. } = self.guest.attest(&report_data)?;
        let platform = PlatformEvidence::Tdx(self.guest.evidence(quote, events.all()));
        let config = self.guest.vm_config().to_owned();
        let runtime_events = events.all().to_vec();
        Ok(Attestation { platform, report_data, runtime_events, config, report_data_payload: None })
    }

    /// The TD below.
    #[must_use]
    pub const fn guest(&self) -> &TdGuest {
        &self.guest
    }
}

impl Device for TdxDevice {
    fn platform(&self) -> Platform {
        Platform::Tdx
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
        self.guest.log().append(event, &[self.guest.rtmr()])
    }

    fn runtime_events(&self) -> Result<Vec<RuntimeEvent>, TeeError> {
        self.guest.log().read()
    }

    fn describe(&self) -> Result<Description, TeeError> {
        let attested = self.guest.attest(&[0; 64])?;
        Ok(Description { platform: Platform::Tdx, measurement: attested.measurement()?, platform_identity: Vec::new(), software: None })
    }

    fn is_software(&self) -> bool {
        false
    }
}

impl Attested {
    /// The canonical measurement, 224 bytes: MRTD ‖ RTMR0 ‖ RTMR1 ‖ RTMR2 ‖ compose hash (zero without one).
    pub(crate) fn measurement(&self) -> Result<Vec<u8>, TeeError> {
        let [rtmr0, rtmr1, rtmr2, _] = &self.body.rtmr;
        let compose_hash = match self.events.payload("compose-hash") {
            None => [0; 32],
            Some(hash) => hash.try_into().map_err(|_| TeeError::BadEvidence { why: "has a compose-hash event that is not of 32 bytes" })?,
        };
        Ok([self.body.mr_td.as_slice(), rtmr0, rtmr1, rtmr2, &compose_hash].concat())
    }
}
