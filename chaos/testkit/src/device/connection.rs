//! One connection of the device: frames in, frames out, its guest. Source: `dstack_tee::software::protocol`.
//! Never: waits without a limit, keeps anything after the connection ends.

use std::io::{Error, ErrorKind, Read, Result};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use dstack_attest::wire::EVENTS_MAX;
use dstack_runtime::clock::Clock;
use dstack_tee::runtime_log::{NAME_BYTES_MAX, PAYLOAD_BYTES_MAX};
use dstack_tee::software::frame::{read_frame, write_frame};
use dstack_tee::software::protocol::{
    Boot, COMPOSE_BYTES_MAX, EmulatedPlatform, HexArray, HexBytes, KeyHex, Measure, PURPOSE_BYTES_MAX, Quote, Refused, RefusedCode,
    Request, Response,
};
use zeroize::Zeroizing;

use crate::error::TestkitError;
use crate::eventlog::RuntimeEvent;
use crate::host::Host;
use crate::measure::Measured;

/// What one connection knows.
pub(crate) struct Connection<'a> {
    host: &'a Host,
    clock: &'a dyn Clock,
    /// The executable of who connected; after a boot, the guest.
    measured: std::result::Result<Measured, TestkitError>,
}

impl<'a> Connection<'a> {
    pub(crate) fn new(host: &'a Host, clock: &'a dyn Clock, executable: std::result::Result<[u8; 48], TestkitError>) -> Self {
        Self { host, clock, measured: executable.map(Measured::Executable) }
    }

    /// Answers frames until the client closes, is silent for too long, or sends what is no frame.
    pub(crate) fn run(mut self, stream: &UnixStream) -> Result<()> {
        stream.set_write_timeout(Some(FRAME_TIME))?;
        loop {
            let frame = match read_frame(&mut Patient::new(stream)) {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::InvalidData => {
                    return send(stream, &refused(RefusedCode::BadRequest, error));
                }
                Err(error) => return Err(error),
            };
            let response = match serde_json::from_slice::<Request>(&frame) {
                Ok(request) => self.answer(request).unwrap_or_else(Response::Refused),
                Err(error) => refused(RefusedCode::BadRequest, error),
            };
            send(stream, &response)?;
            if matches!(&response, Response::Refused(Refused { code: RefusedCode::BadRequest, .. })) {
                return Ok(());
            }
        }
    }

    fn answer(&mut self, request: Request) -> std::result::Result<Response, Refused> {
        match request {
            Request::Describe => Ok(Response::Description(self.host.description(self.measured()?))),
            Request::Boot(boot) => self.boot(&boot),
            Request::Start => self.start(),
            Request::Measure(event) => self.measure(event),
            Request::Evidence { report_data: HexArray(report_data) } => {
                let evidence = self.host.evidence(self.measured()?, &report_data, self.clock.now()).map_err(failed)?;
                Ok(Response::Evidence { evidence: HexBytes(evidence) })
            }
            Request::PlatformKey { purpose: HexBytes(purpose) } => {
                bounded("purpose", purpose.len(), PURPOSE_BYTES_MAX)?;
                let key = self.host.platform_key(self.measured()?, &purpose).ok_or_else(|| Refused {
                    code: RefusedCode::NoPlatformKey,
                    message: "this machine has no measurement-bound key".to_owned(),
                })?;
                Ok(Response::PlatformKey { key: key.expose(KeyHex::new) })
            }
            Request::Quote { report_data: HexArray(report_data) } => {
                let attested = self.host.attest(self.measured()?, &report_data, self.clock.now()).map_err(failed)?;
                Ok(Response::Quote(Quote { quote: HexBytes(attested.quote), event_log: attested.event_log, vm_config: attested.vm_config }))
            }
        }
    }

    fn boot(&mut self, boot: &Boot) -> std::result::Result<Response, Refused> {
        bounded("compose", boot.compose.0.len(), COMPOSE_BYTES_MAX)?;
        self.no_guest_yet()?;
        let (guest, booted) = self.host.boot(boot);
        self.measured = Ok(guest);
        Ok(Response::Booted(booted))
    }

    fn no_guest_yet(&self) -> std::result::Result<(), Refused> {
        match self.measured {
            Ok(Measured::Guest(_) | Measured::Started(_)) => {
                Err(Refused { code: RefusedCode::AlreadyBooted, message: "this connection has booted a guest".to_owned() })
            }
            _ => Ok(()),
        }
    }

    fn start(&mut self) -> std::result::Result<Response, Refused> {
        self.no_guest_yet()?;
        if self.host.emulated() != EmulatedPlatform::Tdx {
            return Err(no_register());
        }
        self.measured = Ok(Measured::Started(Vec::new()));
        Ok(Response::Done)
    }

    fn measure(&mut self, event: Measure) -> std::result::Result<Response, Refused> {
        bounded("event", event.event.len(), NAME_BYTES_MAX)?;
        bounded("payload", event.payload.0.len(), PAYLOAD_BYTES_MAX)?;
        if self.host.emulated() != EmulatedPlatform::Tdx {
            return Err(no_register());
        }
        let events = self.measured()?.td_registers().events.len();
        bounded("event log in events", events.saturating_add(1), EVENTS_MAX)?;
        let event = RuntimeEvent::new(&event.event, event.payload.0);
        let extended = self.measured.as_mut().is_ok_and(|measured| measured.extend(event));
        extended.then_some(Response::Done).ok_or_else(no_register)
    }

    fn measured(&self) -> std::result::Result<&Measured, Refused> {
        self.measured.as_ref().map_err(|error| Refused { code: RefusedCode::UnknownCaller, message: error.to_string() })
    }
}

fn no_register() -> Refused {
    Refused { code: RefusedCode::NoRegister, message: "only a guest on TDX measures events".to_owned() }
}

fn bounded(what: &str, have: usize, max: usize) -> std::result::Result<(), Refused> {
    if have <= max {
        return Ok(());
    }
    Err(Refused { code: RefusedCode::BadRequest, message: format!("{what} of {have} bytes, allowed {max}") })
}

fn failed(error: TestkitError) -> Refused {
    tracing::error!(%error, "software device failed");
    Refused { code: RefusedCode::Internal, message: error.to_string() }
}

fn refused(code: RefusedCode, message: impl ToString) -> Response {
    Response::Refused(Refused { code, message: message.to_string() })
}

fn send(mut stream: &UnixStream, response: &Response) -> Result<()> {
    // Responses can hold a key: the buffer is wiped.
    let frame = Zeroizing::new(serde_json::to_vec(response).map_err(Error::other)?);
    write_frame(&mut stream, &frame)
}

/// Reads one frame: waits long for its first byte, and from then on briefly for all of it.
struct Patient<'a> {
    stream: &'a UnixStream,
    deadline: Option<Instant>,
}

impl<'a> Patient<'a> {
    fn new(stream: &'a UnixStream) -> Self {
        Self { stream, deadline: None }
    }
}

impl Read for Patient<'_> {
    fn read(&mut self, out: &mut [u8]) -> Result<usize> {
        let left = match self.deadline {
            None => IDLE_TIME,
            Some(deadline) => deadline.saturating_duration_since(Instant::now()),
        };
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        let count = self.stream.read(out)?;
        self.deadline.get_or_insert_with(|| Instant::now() + FRAME_TIME);
        Ok(count)
    }
}

/// How long a connection may be silent between two requests; clients connect, and boot, again.
const IDLE_TIME: Duration = Duration::from_secs(24 * 3600);
/// How long one frame may take, in either direction.
const FRAME_TIME: Duration = Duration::from_secs(10);
