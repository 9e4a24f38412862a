//! The software device's client. Owns: one connection, and booting again after it was lost. Never: trusts the device's root;
//! whoever verifies the evidence was told of it in a config.

use super::connection::Connection;
use super::protocol::{
    Boot, Booted, COMPOSE_BYTES_MAX, HexArray, HexBytes, Measure, PROTOCOL_VERSION, PURPOSE_BYTES_MAX, RefusedCode, Request, Response,
};
use crate::runtime_log::check;
use crate::{Description, Device, Quote, TeeError};
use dstack_attest::wire::{Attestation, Encoding, EventVersion, PlatformEvidence, RuntimeEvent, TdxEvent};
use dstack_protocol::Platform;
use dstack_secret::Secret;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// How long a device may take for one read or write. Making a quote takes milliseconds; a loaded machine some more.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A device behind a unix socket. Calls from several threads take turns.
#[derive(Debug)]
pub struct SoftwareDevice {
    path: PathBuf,
    limit: Duration,
    platform: Platform,
    session: Mutex<Session>,
}

/// The connection, while there is one, and what was booted on it.
#[derive(Debug, Default)]
struct Session {
    connection: Option<Connection>,
    /// Repeated on a new connection, since a device forgets a guest with its connection.
    guest: Option<Guest>,
    /// Measured after the guest began; repeated as well.
    events: Vec<RuntimeEvent>,
}

/// How the guest of a session began.
#[derive(Debug, Clone)]
enum Guest {
    Booted(Box<(Boot, Booted)>),
    Started,
}

impl SoftwareDevice {
    /// Connects to the socket and asks what is there. Each answer may take [`ANSWER_LIMIT`].
    ///
    /// # Errors
    /// [`TeeError::Connect`], [`TeeError::Version`], or those of a call.
    pub fn open(path: &Path) -> Result<Self, TeeError> {
        Self::open_within(path, ANSWER_LIMIT)
    }

    /// As [`Self::open`] with another limit.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_within(path: &Path, limit: Duration) -> Result<Self, TeeError> {
        let mut connection = Connection::open(path, limit)?;
        let description = match connection.call(&Request::Describe)? {
            Response::Description(description) => description,
            _ => return Err(OTHER_ANSWER),
        };
        if description.version != PROTOCOL_VERSION {
            return Err(TeeError::Version { got: description.version, want: PROTOCOL_VERSION });
        }
        let platform = description.platform.platform();
        tracing::warn!(device = %path.display(), platform = platform.name(), "evidence comes from a software device, no hardware stands behind it");
        let session = Mutex::new(Session { connection: Some(connection), ..Session::default() });
        Ok(Self { path: path.to_owned(), limit, platform, session })
    }

    /// Asks, over a new connection where the old one broke. Every request gives the same answer twice but `Boot`, which
    /// only ever is the first on a connection, so asking again is safe. An event that was on its way when the connection broke counts
    /// for nothing, since the register went with the connection: it is measured again after those before it.
    fn call(&self, request: &Request) -> Result<Response, TeeError> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        match session.call(self, request) {
            Err(TeeError::Broken { .. }) => session.call(self, request),
            result => result,
        }
    }
}

impl Session {
    fn call(&mut self, device: &SoftwareDevice, request: &Request) -> Result<Response, TeeError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect(device)?,
        };
        let result = connection.call(request);
        // after a refusal the connection is whole, unless the device says that it could not read the request
        if result.is_ok() || matches!(&result, Err(TeeError::Refused { code, .. }) if *code != RefusedCode::BadRequest) {
            self.connection = Some(connection);
        }
        result
    }

    /// A new connection, with the guest booted again if there was one.
    fn connect(&self, device: &SoftwareDevice) -> Result<Connection, TeeError> {
        let mut connection = Connection::open(&device.path, device.limit)?;
        match &self.guest {
            None => {}
            Some(Guest::Started) => done(&connection.call(&Request::Start)?)?,
            Some(Guest::Booted(guest)) => match connection.call(&Request::Boot(guest.0.clone()))? {
                Response::Booted(again) if again == guest.1 => tracing::info!("guest booted again after a lost connection"),
                Response::Booted(_) => return Err(TeeError::OtherIdentity),
                _ => return Err(OTHER_ANSWER),
            },
        }
        for event in &self.events {
            done(&connection.call(&measure(event))?)?;
        }
        Ok(connection)
    }
}

fn measure(event: &RuntimeEvent) -> Request {
    Request::Measure(Measure { event: event.event.clone(), payload: HexBytes(event.payload.clone()) })
}

const fn done(answer: &Response) -> Result<(), TeeError> {
    match answer {
        Response::Done => Ok(()),
        _ => Err(OTHER_ANSWER),
    }
}

const OTHER_ANSWER: TeeError = TeeError::Protocol { why: "an answer to another request" };

impl Device for SoftwareDevice {
    fn platform(&self) -> Platform {
        self.platform
    }

    fn evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, TeeError> {
        let evidence = match self.call(&Request::Evidence { report_data: HexArray(report_data) })? {
            Response::Evidence { evidence } => evidence.0,
            _ => return Err(OTHER_ANSWER),
        };
        // refuse here what every verifier would refuse later
        if Encoding::of(&evidence) != Ok(Encoding::ScaleV0) {
            return Err(TeeError::BadEvidence { why: "is not SCALE V0" });
        }
        let attestation = Attestation::decode(&evidence).map_err(TeeError::UndecodableEvidence)?;
        if attestation.platform.platform() != self.platform {
            return Err(TeeError::BadEvidence { why: "is of another platform than the device" });
        }
        if attestation.report_data != report_data {
            return Err(TeeError::BadEvidence { why: "is bound to other report data" });
        }
        Ok(evidence)
    }

    /// The emulated machine says its whole log beside a quote; the quote in the evidence explains it as well.
    fn whole_evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, TeeError> {
        let mut attestation = Attestation::decode(&self.evidence(report_data)?).map_err(TeeError::UndecodableEvidence)?;
        if let PlatformEvidence::Tdx(td) = &mut attestation.platform {
            let log = self.quote(report_data)?.event_log;
            td.event_log = TdxEvent::parse_log(log.as_bytes()).map_err(TeeError::UndecodableEvidence)?;
        }
        Ok(attestation.encode())
    }

    fn quote(&self, report_data: [u8; 64]) -> Result<Quote, TeeError> {
        match self.call(&Request::Quote { report_data: HexArray(report_data) })? {
            Response::Quote(quote) => Ok(Quote { quote: quote.quote.0, event_log: quote.event_log, vm_config: quote.vm_config }),
            _ => Err(OTHER_ANSWER),
        }
    }

    fn platform_key(&self, purpose: &[u8]) -> Result<Option<Secret<32>>, TeeError> {
        check_size("the purpose", purpose.len(), PURPOSE_BYTES_MAX)?;
        match self.call(&Request::PlatformKey { purpose: HexBytes(purpose.to_vec()) }) {
            Ok(Response::PlatformKey { key }) => Ok(Some(key.expose(|key| Secret::from_fn(|bytes| bytes.copy_from_slice(key))))),
            Ok(_) => Err(OTHER_ANSWER),
            Err(TeeError::Refused { code: RefusedCode::NoPlatformKey, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn boot_app(&self, boot: Boot) -> Result<Booted, TeeError> {
        check_size("the compose document", boot.compose.0.len(), COMPOSE_BYTES_MAX)?;
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if session.guest.is_some() {
            let message = "a guest was booted on this device value already".to_owned();
            return Err(TeeError::Refused { code: RefusedCode::AlreadyBooted, message });
        }
        // not repeated when the connection breaks: the caller learns of it and starts over
        match session.call(self, &Request::Boot(boot.clone()))? {
            Response::Booted(booted) => {
                session.guest = Some(Guest::Booted(Box::new((boot, booted.clone()))));
                Ok(booted)
            }
            _ => Err(OTHER_ANSWER),
        }
    }

    fn start_app(&self) -> Result<(), TeeError> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if session.guest.is_some() {
            let message = "a guest runs on this device value already".to_owned();
            return Err(TeeError::Refused { code: RefusedCode::AlreadyBooted, message });
        }
        done(&session.call(self, &Request::Start)?)?;
        session.guest = Some(Guest::Started);
        Ok(())
    }

    fn measure(&self, event: &RuntimeEvent) -> Result<(), TeeError> {
        if event.version != EventVersion::V1 {
            return Err(TeeError::BadEvent { why: "is of version 2, which an emulated guest does not measure" });
        }
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        // what would make the whole log worthless is refused before it is measured, as on hardware
        let booted = matches!(session.guest, Some(Guest::Booted(_)));
        let ready = RuntimeEvent { event: "system-ready".to_owned(), payload: Vec::new(), version: EventVersion::V1 };
        let log: Vec<RuntimeEvent> = booted.then_some(ready).into_iter().chain(session.events.iter().cloned()).collect();
        check(event, &log)?;
        let request = measure(event);
        let answer = match session.call(self, &request) {
            Err(TeeError::Broken { .. }) => session.call(self, &request),
            answer => answer,
        };
        match answer {
            Err(TeeError::Refused { code: RefusedCode::NoRegister, .. }) => return Err(TeeError::NoEvents),
            answer => done(&answer?)?,
        }
        session.events.push(event.clone());
        Ok(())
    }

    fn describe(&self) -> Result<Description, TeeError> {
        match self.call(&Request::Describe)? {
            Response::Description(description) => Ok(description.into()),
            _ => Err(OTHER_ANSWER),
        }
    }

    fn is_software(&self) -> bool {
        true
    }
}

const fn check_size(what: &'static str, have_bytes: usize, limit_bytes: usize) -> Result<(), TeeError> {
    if have_bytes > limit_bytes { Err(TeeError::TooLarge { what, have_bytes, limit_bytes }) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
