//! The guest's runtime events: a file of JSON lines beside the registers they were measured into. Owns: its form, its lock, the order
//! "register first, line after". Never: measures without writing, or writes what was not measured.
//! Source: dstack attestation reference, section 4 (guest store).

use crate::TeeError;
use crate::attribute::Fault;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use dstack_attest::wire::{ATTESTATION_BYTES_MAX, EVENTS_MAX, EventVersion, RuntimeEvent};
use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Where a dstack guest keeps it.
pub const RUNTIME_EVENTS: &str = "/run/log/dstack/runtime_events.log";
/// Longest payload of an event.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 10;
/// Longest name of an event.
pub const NAME_BYTES_MAX: usize = 256;

/// A register that runtime events extend.
pub trait Register {
    /// That `log` is what the register holds so far.
    ///
    /// # Errors
    /// [`TeeError::LogDiverged`] where it is not, [`TeeError::NoRegister`] where nothing can be measured, the device's own.
    fn require(&self, log: &[RuntimeEvent]) -> Result<(), TeeError>;

    /// Extends the register by the digest of `event`.
    ///
    /// # Errors
    /// As [`Self::require`].
    fn measure(&self, event: &RuntimeEvent) -> Result<(), TeeError>;
}

/// The file.
#[derive(Debug, Clone)]
pub struct RuntimeLog {
    path: PathBuf,
}

/// One line.
#[derive(Serialize, Deserialize)]
struct Line {
    event: String,
    payload: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
}

impl RuntimeLog {
    /// The log at `path`, [`RUNTIME_EVENTS`] in production. Nothing is touched yet.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// All events in order; none where there is no file.
    ///
    /// # Errors
    /// [`TeeError::File`], [`TeeError::BadEvents`] with the first line that is no event.
    pub fn read(&self) -> Result<Vec<RuntimeEvent>, TeeError> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(self.failed(&error)),
        };
        file.lock_shared().map_err(|error| self.failed(&error))?;
        self.parse(&mut file)
    }

    /// Measures `event` into `registers`, then appends it. Nobody else appends meanwhile.
    ///
    /// An end between the two steps leaves registers ahead of the log: no verifier accepts this guest any more, and neither does the next
    /// append ([`TeeError::LogDiverged`]). Only a new boot heals that.
    ///
    /// # Errors
    /// [`TeeError::BadEvent`] for an event that verifiers would refuse, those of the registers, [`TeeError::File`].
    pub fn append(&self, event: &RuntimeEvent, registers: &[&dyn Register]) -> Result<(), TeeError> {
        if let Some(dir) = self.path.parent() {
            DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(|error| self.failed(&error))?;
        }
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).mode(0o644).open(&self.path).map_err(|error| self.failed(&error))?;
        file.lock().map_err(|error| self.failed(&error))?;
        let log = self.parse(&mut file)?;
        check(event, &log)?;
        for register in registers {
            register.require(&log)?;
        }
        for register in registers {
            register.measure(event)?;
        }
        let version = (event.version == EventVersion::V2).then_some(2);
        let line = Line { event: event.event.clone(), payload: BASE64.encode(&event.payload), version };
        let mut line = serde_json::to_string(&line).map_err(|_| TeeError::BadEvent { why: "has no JSON form" })?;
        line.push('\n');
        file.write_all(line.as_bytes()).and_then(|()| file.sync_data()).map_err(|error| self.failed(&error))
    }

    fn parse(&self, file: &mut File) -> Result<Vec<RuntimeEvent>, TeeError> {
        let limit_bytes = ATTESTATION_BYTES_MAX;
        let mut text = String::new();
        let mut bounded = file.take(limit_bytes as u64 + 1);
        bounded.read_to_string(&mut text).map_err(|error| self.failed(&error))?;
        if text.len() > limit_bytes {
            return Err(TeeError::TooLarge { what: "the runtime event log", have_bytes: text.len(), limit_bytes });
        }
        let mut events = Vec::new();
        for (index, line) in text.lines().enumerate() {
            if events.len() >= EVENTS_MAX {
                return Err(TeeError::TooLarge { what: "the runtime event log, in events", have_bytes: index, limit_bytes: EVENTS_MAX });
            }
            events.push(event_of(line).map_err(|why| TeeError::BadEvents {
                path: self.path.display().to_string(),
                line: index.saturating_add(1),
                why,
            })?);
        }
        Ok(events)
    }

    fn failed(&self, error: &std::io::Error) -> TeeError {
        match error.raw_os_error() {
            Some(errno) => TeeError::file(&self.path, Fault::Errno(rustix::io::Errno::from_raw_os_error(errno))),
            None => TeeError::BadEvents { path: self.path.display().to_string(), line: 0, why: "the file is not UTF-8" },
        }
    }
}

fn event_of(line: &str) -> Result<RuntimeEvent, &'static str> {
    let line: Line = serde_json::from_str(line).map_err(|_| "no object with event and payload")?;
    let payload = BASE64.decode(line.payload).map_err(|_| "its payload is not base64")?;
    let version = match line.version {
        None | Some(1) => EventVersion::V1,
        Some(2) => EventVersion::V2,
        Some(_) => return Err("its version is neither 1 nor 2"),
    };
    Ok(RuntimeEvent { event: line.event, payload, version })
}

/// What would make the whole log worthless is refused before it is measured.
pub(crate) fn check(event: &RuntimeEvent, log: &[RuntimeEvent]) -> Result<(), TeeError> {
    let names_count = !log.iter().any(|event| event.event == "system-ready");
    let why = if event.event.is_empty() || event.event.len() > NAME_BYTES_MAX {
        "has a name of no or more than 256 bytes"
    } else if event.payload.len() > PAYLOAD_BYTES_MAX {
        "has a payload of more than 64 KiB"
    } else if names_count && event.version == EventVersion::V1 && event.event.contains(':') {
        "has a colon in its name, which version 1 cannot tell from its payload before system-ready"
    } else if log.len() >= EVENTS_MAX {
        "is one too many"
    } else {
        return Ok(());
    };
    Err(TeeError::BadEvent { why })
}

#[cfg(test)]
mod tests;
