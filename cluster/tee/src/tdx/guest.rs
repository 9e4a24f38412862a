//! This TD: its quotes with what explains them. Owns: quote, firmware log and runtime log read so that they fit. Never: decides in
//! which form they are handed out (the devices do).

use super::{Rtmr, Tsm};
use crate::TeeError;
use crate::attribute::{self, Fault};
use crate::options::{Options, Source};
use crate::runtime_log::RuntimeLog;
use dstack_attest::AttestError;
use dstack_attest::eventlog::{self, ProvenEvents, RUNTIME_REGISTER, ccel, runtime_digest};
use dstack_attest::tdx::{Quote, TdBody};
use dstack_attest::wire::{EventVersion, RUNTIME_EVENT_TYPE, RuntimeEvent, TdxEvent, TdxEvidence};
use rustix::io::Errno;
use std::path::Path;

/// How often a quote is made anew when an event was measured between reading the log and quoting.
const TRIES_MAX: u32 = 4;
/// Largest VmConfig text.
const VM_CONFIG_BYTES_MAX: usize = 1 << 20;

/// The TD this program runs in.
#[derive(Debug)]
pub struct TdGuest {
    tsm: Tsm,
    rtmr: Rtmr,
    log: RuntimeLog,
    boot_events: Vec<TdxEvent>,
    vm_config: String,
}

/// A quote and the events that explain its registers.
#[derive(Debug)]
pub struct Attested {
    /// The DCAP quote, as the host made it.
    pub quote: Vec<u8>,
    /// What is in it.
    pub body: TdBody,
    /// Runtime events; they lead to RTMR3.
    pub events: ProvenEvents,
}

impl TdGuest {
    /// Reads the firmware's log and the VmConfig text, and looks whether quotes can be made.
    ///
    /// # Errors
    /// [`TeeError::Tsm`], [`TeeError::BadFirmwareLog`], [`TeeError::File`].
    pub fn open(options: &Options) -> Result<Self, TeeError> {
        let tsm = Tsm::at(&options.root);
        tsm.probe()?;
        let boot_events = firmware_log(&options.ccel, "ccel", ccel::events)?;
        let vm_config = options.vm_config.as_deref().map_or(Ok(String::new()), vm_config)?;
        let (rtmr, log) = (Rtmr::below(&options.rtmr), RuntimeLog::at(&options.events));
        Ok(Self { tsm, rtmr, log, boot_events, vm_config })
    }

    /// RTMR3.
    #[must_use]
    pub const fn rtmr(&self) -> &Rtmr {
        &self.rtmr
    }

    /// The runtime event log.
    #[must_use]
    pub const fn log(&self) -> &RuntimeLog {
        &self.log
    }

    /// The VmConfig text; may be empty.
    #[must_use]
    pub fn vm_config(&self) -> &str {
        &self.vm_config
    }

    /// A quote over `report_data` with the events behind it. Both are checked against each other: what this gives out, a verifier that
    /// trusts the machine's root accepts.
    ///
    /// # Errors
    /// [`TeeError::Tsm`], [`TeeError::LogDiverged`], [`TeeError::BadEvidence`] for a quote of other report data.
    pub fn attest(&self, report_data: &[u8; 64]) -> Result<Attested, TeeError> {
        for _ in 0..TRIES_MAX {
            let quote = self.tsm.quote(report_data)?;
            let body = Quote::parse(&quote).map_err(TeeError::UndecodableEvidence)?.body;
            if body.report_data != *report_data {
                return Err(TeeError::BadEvidence { why: "is bound to other report data" });
            }
            let [_, _, _, rtmr3] = &body.rtmr;
            if let Ok(events) = eventlog::prove(&self.log.read()?, rtmr3) {
                return Ok(Attested { quote, body, events });
            }
        }
        Err(TeeError::LogDiverged { register: "RTMR3" })
    }

    /// The whole event log: boot events of the firmware, then runtime events.
    #[must_use]
    pub fn evidence(&self, quote: Vec<u8>, events: &[RuntimeEvent]) -> TdxEvidence {
        let event_log = self.boot_events.iter().cloned().chain(events.iter().map(logged)).collect();
        TdxEvidence { quote, event_log }
    }
}

/// A runtime event as event logs carry it.
fn logged(event: &RuntimeEvent) -> TdxEvent {
    TdxEvent {
        imr: RUNTIME_REGISTER,
        event_type: RUNTIME_EVENT_TYPE,
        digest: runtime_digest(event).to_vec(),
        event: event.event.clone(),
        event_payload: event.payload.clone(),
        version: event.version,
        preimage: (event.version == EventVersion::V2).then(|| eventlog::runtime_preimage(event)),
    }
}

/// The events of a firmware log that this machine may lack.
pub(crate) fn firmware_log<E>(
    source: &Source,
    option: &'static str,
    parse: impl FnOnce(&[u8]) -> Result<Vec<E>, AttestError>,
) -> Result<Vec<E>, TeeError> {
    let (path, has_to_be) = match source {
        Source::Default(path) => (path, false),
        Source::Named(path) => (path, true),
        Source::None => return Ok(Vec::new()),
    };
    match attribute::read(path, ccel::CCEL_BYTES_MAX) {
        Ok(log) => parse(&log).map_err(|error| TeeError::BadFirmwareLog { path: path.display().to_string(), error, option }),
        Err(Fault::Errno(Errno::NOENT | Errno::NOTDIR)) if !has_to_be => {
            tracing::info!(path = %path.display(), "no firmware event log here: evidence goes without its events");
            Ok(Vec::new())
        }
        Err(fault) => Err(TeeError::file(path, fault)),
    }
}

fn vm_config(path: &Path) -> Result<String, TeeError> {
    let bytes = attribute::read(path, VM_CONFIG_BYTES_MAX).map_err(|fault| TeeError::file(path, fault))?;
    let text = String::from_utf8(bytes).ok().filter(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok());
    text.ok_or(TeeError::BadEvidence { why: "would carry a vm-config file that is no JSON" })
}
