//! A server with the interface of Intel's collateral service, for tests: it serves what it is given, or lies and fails on demand.
//! Owns: the paths and headers of PCS v4 as a PCCS answers them; any other path that a test puts (AMD's, a certificate's links). Never: listens on anything but loopback, checks what it serves.
//! Source: Intel SGX and TDX PCS API v4; PCCS for `rootcacrl` (hex of the DER).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dstack_attest::{CollateralBundle, TdxCollateral};

use crate::TestkitError;
use crate::listening::Listening;

/// What the server does instead of answering rightly.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Fault {
    /// Nothing: it answers.
    #[default]
    None,
    /// This status, without a body.
    Status(u16),
    /// A pause before each answer.
    Slow(Duration),
    /// A body of this many bytes.
    Oversized(usize),
    /// A redirect to this address.
    Redirect(String),
    /// Right bytes under a content type of a web page.
    WrongType,
    /// The headers promise more than comes.
    Truncated,
    /// Compressed, it says.
    Encoded,
    /// Bytes that are nothing.
    Garbage,
    /// `UpToDate` becomes `OutOfDate` in signed texts.
    Altered,
}

#[derive(Debug, Default)]
struct Content {
    platforms: BTreeMap<[u8; 6], TdxCollateral>,
    /// Other targets, query included, with content type and body.
    files: BTreeMap<String, (&'static str, Vec<u8>)>,
    fault: Fault,
    requests: u64,
}

/// A running server; ends when dropped.
#[derive(Debug)]
pub struct Pccs {
    listening: Listening,
    content: Arc<Mutex<Content>>,
}

impl Pccs {
    /// Listens on a free port of loopback, or on this one, with nothing to serve yet.
    ///
    /// # Errors
    /// [`TestkitError::File`]: the port is taken.
    pub fn start(port: u16) -> Result<Self, TestkitError> {
        let content = Arc::<Mutex<Content>>::default();
        let shared = Arc::clone(&content);
        Ok(Self { listening: Listening::start("pccs listener", port, move |stream| answer(stream, &shared))?, content })
    }

    /// Base address.
    pub fn url(&self) -> String {
        self.listening.url()
    }

    /// Serves this from now on.
    pub fn serve(&self, bundle: &CollateralBundle) {
        lock(&self.content).platforms = bundle.tdx_platforms().clone();
    }

    /// Also answers this target (path and query) so: AMD's service, and what certificates point at.
    pub fn put(&self, target: &str, kind: &'static str, body: &[u8]) {
        lock(&self.content).files.insert(target.to_owned(), (kind, body.to_vec()));
    }

    /// Behaves so from now on.
    pub fn fault(&self, fault: Fault) {
        lock(&self.content).fault = fault;
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        lock(&self.content).requests
    }
}

struct Reply {
    kind: &'static str,
    header: Option<(&'static str, String)>,
    body: Vec<u8>,
}

fn answer(mut stream: TcpStream, content: &Mutex<Content>) {
    let Some(target) = request_target(&mut stream) else { return };
    let (reply, fault) = {
        let mut content = lock(content);
        content.requests += 1;
        (reply(&content, &target), content.fault.clone())
    };
    // The client may have gone: nothing to say to it then.
    let _ = stream.write_all(&encoded(reply, fault));
}

fn encoded(reply: Option<Reply>, fault: Fault) -> Vec<u8> {
    let status = |status: u16| format!("HTTP/1.1 {status} Test\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").into_bytes();
    let Some(mut reply) = reply else { return status(404) };
    let mut more = String::new();
    let mut promised = None;
    match fault {
        Fault::None => {}
        Fault::Status(code) => return status(code),
        Fault::Slow(pause) => std::thread::sleep(pause),
        Fault::Oversized(bytes) => reply.body.resize(bytes, b' '),
        Fault::Redirect(to) => {
            return format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").into_bytes();
        }
        Fault::WrongType => reply.kind = "text/html+page",
        Fault::Truncated => promised = Some(reply.body.len() + 100),
        Fault::Encoded => more.push_str("Content-Encoding: gzip\r\n"),
        Fault::Garbage => reply.body = vec![0xfe; 99],
        Fault::Altered => {
            if let Ok(text) = String::from_utf8(reply.body.clone()) {
                reply.body = text.replace("UpToDate", "OutOfDate").into_bytes();
            }
        }
    }
    if let Some((name, value)) = &reply.header {
        let _infallible = write!(more, "{name}: {value}\r\n");
    }
    let length = promised.unwrap_or(reply.body.len());
    let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {}\r\nContent-Length: {length}\r\n{more}Connection: close\r\n\r\n", reply.kind);
    [head.into_bytes(), reply.body].concat()
}

fn reply(content: &Content, target: &str) -> Option<Reply> {
    const JSON: &str = "application/json";
    let any = content.platforms.values().next();
    let signed = |member: &str, text: &str, signature: &[u8]| {
        format!("{{\"{member}\":{text},\"signature\":\"{}\"}}", hex::encode(signature)).into_bytes()
    };
    if let Some((kind, body)) = content.files.get(target) {
        return Some(Reply { kind, header: None, body: body.clone() });
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    match path {
        "/tdx/certification/v4/tcb" => {
            let mut fmspc = [0; 6];
            hex::decode_to_slice(query.strip_prefix("fmspc=")?, &mut fmspc).ok()?;
            let one = content.platforms.get(&fmspc)?;
            let header = Some(("TCB-Info-Issuer-Chain", percent(&one.tcb_info_issuer_chain)));
            Some(Reply { kind: JSON, header, body: signed("tcbInfo", &one.tcb_info, &one.tcb_info_signature) })
        }
        "/tdx/certification/v4/qe/identity" => {
            let one = any?;
            let header = Some(("SGX-Enclave-Identity-Issuer-Chain", percent(&one.qe_identity_issuer_chain)));
            Some(Reply { kind: JSON, header, body: signed("enclaveIdentity", &one.qe_identity, &one.qe_identity_signature) })
        }
        "/sgx/certification/v4/pckcrl" => {
            let one = any?;
            let header = Some(("SGX-PCK-CRL-Issuer-Chain", percent(&one.pck_crl_issuer_chain)));
            Some(Reply { kind: "application/pkix-crl", header, body: one.pck_crl.clone() })
        }
        "/sgx/certification/v4/rootcacrl" => {
            Some(Reply { kind: "text/plain", header: None, body: hex::encode(&any?.root_ca_crl).into_bytes() })
        }
        _ => None,
    }
}

/// The target of a GET; headers are read and passed over.
fn request_target(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 1024];
    while !bytes.windows(4).any(|window| window == b"\r\n\r\n") {
        let count = stream.read(&mut chunk).ok().filter(|count| *count > 0)?;
        bytes.extend_from_slice(chunk.get(..count)?);
        if bytes.len() > 16 * 1024 {
            return None;
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    text.strip_prefix("GET ")?.split(' ').next().map(str::to_owned)
}

/// Percent-encodes all but letters and digits, as the service does with a chain in a header.
fn percent(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() {
            out.push(char::from(byte));
        } else {
            let _infallible = write!(out, "%{byte:02X}");
        }
        out
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
