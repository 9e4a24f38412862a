//! Intel's provisioning service, and caches with its interface. Owns: paths, headers, what is cut out of an answer.
//! Never: verifies (the caller checks the whole), changes a byte of what is signed.
//! Source: Intel SGX and TDX PCS API v4: `tdx/…/tcb`, `tdx/…/qe/identity`, `sgx/…/pckcrl`; PCCS `sgx/…/rootcacrl` (hex of the DER).

use dstack_attest::TdxCollateral;

use crate::error::shown;
use crate::http::{Fetched, Http};
use crate::{Endpoint, FetchError};

const JSON: &[&str] = &["application/json"];
const LIST: &[&str] = &["application/pkix-crl", "application/octet-stream", "text/plain", "text/html", "application/x-pem-file"];
/// PCS has no path for the root's list; it is published here.
const ROOT_LIST: &str = "https://certificates.trustedservices.intel.com";

/// Which CA issues the PCK certificates of a platform.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PckCa {
    Processor,
    Platform,
}

impl PckCa {
    /// That of the collateral at hand; `Platform`, as TDX machines have it, where none is.
    pub(crate) fn of(known: Option<&TdxCollateral>) -> Self {
        let list = known.map_or(&[][..], |one| one.pck_crl.as_slice());
        let name = b"Intel SGX PCK Processor CA";
        if list.windows(name.len()).any(|window| window == name) { Self::Processor } else { Self::Platform }
    }

    const fn text(self) -> &'static str {
        match self {
            Self::Processor => "processor",
            Self::Platform => "platform",
        }
    }
}

/// A client of one endpoint.
#[derive(Debug, Clone)]
pub struct Intel {
    http: Http,
    endpoint: Endpoint,
}

impl Intel {
    /// A client.
    #[must_use]
    pub const fn new(http: Http, endpoint: Endpoint) -> Self {
        Self { http, endpoint }
    }

    /// Everything about one platform, unverified.
    /// # Errors
    /// The first request that failed.
    pub fn collateral(&self, fmspc: &[u8; 6], known: Option<&TdxCollateral>) -> Result<TdxCollateral, FetchError> {
        let tcb = self.http.get(&self.endpoint, &format!("/tdx/certification/v4/tcb?fmspc={}", hex::encode_upper(fmspc)), JSON)?;
        let qe = self.http.get(&self.endpoint, "/tdx/certification/v4/qe/identity", JSON)?;
        let ca = PckCa::of(known).text();
        let list = self.http.get(&self.endpoint, &format!("/sgx/certification/v4/pckcrl?ca={ca}&encoding=der"), LIST)?;
        let (tcb_info, tcb_info_signature) = signed_member(&tcb, "tcbInfo")?;
        let (qe_identity, qe_identity_signature) = signed_member(&qe, "enclaveIdentity")?;
        Ok(TdxCollateral {
            pck_crl_issuer_chain: chain(&list, &["sgx-pck-crl-issuer-chain"])?,
            root_ca_crl: self.root_list()?,
            pck_crl: der(&list)?,
            tcb_info_issuer_chain: chain(&tcb, &["tcb-info-issuer-chain", "sgx-tcb-info-issuer-chain"])?,
            tcb_info,
            tcb_info_signature,
            qe_identity_issuer_chain: chain(&qe, &["sgx-enclave-identity-issuer-chain"])?,
            qe_identity,
            qe_identity_signature,
        })
    }

    /// The root's revocation list: a cache's, else Intel's own.
    fn root_list(&self) -> Result<Vec<u8>, FetchError> {
        match self.http.get(&self.endpoint, "/sgx/certification/v4/rootcacrl", LIST) {
            Ok(list) => der(&list),
            Err(FetchError::Status { status: 404, .. }) => {
                der(&self.http.get(&Endpoint::parse(ROOT_LIST)?, "/IntelSGXRootCA.der", LIST)?)
            }
            Err(error) => Err(error),
        }
    }
}

/// `{"<member>":<text>,"signature":"<hex>"}`: the text exactly as it was signed, and the signature.
fn signed_member(fetched: &Fetched, member: &str) -> Result<(String, Vec<u8>), FetchError> {
    let wrong = |part: &str| fetched.content(part, "an object of a signed text and its signature");
    let body = std::str::from_utf8(&fetched.body).map_err(|_| wrong("bytes that are no text"))?.trim();
    let rest = body.strip_prefix("{\"").and_then(|rest| rest.strip_prefix(member)).and_then(|rest| rest.strip_prefix("\":"));
    let (text, tail) = rest.and_then(|rest| rest.rsplit_once(",\"signature\":\"")).ok_or_else(|| wrong("other members"))?;
    let signature = tail.strip_suffix("\"}").and_then(|hex| hex::decode(hex).ok()).filter(|signature| signature.len() == 64);
    let signature = signature.ok_or_else(|| wrong("a signature that is not 64 bytes of hex"))?;
    if !text.starts_with('{') || !text.ends_with('}') {
        return Err(wrong("a text that is no object"));
    }
    Ok((text.to_owned(), signature))
}

/// A percent-encoded PEM chain in a header.
fn chain(fetched: &Fetched, names: &[&'static str]) -> Result<String, FetchError> {
    const EXPECTED: &str = "a header with the issuer chain, percent-encoded PEM";
    let value = fetched.header(names, EXPECTED)?;
    let text = percent_decoded(value).ok_or_else(|| fetched.content("a header that is not percent-encoded text", EXPECTED))?;
    match text.starts_with("-----BEGIN CERTIFICATE-----") {
        true => Ok(text),
        false => Err(fetched.content(&shown(&text), EXPECTED)),
    }
}

fn percent_decoded(value: &str) -> Option<String> {
    let mut out = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'%' {
            let (digits, tail) = tail.split_at_checked(2)?;
            out.extend(hex::decode(digits).ok()?);
            rest = tail;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(out).ok()
}

/// A revocation list as DER, hex of DER, or PEM.
fn der(fetched: &Fetched) -> Result<Vec<u8>, FetchError> {
    let body = fetched.body.as_slice();
    if body.first() == Some(&0x30) && body.get(1).is_some_and(|byte| *byte >= 0x80) {
        return Ok(body.to_vec());
    }
    let text = std::str::from_utf8(body).unwrap_or_default().trim();
    let decoded = match text.strip_prefix("-----BEGIN X509 CRL-----").and_then(|rest| rest.strip_suffix("-----END X509 CRL-----")) {
        Some(inside) => crate::folder::base64_lines(inside),
        None => hex::decode(text).ok().filter(|der| !der.is_empty()),
    };
    decoded.ok_or_else(|| fetched.content("other bytes", "a revocation list: DER, PEM or hex"))
}
