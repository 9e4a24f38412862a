//! A local key provider of our own: the protocol of dstack's SGX provider over TCP. Owns: judging a TD's quote, the key of its measurements,
//! the sealed box, an SGX-type quote over it. Never: gives two TDs of different measurements one key.
//! Source: util and deploy reference §4 (local); Intel SGX ECDSA Quote Library API, appendix A (quote v3).
//!
//! Its "sealing key" depends on the roots and the provider's name alone, as an enclave's depends on processor and MRENCLAVE.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crypto_box::PublicKey;
use crypto_box::aead::OsRng;
use dstack_attest::{CollateralBundle, TrustRoots, tdx};
use dstack_runtime::clock::{Clock, SystemClock};
use dstack_secret::Secret;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::TestkitError;
use crate::key::derive_secret;
use crate::roots::SoftwareRoots;
use crate::tdx::QuotingEnclave;

/// Largest question.
const QUESTION_BYTES_MAX: usize = 1 << 20;
/// For one connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// A provider that listens. Dropping it stops it.
pub struct LocalProvider {
    address: SocketAddr,
    stopping: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

struct Enclave {
    quoting: QuotingEnclave,
    sealing: Secret<32>,
    mr_enclave: [u8; 32],
    roots: TrustRoots,
    bundle: Vec<u8>,
}

#[derive(Deserialize)]
struct Question {
    quote: Vec<u8>,
}

#[derive(Serialize)]
struct Answer {
    encrypted_key: Vec<u8>,
    provider_quote: Vec<u8>,
}

/// MRENCLAVE of the provider `name`.
#[must_use]
pub fn mr_enclave(name: &str) -> [u8; 32] {
    Sha256::new().chain_update(b"dstack software TEE 1: key provider ").chain_update(name).finalize().into()
}

impl LocalProvider {
    /// Starts the provider `name` on a free port of loopback.
    ///
    /// # Errors
    /// [`TestkitError`] of the roots; [`TestkitError::File`] when it cannot listen.
    pub fn start(name: &str, roots: &SoftwareRoots) -> Result<Self, TestkitError> {
        let quoting = roots.quoting_enclave(name, roots.platform(name), roots.validity())?;
        let trusted = TrustRoots::none().with_software_root(roots.tdx_root_der());
        let trusted = trusted.map_err(|error| TestkitError::damaged("the software root", error))?;
        let enclave = Enclave {
            quoting,
            sealing: derive_secret(&roots.sealing_secret(name), &[b"key provider"]),
            mr_enclave: mr_enclave(name),
            roots: trusted,
            bundle: roots.bundle().to_vec(),
        };
        let failed = |error: io::Error| TestkitError::file("loopback", error);
        let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let stopping = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&stopping);
        let accepting = std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                if let Err(error) = enclave.serve(&stream) {
                    tracing::warn!(reason = %error, "no key given");
                }
            }
        });
        Ok(Self { address, stopping, accepting: Some(accepting) })
    }

    /// `host:port`.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.to_string()
    }
}

impl Drop for LocalProvider {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        // wakes the blocked accept
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

impl Enclave {
    fn serve(&self, mut stream: &TcpStream) -> io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        let length = usize::try_from(u32::from_be_bytes(length)).map_err(io::Error::other)?;
        if length > QUESTION_BYTES_MAX {
            return Err(io::Error::other("a question of more than 1 MiB"));
        }
        let mut question = vec![0; length];
        stream.read_exact(&mut question)?;
        let question: Question = serde_json::from_slice(&question)?;
        let answer = serde_json::to_vec(&self.answer(&question.quote).map_err(io::Error::other)?)?;
        let length = u32::try_from(answer.len()).map_err(io::Error::other)?;
        stream.write_all(&length.to_be_bytes())?;
        stream.write_all(&answer)
    }

    fn answer(&self, quote: &[u8]) -> Result<Answer, String> {
        let text = |error: dstack_attest::AttestError| error.to_string();
        let bundle = CollateralBundle::parse(&self.bundle).map_err(text)?;
        let collateral = bundle.tdx(&tdx::claimed_fmspc(quote).map_err(text)?).map_err(text)?;
        let td = tdx::verify_quote(quote, collateral, SystemClock::new().now().0, &self.roots).map_err(text)?;
        let body = td.body();
        let registers = [&body.mr_td[..], body.rtmr.as_flattened()].concat();
        let key: [u8; 32] = self.sealing.expose(|sealing| Sha256::new().chain_update(sealing).chain_update(registers).finalize().into());
        let recipient = body.report_data.first_chunk::<32>().ok_or("no public key")?;
        let encrypted_key = PublicKey::from_bytes(*recipient).seal(&mut OsRng, &key).map_err(|error| error.to_string())?;
        let mut report_data = [0; 64];
        for (to, from) in report_data.iter_mut().zip(Sha256::digest(&encrypted_key)) {
            *to = from;
        }
        Ok(Answer { provider_quote: self.quoting.sgx_quote(&self.mr_enclave, &report_data), encrypted_key })
    }
}
