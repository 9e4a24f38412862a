//! A cluster's roots as whole keys, rows of the log, and the two judges that are not ours.

use std::process::Command;

use dstack_certificates::issue::{assemble, to_be_signed};
use dstack_certificates::pem;
use dstack_certificates::read::{AppCa, IssuingCa, RootCa};
use dstack_certificates::{P256Key, PublicKey};
use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::sign::{Basis, SignObject};
use dstack_protocol::state::AskRow;
use dstack_protocol::{AppId, ClusterId, Generation, NodeIndex, UnixMillis};
use dstack_secret::Secret;
use ed25519_dalek::Signer as _;
use rcgen::SigningKey as _;

pub(crate) const CLUSTER: ClusterId = ClusterId([0x11; 32]);
pub(crate) const APP: AppId = AppId([0x22; 20]);
/// 2027-01-15T08:00:00Z.
pub(crate) const NOW_S: u64 = 1_800_000_000;

pub(crate) fn key(byte: u8) -> P256Key {
    P256Key::from_scalar(&Secret::from_fn(|bytes| bytes.fill(byte))).unwrap()
}

pub(crate) fn compressed(byte: u8) -> [u8; 33] {
    key(byte).public().p256_compressed().unwrap()
}

pub(crate) fn row(pos: u64, object: SignObject) -> AskRow {
    AskRow { pos, log_time: UnixMillis(NOW_S * 1000 + 999), author: NodeIndex(1), object, basis: Basis::State, attempts: 1 }
}

pub(crate) fn app_ca_object() -> SignObject {
    SignObject::AppCa { generation: Generation(0), app_id: APP, public_key: compressed(2) }
}

pub(crate) fn issuing_object(hosts: &[&str]) -> SignObject {
    let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
    SignObject::IssuingCa { generation: Generation(0), index: NodeIndex(3), public_key: compressed(3), hosts }
}

/// A root of either kind.
pub(crate) enum Root {
    Ed25519(ed25519_dalek::SigningKey),
    P256(P256Key),
}

impl Root {
    pub(crate) fn both() -> [Self; 2] {
        [Self::Ed25519(ed25519_dalek::SigningKey::from_bytes(&[1; 32])), Self::P256(key(1))]
    }

    pub(crate) fn public(&self) -> PublicKey {
        match self {
            Self::Ed25519(key) => PublicKey::Ed25519(key.verifying_key().to_bytes()),
            Self::P256(key) => *key.public(),
        }
    }

    pub(crate) fn algorithm(&self) -> CaAlgorithm {
        match self {
            Self::Ed25519(_) => CaAlgorithm::Ed25519,
            Self::P256(_) => CaAlgorithm::P256,
        }
    }

    /// As the state holds it.
    pub(crate) fn stored(&self) -> Vec<u8> {
        match self.public() {
            PublicKey::Ed25519(key) => key.to_vec(),
            public @ PublicKey::P256(_) => public.p256_compressed().unwrap().to_vec(),
        }
    }

    pub(crate) fn sign(&self, tbs: &[u8]) -> [u8; 64] {
        match self {
            Self::Ed25519(key) => key.sign(tbs).to_bytes(),
            Self::P256(key) => p256::ecdsa::Signature::from_der(&key.sign(tbs).unwrap()).unwrap().to_bytes().into(),
        }
    }

    pub(crate) fn certify(&self, row: &AskRow) -> Vec<u8> {
        let tbs = to_be_signed(&CLUSTER, row, &self.public()).unwrap();
        assemble(&tbs, &self.public(), &self.sign(&tbs)).unwrap()
    }

    pub(crate) fn root_ca(&self) -> RootCa {
        RootCa::read(&self.certify(&row(7, SignObject::RootCa { generation: Generation(0) }))).unwrap()
    }

    pub(crate) fn app_ca(&self) -> AppCa {
        AppCa::read(&self.certify(&row(8, app_ca_object()))).unwrap()
    }

    pub(crate) fn issuing_ca(&self, hosts: &[&str]) -> IssuingCa {
        IssuingCa::read(&self.certify(&row(9, issuing_object(hosts)))).unwrap()
    }
}

/// What a relying party wants of a leaf.
#[derive(Clone, Copy)]
pub(crate) enum Wants<'a> {
    Server(&'a str),
    Client,
}

/// `openssl verify` of a chain, leaf first, root last.
pub(crate) fn openssl(chain: &[&[u8]], wants: Wants<'_>, now_s: u64) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, ders: &[&[u8]]| {
        let path = dir.path().join(name);
        std::fs::write(&path, ders.iter().map(|der| pem::certificate(der)).collect::<String>()).unwrap();
        path
    };
    let (leaf, rest) = chain.split_first().unwrap();
    let (root, between) = rest.split_last().unwrap();
    let mut command = Command::new("openssl");
    command.args(["verify", "-x509_strict", "-attime", &now_s.to_string(), "-CAfile"]).arg(write("root.pem", &[root]));
    if !between.is_empty() {
        command.arg("-untrusted").arg(write("between.pem", between));
    }
    match wants {
        Wants::Server(host) if host.parse::<std::net::IpAddr>().is_ok() => command.args(["-purpose", "sslserver", "-verify_ip", host]),
        Wants::Server(host) => command.args(["-purpose", "sslserver", "-verify_hostname", host]),
        Wants::Client => command.args(["-purpose", "sslclient"]),
    };
    let output = command.arg(write("leaf.pem", &[leaf])).output().expect("openssl is installed");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// The judge inside rustls.
pub(crate) fn webpki(chain: &[&[u8]], wants: Wants<'_>, now_s: u64) -> Result<(), String> {
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    let ders: Vec<CertificateDer<'_>> = chain.iter().map(|der| CertificateDer::from(*der)).collect();
    let (leaf, rest) = ders.split_first().unwrap();
    let (root, between) = rest.split_last().unwrap();
    let anchor = webpki::anchor_from_trusted_cert(root).map_err(|error| error.to_string())?;
    let leaf = webpki::EndEntityCert::try_from(leaf).map_err(|error| error.to_string())?;
    let usage = match wants {
        Wants::Server(_) => webpki::KeyUsage::server_auth(),
        Wants::Client => webpki::KeyUsage::client_auth(),
    };
    let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now_s));
    let algorithms = &[webpki::aws_lc_rs::ED25519, webpki::aws_lc_rs::ECDSA_P256_SHA256];
    leaf.verify_for_usage(algorithms, &[anchor], between, now, usage, None, None).map_err(|error| error.to_string())?;
    if let Wants::Server(host) = wants {
        leaf.verify_is_valid_for_subject_name(&ServerName::try_from(host).unwrap()).map_err(|error| error.to_string())?;
    }
    Ok(())
}
