//! A KMS that speaks dstack's protocol: its root, its nodes with real TLS listeners, what they were asked.

use std::process::Output;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::extract::Extension;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use dstack_attest::wire::CertificateRequest;
use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity, VerifyContext, verify};
use dstack_protocol::{ClusterId, UnixMillis};
use dstack_prpc::kms::SignCertRequest;
use dstack_ratls::Limits;
use dstack_ratls::dstack_server::{DstackPeer, DstackServer, DstackSetup, ServerChain, Verify};
use dstack_ratls::key::CertificateKey;
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_testkit::World;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SubjectPublicKeyInfo,
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

pub const USAGE_OID: &[u64] = &[1, 3, 6, 1, 4, 1, 62397, 1, 4];

/// A KMS's root, shared by its nodes.
pub struct Kms {
    pub ca_pem: String,
    pub spki: Vec<u8>,
    pub issuer: Arc<Issuer<'static, KeyPair>>,
}

/// What one node does and saw.
#[derive(Default)]
pub struct Seen {
    /// Answers this to GetAppKey instead of keys.
    pub status: AtomicU16,
    pub temp_cas: AtomicUsize,
    pub identities: Mutex<Vec<Arc<VerifiedIdentity>>>,
    /// Questions for a certificate that it signed.
    pub signed: Mutex<Vec<CertificateRequest>>,
}

pub struct Node {
    pub url: String,
    pub seen: Arc<Seen>,
    _shutdown: tokio_util::sync::DropGuard,
}

impl Kms {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "Dstack KMS CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        let certificate = params.self_signed(&key).unwrap();
        let spki = rcgen::PublicKeyData::subject_public_key_info(&key);
        Self { ca_pem: certificate.pem(), spki, issuer: Arc::new(Issuer::new(params, key)) }
    }

    pub async fn node(&self, world: &World, usage: &str) -> Node {
        let key = CertificateKey::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "localhost");
        let usage = [&[0x04, u8::try_from(usage.len()).unwrap()], usage.as_bytes()].concat();
        params.custom_extensions = vec![CustomExtension::from_oid_content(USAGE_OID, usage)];
        let leaf = params.signed_by(&key, &*self.issuer).unwrap();
        let chain = Arc::new(ServerChain::default());
        chain.install(vec![leaf.der().to_vec()], &key);

        let roots = Arc::new(world.trust_roots().unwrap());
        let bundle = Arc::new(CollateralBundle::parse(world.roots().bundle()).unwrap());
        let verify: Verify = Arc::new(move |evidence| {
            let (roots, bundle) = (Arc::clone(&roots), Arc::clone(&bundle));
            Box::pin(async move { judged(&evidence, &roots, &bundle) })
        });
        let seen = Arc::new(Seen::default());
        let now = || SystemClock::new().now();
        let setup =
            DstackSetup { chain, verify, now: Arc::new(now), limits: Limits::default(), parser_threads: 1, router: self.router(&seen) };
        let server = DstackServer::bind("127.0.0.1:0".parse().unwrap(), setup).await.unwrap();
        let url = format!("https://127.0.0.1:{}", server.local_address().unwrap().port());
        let shutdown = CancellationToken::new();
        tokio::spawn(server.run(shutdown.clone()));
        Node { url, seen, _shutdown: shutdown.drop_guard() }
    }

    fn router(&self, seen: &Arc<Seen>) -> Router {
        let temp = dstack_certificates::temp::temp_ca(&ClusterId([7; 32])).unwrap();
        let answer = json!({ "temp_ca_cert": temp.certificate_pem(), "temp_ca_key": temp.key_pem(), "ca_cert": self.ca_pem });
        let asked_for_certificates = seen;
        let (asked, ca_cert, seen) = (Arc::clone(seen), self.ca_pem.clone(), Arc::clone(seen));
        let temp_ca = post(move || {
            asked.temp_cas.fetch_add(1, Ordering::SeqCst);
            async move { Json(answer) }
        });
        let app_key = post(move |Extension(peer): Extension<DstackPeer>| async move {
            match (seen.status.load(Ordering::SeqCst), peer.identity) {
                (0, Some(identity)) => {
                    seen.identities.lock().unwrap().push(identity);
                    let keys = json!({
                        "ca_cert": ca_cert, "disk_crypt_key": "d1".repeat(32), "env_crypt_key": "e2".repeat(32), "k256_key": "25".repeat(32),
                        "k256_signature": "51".repeat(65), "tproxy_app_id": "any", "gateway_app_id": "any", "os_image_hash": "05".repeat(32)
                    });
                    (StatusCode::OK, Json(keys))
                }
                (0, None) => (StatusCode::BAD_REQUEST, Json(json!({ "error": "App not allowed: No attestation provided" }))),
                (status, _) => (StatusCode::from_u16(status).unwrap(), Json(json!({ "error": "Boot denied: test" }))),
            }
        });
        let (issuer, root, seen) = (Arc::clone(&self.issuer), self.ca_pem.clone(), Arc::clone(asked_for_certificates));
        let sign = post(move |body: Bytes| async move {
            // dstack's clients name no type of content
            let asked: SignCertRequest = serde_json::from_slice(&body).unwrap();
            let request = CertificateRequest::decode(asked.api_version, &asked.csr).unwrap();
            let leaf = leaf_of(&request, &issuer);
            seen.signed.lock().unwrap().push(request);
            Json(json!({ "certificate_chain": [leaf, root] }))
        });
        Router::new().route("/prpc/GetTempCaCert", temp_ca).route("/prpc/GetAppKey", app_key).route("/prpc/SignCert", sign)
    }
}

fn judged(evidence: &[u8], roots: &TrustRoots, collateral: &CollateralBundle) -> Option<Arc<VerifiedIdentity>> {
    let now: UnixMillis = SystemClock::new().now();
    verify(evidence, &VerifyContext { now, roots, collateral, tcb: &TcbPolicy::default() }).ok().map(Arc::new)
}

pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A client certificate for the request's key, as it asks.
fn leaf_of(request: &CertificateRequest, issuer: &Issuer<'_, KeyPair>) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, request.config.subject.as_str());
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let key = SubjectPublicKeyInfo::from_der(&request.public_key).unwrap();
    params.signed_by(&key, issuer).unwrap().pem()
}
