//! Strangers at a node's listener for dstack's guests, over sockets: wrong requests by fields and by bytes, TLS that is none. Owns: the
//! cluster that they are sent to, and what has to hold afterwards: the node lives, serves, and has not grown.

mod certificates;
mod conversations;
mod hello;
mod http2;
mod operators;
mod requests;

use std::io::Result;
use std::net::SocketAddr;

use dstack_attest::x509ext::wrap;
use dstack_protocol::binding;
use dstack_testkit::cluster::process::resident_bytes;
use dstack_testkit::cluster::{Cluster, ClusterSpec, MachineKind, until};
use dstack_testkit::raw_http::{Answer, Asking};
use dstack_testkit::raw_tls::{self, Shown, Stream};
use rcgen::{CustomExtension, KeyPair, PublicKeyData as _};
use rustls::SupportedProtocolVersion;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::workload::{Workload, registered};

/// How much a node may grow while it is treated badly: buffers of its connections, and what the allocator keeps.
const GROWTH_BYTES_MAX: u64 = 48 << 20;

struct Target {
    cluster: Cluster,
    guest: Workload,
    address: SocketAddr,
}

impl Target {
    fn start() -> Self {
        let guests = ["web", "other"].map(|name| (name.to_owned(), MachineKind::Tdx)).to_vec();
        let mut cluster = Cluster::start(&ClusterSpec { dstack: true, guests, ..ClusterSpec::default() }).unwrap();
        let app = registered(&cluster, "web", MachineKind::Tdx);
        let guest = Workload::boot(&cluster, "web", &app);
        let address = cluster.dstack_urls()[0].trim_start_matches("https://").parse().unwrap();
        // Its chain is issued by the roots, which were born a moment ago.
        let served = until("the dstack listener", dstack_testkit::cluster::FORMING, || {
            let answer = Asking::new(|| connect(address, BOTH, None)).ask(&get("/prpc/GetMeta"));
            match answer {
                Ok(Answer { status: 200, .. }) => Ok(()),
                other => Err(dstack_testkit::cluster::ClusterError::Unexpected { from: "GetMeta".to_owned(), got: format!("{other:?}") }),
            }
        });
        served.unwrap();
        cluster.check_running().unwrap();
        Self { cluster, guest, address }
    }

    fn anonymous(&self) -> Asking<impl FnMut() -> Result<Stream> + use<>, Stream> {
        let address = self.address;
        Asking::new(move || connect(address, BOTH, None))
    }

    /// A self-signed certificate with these extensions of dstack's, made for its key.
    fn certificate(&self, extensions: impl FnOnce(&[u8]) -> Extensions) -> (Vec<CertificateDer<'static>>, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        for (last, content) in extensions(&key.subject_public_key_info()) {
            params.custom_extensions.push(CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 62397, 1, last], content));
        }
        (vec![params.self_signed(&key).unwrap().der().clone()], key)
    }

    fn evidence(&self, spki: &[u8]) -> Vec<u8> {
        self.guest.evidence(binding::ratls_certificate(spki)).unwrap()
    }

    /// What an honest guest shows.
    fn shown(&self) -> Shown {
        let (chain, key) = self.certificate(|spki| vec![(8, wrap(&self.evidence(spki)))]);
        signing(chain, &key)
    }

    /// The keys of the app, as the honest guest gets them now.
    fn keys(&self) -> serde_json::Value {
        let shown = self.shown();
        let mut asking = Asking::new(|| connect(self.address, BOTH, Some(shown.clone())));
        let body = br#"{"api_version":1}"#;
        let head = format!("POST /prpc/GetAppKey?json HTTP/1.1\r\nHost: kms.test\r\nContent-Length: {}\r\n\r\n", body.len());
        let answer = asking.ask(&[head.as_bytes(), body].concat()).unwrap();
        assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
        serde_json::from_slice(&answer.body).unwrap()
    }

    /// Resident bytes of the node.
    fn resident(&mut self) -> u64 {
        resident(&mut self.cluster)
    }

    /// The node that began still runs, no thread of it broke, and it gives the same keys.
    fn still_serves(&mut self, keys: &serde_json::Value, resident_before: u64) {
        unharmed(&mut self.cluster, resident_before);
        assert_eq!(&self.keys(), keys, "other keys than before");
    }
}

/// Resident bytes of node 1.
fn resident(cluster: &mut Cluster) -> u64 {
    resident_bytes(cluster.node(1).pid().unwrap()).unwrap()
}

/// Node 1 still runs, no thread of it broke, and it has not grown.
fn unharmed(cluster: &mut Cluster, resident_before: u64) {
    cluster.check_running().unwrap();
    for name in ["kms_runtime_guarded_panics_total", "kms_ratls_parser_panics_total"] {
        assert_eq!(cluster.node(1).metric(name).unwrap(), 0.0, "{name}");
    }
    let log = cluster.node(1).log_text();
    assert!(!log.contains("panicked"), "{}", log.lines().filter(|line| line.contains("panicked")).collect::<Vec<_>>().join("\n"));
    let resident = resident(cluster);
    assert!(resident < resident_before + GROWTH_BYTES_MAX, "grew from {resident_before} to {resident} bytes");
}

/// What the listener speaks.
const BOTH: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

fn connect(address: SocketAddr, versions: &[&'static SupportedProtocolVersion], shown: Option<Shown>) -> Result<Stream> {
    raw_tls::connect(address, versions, shown, &[b"http/1.1"])
}

/// Shows this chain and signs with this key.
fn signing(chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> Shown {
    Shown::new(chain, &PrivateKeyDer::try_from(key.serialize_der()).unwrap()).unwrap()
}

/// Numbers of dstack's extensions, and what each holds.
type Extensions = Vec<(u64, Vec<u8>)>;

fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: kms.test\r\n\r\n").into_bytes()
}
