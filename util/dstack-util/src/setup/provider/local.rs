//! The key provider beside this machine: an SGX enclave that gives a TD the key of its measurements. Owns: both ways to ask it, what its
//! answer must prove, opening the sealed box. Never: takes a key from a quote that is not bound to it.
//! Source: util and deploy reference §4 (local).
//!
//! The provider's quote proves which enclave sealed the box. It is verified with the SGX collateral that the operator names; without any, the
//! quote's binding to the box is checked but not its signature, so a host could make both: refused, unless the operator wishes it.

use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::Duration;

use crypto_box::SecretKey;
use dstack_attest::tdx::verify_enclave;
use dstack_attest::{AttestError, TdxCollateral};
use dstack_protocol::UnixMillis;
use dstack_protocol::codec::sha256;
use dstack_ratls::attest_judge::TrustMaterial;
use dstack_secret::Secret;
use dstack_tee::{Device, TeeError};
use serde::{Deserialize, Serialize};
use zeroize::Zeroize as _;

use crate::host_api::{HostError, HostUrl, SealingKey};

/// Largest answer of a provider.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// For connecting, and for each read.
const PATIENCE: Duration = Duration::from_secs(60);

/// Header of an SGX quote: version(u16) 3, key type(u16), TEE type(u32) 0, …, 48 bytes.
const HEADER_BYTES: usize = 48;
/// MRENCLAVE in a report body of 384 bytes.
const MR_ENCLAVE_AT: usize = 64;
/// Report data in it.
const REPORT_DATA_AT: usize = 320;
const BODY_BYTES: usize = 384;

/// Why the local provider gives no key.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LocalError {
    /// The device makes no quote.
    #[error("no quote to show the key provider: {0}")]
    Device(#[from] TeeError),
    /// The host's API.
    #[error("{0}")]
    Host(#[from] HostError),
    /// The provider cannot be reached or broke off.
    #[error("the key provider at {address} {what}")]
    Unreachable {
        /// Where.
        address: String,
        /// What it did.
        what: String,
    },
    /// Its answer is not of the documented form.
    #[error("the key provider's answer {why}")]
    Answer {
        /// What is wrong.
        why: &'static str,
    },
    /// Its quote is not over the key that it sent. Somebody between changed one of them: refuse.
    #[error("the key provider's quote is not bound to the key it sent")]
    NotBound,
    /// The box does not open: sealed for another request.
    #[error("the key provider's box does not open with this request's key")]
    Box,
    /// The quote is not verified. Operator's to decide.
    #[error(
        "the key provider's quote (MRENCLAVE {mr_enclave}) cannot be verified without SGX collateral, so the host could have made the key: \
         name it by --provider-collateral, or say --insecure-unverified-provider if the host is trusted"
    )]
    Unverified {
        /// Hex.
        mr_enclave: String,
    },
    /// The quote does not verify, or its platform's TCB is not accepted. Refuse.
    #[error("the key provider's quote: {0}")]
    Quote(AttestError),
    /// No randomness.
    #[error("the system gives no randomness")]
    Randomness,
}

/// What the provider's quote is judged by.
pub enum Judging {
    /// SGX collateral of its platform, whose roots are trusted at what time, and which TCB statuses are accepted.
    By {
        /// TCB info `SGX`, QE identity `QE`.
        collateral: Box<TdxCollateral>,
        /// Roots and accepted TCB.
        material: Box<TrustMaterial>,
        /// Now.
        now: UnixMillis,
    },
    /// By nothing, because the operator trusts the host.
    Unverified,
    /// Not at all: refuse.
    Refuse,
}

/// Where the provider is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Through the host's API.
    Host(HostUrl),
    /// By its own protocol, `host:port`.
    Tcp(String),
}

/// A seed and the enclave that gave it.
#[derive(Debug)]
pub struct LocalSeed {
    /// `SHA-256(sealing key ‖ MRTD ‖ RTMR0 ‖ … ‖ RTMR3)` of an honest provider.
    pub seed: Secret<32>,
    /// MRENCLAVE.
    pub mr_enclave: Vec<u8>,
}

/// Asks for the seed of this machine's measurements. `judging`: see the module text.
///
/// # Errors
/// [`LocalError`].
pub fn seed(device: &dyn Device, place: &Place, judging: &Judging, runtime: &tokio::runtime::Runtime) -> Result<LocalSeed, LocalError> {
    let mut scalar = [0u8; 32];
    getrandom::fill(&mut scalar).map_err(|_| LocalError::Randomness)?;
    let own = SecretKey::from_bytes(scalar);
    scalar.zeroize();
    let mut report_data = [0; 64];
    for (to, from) in report_data.iter_mut().zip(own.public_key().as_bytes()) {
        *to = *from;
    }
    let quote = device.quote(report_data)?.quote;
    let answer = match place {
        Place::Host(host) => runtime.block_on(host.sealing_key(&quote))?,
        Place::Tcp(address) => ask(address, &quote)?,
    };
    open(&own, &answer, judging)
}

fn open(own: &SecretKey, answer: &SealingKey, judging: &Judging) -> Result<LocalSeed, LocalError> {
    let (mr_enclave, report_data) = read_quote(&answer.provider_quote)?;
    let hash = sha256(&[&answer.encrypted_key]);
    if report_data.get(..32) != Some(&hash) {
        return Err(LocalError::NotBound);
    }
    match judging {
        Judging::By { collateral, material, now } => {
            let verified = verify_enclave(&answer.provider_quote, collateral, now.0, &material.roots).map_err(LocalError::Quote)?;
            material.tcb.check(verified.status()).map_err(LocalError::Quote)?;
            tracing::info!(mr_enclave = hex::encode(mr_enclave), status = verified.status().name(), "the key provider's quote verifies");
        }
        Judging::Unverified => {
            tracing::warn!(
                mr_enclave = hex::encode(mr_enclave),
                "the key provider's quote is not verified: the host is trusted with these keys"
            );
        }
        Judging::Refuse => return Err(LocalError::Unverified { mr_enclave: hex::encode(mr_enclave) }),
    }
    let mut opened = own.unseal(&answer.encrypted_key).map_err(|_| LocalError::Box)?;
    let seed = Secret::take_slice(&mut opened).map_err(|_| LocalError::Answer { why: "holds a key that is not of 32 bytes" });
    opened.zeroize();
    Ok(LocalSeed { seed: seed?, mr_enclave: mr_enclave.to_vec() })
}

/// MRENCLAVE and report data of an SGX quote of version 3. Unverified.
fn read_quote(quote: &[u8]) -> Result<(&[u8], &[u8]), LocalError> {
    let wrong = |why| LocalError::Answer { why };
    let (header, rest) = quote.split_at_checked(HEADER_BYTES).ok_or_else(|| wrong("holds a quote that ends in its header"))?;
    if !header.starts_with(&[3, 0]) || header.get(4..8) != Some(&[0; 4]) {
        return Err(wrong("holds no SGX quote of version 3"));
    }
    let body = rest.get(..BODY_BYTES).ok_or_else(|| wrong("holds a quote that ends in its report"))?;
    let part = |at: usize, length: usize| body.get(at..).and_then(|rest| rest.get(..length)).unwrap_or_default();
    Ok((part(MR_ENCLAVE_AT, 32), part(REPORT_DATA_AT, 64)))
}

/// Lists of numbers, as the provider's protocol has bytes.
#[derive(Serialize)]
struct Question<'a> {
    quote: &'a [u8],
}

#[derive(Deserialize)]
struct Answer {
    encrypted_key: Vec<u8>,
    provider_quote: Vec<u8>,
}

/// `length(u32 BE) ‖ JSON`, both ways.
fn ask(address: &str, quote: &[u8]) -> Result<SealingKey, LocalError> {
    let failed = |what: String| LocalError::Unreachable { address: address.to_owned(), what };
    let broke = |error: std::io::Error| failed(format!("broke the connection: {}", error.kind()));
    let found = address.to_socket_addrs().map_err(|error| failed(format!("has no address: {error}")))?.next();
    let found = found.ok_or_else(|| failed("has no address".to_owned()))?;
    let mut stream =
        TcpStream::connect_timeout(&found, PATIENCE).map_err(|error| failed(format!("cannot be reached: {}", error.kind())))?;
    stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.set_write_timeout(Some(PATIENCE))).map_err(broke)?;
    let question = serde_json::to_vec(&Question { quote }).map_err(|_| LocalError::Answer { why: "cannot be asked for" })?;
    let length = u32::try_from(question.len()).map_err(|_| LocalError::Answer { why: "cannot be asked for" })?;
    stream.write_all(&length.to_be_bytes()).and_then(|()| stream.write_all(&question)).and_then(|()| stream.flush()).map_err(broke)?;
    let mut length = [0; 4];
    stream.read_exact(&mut length).map_err(broke)?;
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if length > ANSWER_BYTES_MAX {
        return Err(LocalError::Answer { why: "is longer than 1 MiB" });
    }
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer).map_err(broke)?;
    let answer: Answer =
        serde_json::from_slice(&answer).map_err(|_| LocalError::Answer { why: "is no JSON of encrypted_key and provider_quote" })?;
    Ok(SealingKey { encrypted_key: answer.encrypted_key, provider_quote: answer.provider_quote })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quote(key: &[u8]) -> Vec<u8> {
        let mut quote = vec![0; HEADER_BYTES + BODY_BYTES];
        quote[0] = 3;
        quote[2] = 2;
        quote[HEADER_BYTES + MR_ENCLAVE_AT..][..32].fill(0xee);
        quote[HEADER_BYTES + REPORT_DATA_AT..][..32].copy_from_slice(&sha256(&[key]));
        quote
    }

    /// libsodium's `crypto_box_seal` (PyNaCl 1.6.2) of 32×42 to the public key of the scalar 32×07.
    const SEALED: &str = "53f7675fa872da0dea15ed6d194f7b77a6d9da95186a1262f87211915e1d20011f32b6909da5849532fe1dc6db152c8da3158e7d597b3bc1fdf8d2b90500301866a01af3279f7771523d870d9af8d69e";

    #[test]
    fn an_answer_is_bound_and_opened_only_where_it_is_wished() {
        let own = SecretKey::from_bytes([7; 32]);
        let sealed = hex::decode(SEALED).unwrap();
        let answer = SealingKey { provider_quote: quote(&sealed), encrypted_key: sealed };
        let opened = open(&own, &answer, &Judging::Unverified).unwrap();
        assert!(opened.seed == Secret::from_fn(|out: &mut [u8; 32]| out.fill(42)));
        assert_eq!(opened.mr_enclave, [0xee; 32]);
        assert_eq!(open(&own, &answer, &Judging::Refuse).unwrap_err(), LocalError::Unverified { mr_enclave: "ee".repeat(32) });
        assert_eq!(open(&SecretKey::from_bytes([8; 32]), &answer, &Judging::Unverified).unwrap_err(), LocalError::Box);
        let mut swapped = answer.clone();
        swapped.encrypted_key[40] ^= 1;
        assert_eq!(open(&own, &swapped, &Judging::Unverified).unwrap_err(), LocalError::NotBound);
        for bad in [&[][..], &answer.provider_quote[..100], &[4; 1000]] {
            let bad = SealingKey { provider_quote: bad.to_vec(), ..answer.clone() };
            assert!(matches!(open(&own, &bad, &Judging::Unverified), Err(LocalError::Answer { .. })));
        }
    }

    #[test]
    fn the_protocol_of_its_own_is_bounded() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let answer = |bytes: &[u8]| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut length = [0; 4];
                stream.read_exact(&mut length).unwrap();
                let mut question = vec![0; u32::from_be_bytes(length) as usize];
                stream.read_exact(&mut question).unwrap();
                assert_eq!(question, br#"{"quote":[1,2,255]}"#);
                let _ = stream.write_all(bytes);
            };
            let good = br#"{"encrypted_key":[3],"provider_quote":[4,5]}"#;
            answer(&[&(good.len() as u32).to_be_bytes()[..], good].concat());
            answer(&u32::MAX.to_be_bytes());
            answer(&[0, 0, 0, 2, b'{', b'}']);
            answer(&[0, 0]);
        });
        assert_eq!(ask(&address, &[1, 2, 255]).unwrap(), SealingKey { encrypted_key: vec![3], provider_quote: vec![4, 5] });
        assert_eq!(ask(&address, &[1, 2, 255]), Err(LocalError::Answer { why: "is longer than 1 MiB" }));
        assert!(matches!(ask(&address, &[1, 2, 255]), Err(LocalError::Answer { .. })));
        assert!(matches!(ask(&address, &[1, 2, 255]), Err(LocalError::Unreachable { .. })));
        server.join().unwrap();
        assert!(matches!(ask(&address, &[1]), Err(LocalError::Unreachable { .. })), "nobody listens any more");
    }
}
