//! The measured events of a boot, each exactly once. Owns: comparing what shall be measured with what was measured already in this boot.
//! Never: measures an event twice (a register cannot go back), or goes on where this boot measured something else.
//! Source: attestation reference §4 (names, payloads, order).

use dstack_attest::wire::{EventVersion, RuntimeEvent};
use dstack_tee::TeeError;

use crate::machine::Machine;

/// Why nothing was measured.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MeasureError {
    /// The device's.
    #[error("{0}")]
    Device(#[from] TeeError),
    /// This boot measured something else before: its files changed after it began. Boot anew.
    #[error("this boot measured {measured:?} where {wanted:?} comes now, or with another payload: the host's files changed; boot anew")]
    Diverged {
        /// What is in the register.
        measured: String,
        /// What should come.
        wanted: String,
    },
}

/// Measures in order.
#[derive(Debug)]
pub struct Recorder<'a> {
    machine: &'a Machine,
    version: EventVersion,
    /// Of this boot, before this program and by it.
    events: Vec<RuntimeEvent>,
    /// How many of them this program has passed.
    at: usize,
}

impl<'a> Recorder<'a> {
    /// `version`: 2 writes events in their canonical JSON form.
    ///
    /// # Errors
    /// The device's.
    pub fn new(machine: &'a Machine, version: u8) -> Result<Self, MeasureError> {
        let version = if version == 2 { EventVersion::V2 } else { EventVersion::V1 };
        Ok(Self { machine, version, events: machine.events()?, at: 0 })
    }

    /// Measures the next event, unless this boot did before.
    ///
    /// # Errors
    /// [`MeasureError`].
    pub fn event(&mut self, name: &str, payload: &[u8]) -> Result<(), MeasureError> {
        let event = RuntimeEvent { event: name.to_owned(), payload: payload.to_vec(), version: self.version };
        match self.events.get(self.at) {
            Some(measured) if *measured == event => tracing::debug!(event = name, "measured before in this boot"),
            Some(measured) => return Err(MeasureError::Diverged { measured: measured.event.clone(), wanted: name.to_owned() }),
            None => {
                self.machine.measure(&event)?;
                tracing::info!(event = name, payload = hex::encode(payload), "measured");
                self.events.push(event);
            }
        }
        self.at = self.at.saturating_add(1);
        Ok(())
    }

    /// Whether this boot measured an event of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.events.iter().any(|event| event.event == name)
    }

    /// Payload of an event that was measured before this program began.
    #[must_use]
    pub fn payload(&self, name: &str) -> Option<&[u8]> {
        self.events.iter().find(|event| event.event == name).map(|event| event.payload.as_slice())
    }

    /// Whether anything was measured in this boot before this program.
    #[must_use]
    pub fn resumes(&self) -> bool {
        self.events.len() > self.at
    }
}
