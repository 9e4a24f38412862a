//! Certificates for keys of the guest: by the KMS that released its keys, or by a CA of its own. Owns: which of both, the request with
//! evidence, what an answer must be. Never: the private key leaves for a signer; a chain that is not for our key.
//! Source: guest API reference §3.1; KMS API reference §7, §8; util and deploy reference §4.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dstack_attest::wire::{AppInfo, Attestation, CONFIRM, CertificateConfig, CertificateRequest};
use dstack_attest::x509ext::{CertificateClaims, CertificateEvidence, OID_APP_ID, OID_APP_INFO, OID_ATTESTATION, OID_USAGE, wrap};
use dstack_client::{NodeUrl, Route, dstack};
use dstack_protocol::UnixMillis;
use dstack_protocol::binding::ratls_certificate;
use dstack_prpc::Empty;
use dstack_prpc::kms::{GetTempCaCertResponse, SignCertRequest, SignCertResponse};
use dstack_ratls::prpc_client::{RpcCallError, RpcClient, ServerTrust};
use dstack_ratls::{CertifiedIdentity, Now, RatlsError};
use dstack_secret::{Secret, SecretBytes};
use p256::pkcs8::EncodePrivateKey as _;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData as _, SanType, SigningKey as _,
};

use crate::guest::Guest;

/// For one RPC of the way to a certificate.
const RPC_TIMEOUT: Duration = Duration::from_secs(20);
/// A client certificate is used this long; an NSM document is refused after an hour.
const CLIENT_CERTIFICATE_USE: Duration = Duration::from_secs(30 * 60);
/// Validity of a client certificate.
const CLIENT_CERTIFICATE_LIFETIME: Duration = Duration::from_secs(3600);
/// Validity of a local leaf, days, where the caller asks for none.
const LOCAL_DAYS: u64 = 3650;
/// A local leaf begins this long before it is asked for.
const BACKDATED_S: u64 = 3600;
/// Most names of one certificate, and longest name or subject, bytes.
const NAMES_MAX: usize = 64;
const NAME_BYTES_MAX: usize = 253;

/// Why there is no certificate.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum CertifyError {
    /// What is asked for cannot be in a certificate. Caller's fault.
    #[error("{field}: {why}")]
    Argument {
        /// Which.
        field: &'static str,
        /// What it may be.
        why: &'static str,
    },
    /// dstack's words for it. Caller's fault.
    #[error("not_before must be earlier than not_after")]
    Validity,
    /// Nobody signs here. The configuration's fault.
    #[error("no certificate authority: {reason}")]
    NoAuthority {
        /// What to set.
        reason: &'static str,
    },
    /// The device failed. Not the caller's fault: retry.
    #[error("no evidence for the certificate: {reason}")]
    Evidence {
        /// Its reason.
        reason: String,
    },
    /// No server of the KMS signed. Its words; retry when it is there.
    #[error("Failed to sign the CSR: {0}")]
    Kms(#[from] RpcCallError),
    /// The KMS's root is not the pinned one.
    #[error("the root CA of {host} is not the one that this guest pins")]
    OtherRoot {
        /// The server.
        host: String,
    },
    /// The KMS's answer is no chain for our key.
    #[error("the certificate chain of {host} is not for this key: {why}")]
    Chain {
        /// The server.
        host: String,
        /// What is wrong.
        why: &'static str,
    },
    /// Our own certificate library.
    #[error("cannot make the certificate: {0}")]
    Library(#[from] rcgen::Error),
    /// Our own TLS.
    #[error(transparent)]
    Tls(#[from] RatlsError),
}

/// A key and its chain, PEM.
#[derive(Debug)]
pub struct Certified {
    /// PKCS#8.
    pub key: SecretBytes,
    /// Leaf first.
    pub chain: Vec<String>,
}

/// Who signs.
pub enum Authority {
    /// A KMS by its dstack listener.
    Kms(KmsAuthority),
    /// The guest's own CA.
    Local(LocalAuthority),
    /// Nobody.
    None(&'static str),
}

/// A KMS by its dstack listener.
pub struct KmsAuthority {
    /// Servers in order.
    pub urls: Vec<NodeUrl>,
    /// The way to them.
    pub route: Route,
    /// SubjectPublicKeyInfo of the root, where it is pinned.
    pub root_spki: Option<Vec<u8>>,
    /// Root CA (PEM) and temp CA, once known.
    pub authority: Mutex<Option<Arc<KnownRoot>>>,
    /// The client certificate in use, with its age.
    pub identity: tokio::sync::Mutex<Option<(UnixMillis, Arc<CertifiedIdentity>)>>,
    /// Place of the server that answered last: it is asked first, so that one that fails costs one try.
    pub last_good: AtomicUsize,
}

/// What a KMS says of itself.
#[derive(Debug)]
pub struct KnownRoot {
    /// Root CA, PEM.
    pub ca_cert: String,
    /// Temp CA and its key, PEM, where there is one.
    pub temp_ca: Option<(String, String)>,
}

impl KmsAuthority {
    /// A KMS of which the root is known, or will be learned from its first answer.
    #[must_use]
    pub fn new(urls: Vec<NodeUrl>, route: Route, root_spki: Option<Vec<u8>>, known: Option<KnownRoot>) -> Self {
        let authority = Mutex::new(known.map(Arc::new));
        Self { urls, route, root_spki, authority, identity: tokio::sync::Mutex::new(None), last_good: AtomicUsize::new(0) }
    }

    fn known(&self) -> Option<Arc<KnownRoot>> {
        self.authority.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The guest's own CA.
pub struct LocalAuthority {
    /// PKCS#8, PEM.
    key: SecretBytes,
    /// PEM.
    certificate: String,
    name: DistinguishedName,
}

impl LocalAuthority {
    /// `certificate` as the boot left it.
    ///
    /// # Errors
    /// [`CertifyError::Library`], [`CertifyError::Argument`] for what is no CA with that key.
    pub fn new(key: SecretBytes, certificate: String) -> Result<Self, CertifyError> {
        let wrong = |why| CertifyError::Argument { field: "ca_cert", why };
        let der = pem_der(&certificate).ok_or_else(|| wrong("no certificate in PEM"))?;
        let claims = CertificateClaims::read(&der).map_err(|_| wrong("no certificate"))?;
        let pair = key_pair(&key)?;
        if pair.subject_public_key_info() != claims.spki {
            return Err(wrong("not the certificate of the local CA's key"));
        }
        let mut name = DistinguishedName::new();
        // The name under which dstack makes local CAs (util and deploy reference §4).
        name.push(DnType::CommonName, "App Root Cert");
        Ok(Self { key, certificate, name })
    }
}

fn key_pair(pem: &SecretBytes) -> Result<KeyPair, CertifyError> {
    pem.expose(|bytes| std::str::from_utf8(bytes).map_err(|_| rcgen::Error::CouldNotParseKeyPair).and_then(KeyPair::from_pem))
        .map_err(Into::into)
}

impl fmt::Debug for Authority {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kms(kms) => write!(out, "Kms({:?})", kms.urls),
            Self::Local(_) => out.write_str("Local"),
            Self::None(reason) => write!(out, "None({reason})"),
        }
    }
}

/// A fresh P-256 key: `HKDF(salt "RATLS", IKM = randomness, info = "")`.
///
/// # Errors
/// [`CertifyError::Evidence`] without randomness.
pub fn fresh_scalar() -> Result<Secret<32>, CertifyError> {
    let seed = Secret::try_from_fn(|bytes: &mut [u8; 32]| getrandom::fill(bytes));
    let seed = seed.map_err(|error| CertifyError::Evidence { reason: format!("no randomness: {error}") })?;
    Ok(seed.expose(|ikm| crate::app_key::kdf(ikm, b"")))
}

/// Certifies a P-256 key of that scalar.
///
/// # Errors
/// [`CertifyError`].
pub async fn certify(guest: &Arc<Guest>, scalar: &Secret<32>, mut config: CertificateConfig) -> Result<Certified, CertifyError> {
    check(&config)?;
    config.org_name = None;
    let pair = pair_of(scalar)?;
    let chain = match &guest.authority {
        Authority::Kms(kms) => by_kms(guest, kms, &pair, config).await?,
        Authority::Local(local) => by_local(guest, local, &pair, &config).await?,
        Authority::None(reason) => return Err(CertifyError::NoAuthority { reason }),
    };
    Ok(Certified { key: SecretBytes::take(pair.serialize_pem().into_bytes()), chain })
}

fn check(config: &CertificateConfig) -> Result<(), CertifyError> {
    if let (Some(before), Some(after)) = (config.not_before, config.not_after)
        && before >= after
    {
        return Err(CertifyError::Validity);
    }
    if config.subject.len() > NAME_BYTES_MAX {
        return Err(CertifyError::Argument { field: "subject", why: "at most 253 bytes" });
    }
    let wrong = |name: &String| name.is_empty() || name.len() > NAME_BYTES_MAX || !name.is_ascii();
    if config.alt_names.len() > NAMES_MAX || config.alt_names.iter().any(wrong) {
        return Err(CertifyError::Argument { field: "alt_names", why: "at most 64 host names or addresses of 1 to 253 ASCII characters" });
    }
    Ok(())
}

/// The key pair in PKCS#8 with its public half, dstack's 138 bytes.
fn pair_of(scalar: &Secret<32>) -> Result<KeyPair, CertifyError> {
    let wrong = || CertifyError::Argument { field: "path", why: "the key of this path is no scalar of P-256: use another" };
    let key = scalar.expose(|bytes| p256::SecretKey::from_slice(bytes)).map_err(|_| wrong())?;
    let der = key.to_pkcs8_der().map_err(|_| wrong())?;
    Ok(KeyPair::from_pkcs8_der_and_sign_algo(&der.as_bytes().into(), &rcgen::PKCS_ECDSA_P256_SHA256)?)
}

/// Evidence over a public key, stripped as certificates and requests carry it.
async fn evidence(guest: &Arc<Guest>, spki: Vec<u8>) -> Result<Vec<u8>, CertifyError> {
    let reason = |reason: String| CertifyError::Evidence { reason };
    let evidence = guest.evidence(ratls_certificate(&spki)).await.map_err(|error| reason(error.to_string()))?;
    let decoded = Attestation::decode(&evidence).map_err(|error| reason(error.to_string()))?;
    Ok(decoded.stripped().encode())
}

async fn by_kms(guest: &Arc<Guest>, kms: &KmsAuthority, pair: &KeyPair, config: CertificateConfig) -> Result<Vec<String>, CertifyError> {
    let public_key = pair.subject_public_key_info();
    let attestation = evidence(guest, public_key.clone()).await?;
    let request = CertificateRequest {
        confirm: CONFIRM.to_owned(),
        public_key: public_key.clone(),
        config,
        evidence: CertificateEvidence::Versioned(attestation),
    };
    let csr = request.encode();
    let signature = pair.sign(&csr)?;
    let request = SignCertRequest { api_version: request.api_version(), csr, signature, vm_config: guest.vm_config.clone() };
    let mut outcome = Err(CertifyError::NoAuthority { reason: "no address of a KMS is set: dstack_urls" });
    let first = kms.last_good.load(Ordering::Relaxed);
    for (place, url) in kms.urls.iter().enumerate().cycle().skip(first).take(kms.urls.len()) {
        outcome = signed(guest, kms, url, &request, &public_key).await;
        match &outcome {
            // A refusal is the same at every server.
            Ok(_) | Err(CertifyError::Kms(RpcCallError::Refused { status: 400..=499, .. })) => {
                kms.last_good.store(place, Ordering::Relaxed);
                break;
            }
            Err(error) => tracing::warn!(node = %url, reason = %error, "no certificate from this node"),
        }
    }
    outcome
}

async fn signed(
    guest: &Arc<Guest>,
    kms: &KmsAuthority,
    url: &NodeUrl,
    request: &SignCertRequest,
    public_key: &[u8],
) -> Result<Vec<String>, CertifyError> {
    let root = match kms.known() {
        Some(root) => root,
        None => {
            let root = Arc::new(learned(&guest.now.0, kms, url).await?);
            let mut known = kms.authority.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(known.get_or_insert(root))
        }
    };
    let identity = client_identity(guest, kms, &root).await?;
    let client = RpcClient::new(ServerTrust::Root(&root.ca_cert), Some(&identity), &guest.now.0)?;
    let answer: SignCertResponse = dstack::ask(&kms.route, &client, url, "SignCert", request, RPC_TIMEOUT).await?;
    let wrong = |why| CertifyError::Chain { host: url.host().to_owned(), why };
    let leaf = answer.certificate_chain.first().and_then(|pem| pem_der(pem)).ok_or_else(|| wrong("no certificate in PEM"))?;
    let claims = CertificateClaims::read(&leaf).map_err(|_| wrong("the leaf is no certificate"))?;
    if claims.spki != public_key {
        return Err(wrong("it is for another key"));
    }
    Ok(answer.certificate_chain)
}

/// Asks a server for its root. Nothing of the answer is proven but what the pin proves; without one the first answer counts.
async fn learned(now: &Now, kms: &KmsAuthority, url: &NodeUrl) -> Result<KnownRoot, CertifyError> {
    let anybody = RpcClient::new(ServerTrust::Nobody, None, now)?;
    let answer: GetTempCaCertResponse = dstack::ask(&kms.route, &anybody, url, "GetTempCaCert", &Empty {}, RPC_TIMEOUT).await?;
    check_root(kms.root_spki.as_deref(), &answer.ca_cert, url)?;
    let GetTempCaCertResponse { temp_ca_cert, temp_ca_key, ca_cert } = answer;
    let temp_ca = (!temp_ca_cert.is_empty() && !temp_ca_key.is_empty()).then_some((temp_ca_cert, temp_ca_key));
    Ok(KnownRoot { ca_cert, temp_ca })
}

fn check_root(pinned: Option<&[u8]>, ca_cert: &str, url: &NodeUrl) -> Result<(), CertifyError> {
    let host = || url.host().to_owned();
    let claims = pem_der(ca_cert).and_then(|der| CertificateClaims::read(&der).ok());
    let spki = claims.ok_or_else(|| CertifyError::Chain { host: host(), why: "its root is no certificate" })?.spki;
    match pinned {
        Some(pinned) if pinned != spki => Err(CertifyError::OtherRoot { host: host() }),
        _ => Ok(()),
    }
}

async fn client_identity(guest: &Arc<Guest>, kms: &KmsAuthority, root: &KnownRoot) -> Result<Arc<CertifiedIdentity>, CertifyError> {
    let mut slot = kms.identity.lock().await;
    let now = (guest.now.0)();
    let use_ms = u64::try_from(CLIENT_CERTIFICATE_USE.as_millis()).unwrap_or(u64::MAX);
    if let Some((made, identity)) = slot.as_ref().filter(|(made, _)| now.0.abs_diff(made.0) < use_ms) {
        let _ = made;
        return Ok(Arc::clone(identity));
    }
    let (device, temp_ca) = (Arc::clone(&guest.device), root.temp_ca.clone());
    // The device blocks.
    let made = tokio::task::spawn_blocking(move || {
        let temp_ca = temp_ca.as_ref().map(|(certificate, key)| (certificate.as_str(), key.as_str()));
        CertifiedIdentity::for_dstack_client(now, CLIENT_CERTIFICATE_LIFETIME, temp_ca, |report_data| {
            device.evidence(report_data).map_err(|error| error.to_string())
        })
    });
    let identity = Arc::new(made.await.map_err(|error| CertifyError::Evidence { reason: error.to_string() })??);
    *slot = Some((now, Arc::clone(&identity)));
    Ok(identity)
}

async fn by_local(
    guest: &Arc<Guest>,
    local: &LocalAuthority,
    pair: &KeyPair,
    config: &CertificateConfig,
) -> Result<Vec<String>, CertifyError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, config.subject.as_str());
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    for (wanted, purpose) in
        [(config.usage_server_auth, ExtendedKeyUsagePurpose::ServerAuth), (config.usage_client_auth, ExtendedKeyUsagePurpose::ClientAuth)]
    {
        if wanted {
            params.extended_key_usages.push(purpose);
        }
    }
    for name in &config.alt_names {
        params.subject_alt_names.push(match name.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(name.as_str().try_into()?),
        });
    }
    let now_s = (guest.now.0)().0 / 1000;
    let not_before = config.not_before.unwrap_or_else(|| now_s.saturating_sub(BACKDATED_S));
    let not_after = config.not_after.unwrap_or_else(|| now_s.saturating_add(LOCAL_DAYS * 86_400));
    if not_before >= not_after {
        return Err(CertifyError::Validity);
    }
    params.not_before = rcgen::date_time_ymd(1970, 1, 1) + since_1970(not_before);
    params.not_after = rcgen::date_time_ymd(1970, 1, 1) + since_1970(not_after);
    let mut extension = |oid: &[u64], content: &[u8]| params.custom_extensions.push(CustomExtension::from_oid_content(oid, wrap(content)));
    extension(&OID_APP_ID, &guest.identity.app_id.0);
    extension(&OID_USAGE, b"app:custom");
    if config.ext_quote {
        extension(&OID_ATTESTATION, &evidence(guest, pair.subject_public_key_info()).await?);
    }
    if config.ext_app_info {
        extension(&OID_APP_INFO, &app_info(guest).encode());
    }
    let mut ca = CertificateParams::default();
    ca.distinguished_name = local.name.clone();
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    let issuer = Issuer::new(ca, key_pair(&local.key)?);
    let leaf = params.signed_by(pair, &issuer)?;
    Ok(vec![leaf.pem(), local.certificate.clone()])
}

fn app_info(guest: &Guest) -> AppInfo {
    let own = &guest.identity;
    AppInfo {
        app_id: own.app_id.0.to_vec(),
        compose_hash: own.compose_hash.clone(),
        instance_id: own.instance_id.clone(),
        device_id: crate::info::device_id(),
        mr_system: Vec::new(),
        mr_aggregated: own.mr_aggregated.clone(),
        os_image_hash: own.os_image_hash.clone(),
        key_provider_info: guest.key_provider_info().into_bytes(),
        init_script_hashes: None,
    }
}

/// Seconds since 1970 as certificates can hold them: the calendar library refuses years past 9999.
fn since_1970(at_s: u64) -> Duration {
    const YEAR_9999_S: u64 = 253_370_764_800;
    Duration::from_secs(at_s.min(YEAR_9999_S))
}

/// DER of the first certificate of a PEM text.
pub(crate) fn pem_der(text: &str) -> Option<Vec<u8>> {
    use base64::Engine as _;
    let (_, rest) = text.split_once("-----BEGIN CERTIFICATE-----")?;
    let (body, _) = rest.split_once("-----END CERTIFICATE-----")?;
    let digits: String = body.chars().filter(|shown| !shown.is_ascii_whitespace()).collect();
    base64::engine::general_purpose::STANDARD.decode(digits).ok()
}
