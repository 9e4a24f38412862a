//! Certificates by a KMS: a server that speaks dstack's protocol with an Ed25519 root above P-256, checks requests as the reference
//! says, and takes client certificates of its temp CA only; and servers that are wrong.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::routing::any;
use dstack_attest::wire::CertificateRequest;
use dstack_attest::x509ext::{CertificateEvidence, OID_USAGE, wrap};
use dstack_protocol::binding::ratls_certificate;
use dstack_prpc::RpcError;
use dstack_prpc::kms::{Kms, SignCertRequest, SignCertResponse};
use dstack_ratls::plain::{PlainLimits, serve_connection};
use dstack_ratls::prpc::Call;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, IsCa, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256,
    PKCS_ED25519, PublicKeyData, SanType,
};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::Running;
use crate::local::{Local, write};

/// What is wrong with the server, if anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    OtherUsage,
    OtherHost,
    OtherRoot,
    OtherKey,
    Refuses,
}

struct Server {
    flaw: Flaw,
    root: CertificateParams,
    root_key: KeyPair,
    root_pem: String,
    evidence: Mutex<Vec<(Vec<u8>, Vec<u8>)>>,
}

/// The public key of a request.
struct Spki(Vec<u8>);

impl PublicKeyData for Spki {
    fn der_bytes(&self) -> &[u8] {
        &self.0[self.0.len() - 65..]
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

fn named(name: &str, level: Option<u8>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.distinguished_name.push(DnType::OrganizationName, "Dstack");
    params.is_ca = level.map_or(IsCa::ExplicitNoCa, |level| IsCa::Ca(BasicConstraints::Constrained(level)));
    params
}

async fn method(State(server): State<Arc<Server>>, Path(segment): Path<String>, request: Request) -> axum::response::Response {
    assert_eq!(Kms::method(&segment), Ok(Kms::SignCert));
    let call = Call::read(request, 1 << 20).await.unwrap();
    call.serve(async |request: SignCertRequest| {
        let refused = |text: &str| RpcError::refused(text);
        if server.flaw == Flaw::Refuses {
            return Err(refused("Boot denied: not today"));
        }
        let csr = CertificateRequest::decode(request.api_version, &request.csr).map_err(|error| refused(&error.to_string()))?;
        csr.check(&request.csr, &request.signature).map_err(|error| refused(&error.to_string()))?;
        assert_eq!(request.vm_config, "{\"cpu_count\":2}");
        let CertificateEvidence::Versioned(evidence) = &csr.evidence else { panic!("V2") };
        server.evidence.lock().unwrap().push((csr.public_key.clone(), evidence.clone()));
        let ca_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let ca = named("Dstack App CA", Some(0));
        let ca_cert = ca.signed_by(&ca_key, &Issuer::from_params(&server.root, &server.root_key)).unwrap();
        let mut leaf = named(&csr.config.subject, None);
        leaf.subject_alt_names = csr.config.alt_names.iter().map(|name| SanType::DnsName(name.as_str().try_into().unwrap())).collect();
        let public_key = if server.flaw == Flaw::OtherKey { ca_key.subject_public_key_info() } else { csr.public_key.clone() };
        let leaf = leaf.signed_by(&Spki(public_key), &Issuer::new(ca, ca_key)).unwrap();
        Ok(SignCertResponse { certificate_chain: vec![leaf.pem(), ca_cert.pem(), server.root_pem.clone()] })
    })
    .await
}

/// Starts a server and writes the keys file that names it.
async fn server(local: &Local, flaw: Flaw) -> Arc<Server> {
    let root_key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let root = named("Dstack KMS CA", Some(1));
    let root_cert = root.self_signed(&root_key).unwrap();
    let temp_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let temp_ca = named("Dstack Client Temp CA", Some(0)).self_signed(&temp_key).unwrap();

    let issuing_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let issuing = named("Dstack KMS Node CA", Some(0));
    let above = if flaw == Flaw::OtherRoot {
        KeyPair::generate_for(&PKCS_ED25519).unwrap()
    } else {
        KeyPair::from_pem(&root_key.serialize_pem()).unwrap()
    };
    let issuing_cert = issuing.signed_by(&issuing_key, &Issuer::from_params(&root, &above)).unwrap();
    let mut leaf = named("127.0.0.1", None);
    let host = if flaw == Flaw::OtherHost { "127.0.0.2" } else { "127.0.0.1" };
    leaf.subject_alt_names = vec![SanType::IpAddress(host.parse().unwrap())];
    let usage: &[u8] = if flaw == Flaw::OtherUsage { b"app:custom" } else { b"kms:rpc" };
    leaf.custom_extensions = vec![CustomExtension::from_oid_content(&OID_USAGE, wrap(usage))];
    let leaf_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let leaf_cert = leaf.signed_by(&leaf_key, &Issuer::from_params(&issuing, &issuing_key)).unwrap();

    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut clients = RootCertStore::empty();
    clients.add(temp_ca.der().clone()).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(clients), Arc::clone(&provider)).build().unwrap();
    let chain: Vec<CertificateDer<'static>> = vec![leaf_cert.der().clone(), issuing_cert.der().clone()];
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, PrivatePkcs8KeyDer::from(leaf_key.serialize_der()).into())
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    local.keys_file(
        &json!({ "Kms": {
            "url": format!("https://{address}/prpc"), "pubkey": hex::encode(root_key.subject_public_key_info()),
            "tmp_ca_key": temp_key.serialize_pem(), "tmp_ca_cert": temp_ca.pem(),
        } }),
        &root_cert.pem(),
    );
    let root_pem = root_cert.pem();
    write(&local.path("root.pem"), &root_pem);
    let server = Arc::new(Server { flaw, root, root_key, root_pem, evidence: Mutex::default() });
    let router = Router::new().route("/prpc/{method}", any(method)).with_state(Arc::clone(&server));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, router) = (acceptor.clone(), router.clone());
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve_connection(stream, router, &PlainLimits::default(), &CancellationToken::new()).await;
                }
            });
        }
    });
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kms_certifies_keys_of_the_guest() {
    let local = Local::new(true);
    let server = server(&local, Flaw::None).await;
    tokio::task::spawn_blocking(move || {
        let _agent = local.start(&Local::compose(&json!({})));
        let args = json!({ "subject": "example.com", "alt_names": ["example.com"], "usage_server_auth": true });
        let (status, answer) = local.guest("GetTlsKey", &args);
        assert_eq!(status, 200, "{answer}");
        let part = |index: usize| answer["certificate_chain"][index].as_str().unwrap().to_owned();
        assert_eq!(answer["certificate_chain"].as_array().unwrap().len(), 3);
        let (leaf, ca, key) = (local.path("leaf.pem"), local.path("ca.pem"), local.path("leaf.key"));
        write(&leaf, &part(0));
        write(&ca, &part(1));
        write(&key, answer["key"].as_str().unwrap());
        let openssl = |command: &mut Command| {
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            output.stdout
        };
        openssl(Command::new("openssl").arg("verify").arg("-CAfile").arg(local.path("root.pem")).arg("-untrusted").arg(&ca).arg(&leaf));
        let of_certificate = openssl(Command::new("openssl").args(["x509", "-noout", "-pubkey", "-in"]).arg(&leaf));
        assert_eq!(of_certificate, openssl(Command::new("openssl").args(["pkey", "-pubout", "-in"]).arg(&key)));
        // What the server saw is this guest's evidence over that key.
        let seen = server.evidence.lock().unwrap();
        let (public_key, evidence) = seen.last().unwrap();
        let proven = local.world.verify(evidence).unwrap();
        assert_eq!(*proven.report_data(), ratls_certificate(public_key));
        let (_, info) = local.guest("Info", &json!({}));
        assert_eq!(proven.app_id().unwrap().to_string(), info["app_id"]);
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_is_passed_by_from_then_on() {
    let local = Local::new(true);
    let server = server(&local, Flaw::None).await;
    // It takes connections, and is gone before anything is said.
    let failing = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = failing.local_addr().unwrap();
    let tried = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&tried);
    std::thread::spawn(move || {
        for stream in failing.incoming() {
            counted.fetch_add(1, Ordering::SeqCst);
            drop(stream);
        }
    });
    tokio::task::spawn_blocking(move || {
        let keys: serde_json::Value = serde_json::from_slice(&std::fs::read(local.path(".appkeys.json")).unwrap()).unwrap();
        let good = keys["key_provider"]["Kms"]["url"].as_str().unwrap().trim_end_matches("/prpc");
        let mut command = local.command(&Local::compose(&json!({})));
        command.env("DSTACK_AGENT__DSTACK_URLS", format!("[\"https://{address}\", \"{good}\"]"));
        let _agent = local.wait(Running(Some(command.spawn().unwrap())));
        for certified in 1..=3 {
            let (status, answer) = local.guest("GetTlsKey", &json!({ "subject": "x" }));
            assert_eq!(status, 200, "{answer}");
            assert_eq!(server.evidence.lock().unwrap().len(), certified);
            assert_eq!(tried.load(Ordering::SeqCst), 1, "asked once, then passed by");
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_no_kms_is_refused() {
    let local = Arc::new(Local::new(true));
    for (flaw, said) in [
        (Flaw::OtherUsage, "Invalid server cert usage"),
        (Flaw::OtherHost, "not valid for name"),
        (Flaw::OtherRoot, "unreachable"),
        (Flaw::OtherKey, "not for this key"),
        (Flaw::Refuses, "Boot denied: not today"),
    ] {
        let server = server(&local, flaw).await;
        let local = Arc::clone(&local);
        tokio::task::spawn_blocking(move || {
            let _agent = local.start(&Local::compose(&json!({})));
            let (status, answer) = local.guest("GetTlsKey", &json!({ "subject": "x" }));
            let text = answer["error"].as_str().unwrap_or_default();
            assert!(status == 400 && text.contains(said) || flaw == Flaw::OtherHost && text.contains("unreachable"), "{flaw:?}: {answer}");
            let asked = matches!(flaw, Flaw::OtherKey);
            assert_eq!(!server.evidence.lock().unwrap().is_empty(), asked, "{flaw:?}: a wrong server is told nothing");
            assert_eq!(local.guest("GetKey", &json!({ "path": "p" })).0, 200, "keys do not need it");
        })
        .await
        .unwrap();
    }
}
