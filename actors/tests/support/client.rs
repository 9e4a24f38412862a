//! A client of mode C: a guest with a session key, its requests, and what it does with the answer.

use std::collections::BTreeMap;

use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P256K1_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use dstack_audit::{VouchedHead, verify_receipt};
use dstack_protocol::binding;
use dstack_protocol::release::{Ask, KeyClass, Mode, Out, PartialPlain, RelReq, Wish};
use dstack_protocol::rpc::ReleaseAnswer;
use dstack_protocol::sign::AppPkClaim;
use dstack_protocol::{Generation, NodeIndex, Wire};
use dstack_secret::Secret;
use dstack_tee::Device as _;
use dstack_tee::software::protocol::{Boot, HexArray, HexBytes};
use dstack_testkit::eventlog::RuntimeEvent;
use dstack_testkit::{Machine, Measured};
use dstack_threshold::answer::{AnswerContext, RecipientKey, open_partial};
use dstack_threshold::combine::{CombineError, Combiner};
use dstack_threshold::prf::Batch;

use super::cluster::{APP, COMPOSE, Cluster};

/// One session.
pub struct Client {
    machine: Machine,
    key: EcdsaKeyPair,
    pub spki: Vec<u8>,
    pub session_pos: u64,
    pub evidence: Vec<u8>,
    pub instance: Vec<u8>,
}

impl Client {
    /// A guest of the app with a session over the latest beacon.
    pub fn new(cluster: &Cluster, name: &str) -> Self {
        Self::bound(cluster, name, |pos, beacon, spki| binding::session(&cluster.id, pos, beacon, spki))
    }

    /// A guest of dstack's, whose evidence is bound to its TLS key alone.
    pub fn legacy(cluster: &Cluster, name: &str) -> Self {
        Self::bound(cluster, name, |_, _, spki| binding::ratls_certificate(spki))
    }

    /// The same of a guest that measured these events too while it booted.
    pub fn legacy_after(cluster: &Cluster, name: &str, events: &[(&str, &[u8])]) -> Self {
        Self::measured(cluster, name, events, |_, _, spki| binding::ratls_certificate(spki))
    }

    fn bound(cluster: &Cluster, name: &str, report_data: impl FnOnce(u64, &[u8; 32], &[u8]) -> [u8; 64]) -> Self {
        Self::measured(cluster, name, &[], report_data)
    }

    fn measured(
        cluster: &Cluster,
        name: &str,
        events: &[(&str, &[u8])],
        report_data: impl FnOnce(u64, &[u8; 32], &[u8]) -> [u8; 64],
    ) -> Self {
        let boot = Boot {
            compose: HexBytes(COMPOSE.to_vec()),
            app_id: Some(HexArray(APP.0)),
            instance_seed: Some(HexBytes(name.as_bytes().to_vec())),
            key_provider: None,
        };
        let measured = Measured::guest(&boot);
        let machine = Machine::tdx(name, &cluster.roots).unwrap();
        let instance = machine.host().booted(&measured).unwrap().instance_id.0;
        let mut measuring = measured.td_registers().events;
        // Before the last one, `system-ready`: what comes later names nothing.
        measuring.splice(measuring.len() - 1..measuring.len() - 1, events.iter().map(|(name, payload)| RuntimeEvent::new(name, *payload)));
        let machine = machine.running(if events.is_empty() { measured } else { Measured::Started(measuring) });
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let der: PublicKeyX509Der<'_> = key.public_key().as_der().unwrap();
        let spki = der.as_ref().to_vec();
        let (session_pos, beacon) = cluster.latest_beacon();
        let evidence = machine.evidence(report_data(session_pos, &beacon, &spki)).unwrap();
        Self { machine, key, spki, session_pos, evidence, instance }
    }

    /// This guest's claim to a key of its app, over the latest beacon.
    pub fn claim(&self, cluster: &Cluster, key: &AppKey) -> AppPkClaim {
        let (beacon_pos, beacon) = cluster.latest_beacon();
        let (generation, app_id, app_pk) = (Generation(0), APP, key.public());
        let mut claim = AppPkClaim { generation, app_id, app_pk, beacon_pos, beacon, sig: [0; 64], evidence: Vec::new() };
        let report_data = claim.report_data(&cluster.id);
        claim.sig = key.sign(&report_data);
        claim.evidence = self.machine.evidence(report_data).unwrap();
        claim
    }

    /// A request over the latest beacon, with the key that its partials are sealed to.
    pub fn request(&self, cluster: &Cluster, wishes: Vec<Wish>) -> (RelReq, RecipientKey) {
        let recipient = RecipientKey::new(Secret::from_fn(|b| getrandom::fill(b).unwrap()));
        let mut nonce = [0; 32];
        getrandom::fill(&mut nonce).unwrap();
        let (beacon_pos, beacon) = cluster.latest_beacon();
        let request = RelReq {
            cluster_id: cluster.id,
            generation: Generation(0),
            beacon_pos,
            beacon,
            mode: Mode::Client,
            evidence_hash: binding::evidence_hash(&self.evidence),
            epk: recipient.public(),
            nonce,
            app_id: APP,
            wishes,
        };
        (request, recipient)
    }

    /// The usual wishes: the disk of this instance and a custom path.
    pub fn wishes(&self) -> Vec<Wish> {
        vec![Wish::new(KeyClass::Disk, self.instance.clone()).unwrap(), Wish::new(KeyClass::Custom, b"db/main".to_vec()).unwrap()]
    }

    /// Signs a request by this session's key.
    pub fn ask(&self, request: &RelReq) -> Ask {
        let sig = self.key.sign(&SystemRandom::new(), &request.encode()).unwrap();
        Ask {
            request: request.clone(),
            sig: sig.as_ref().try_into().unwrap(),
            session_pos: self.session_pos,
            spki: self.spki.clone(),
            evidence: self.evidence.clone(),
        }
    }
}

/// Opens a sealed partial.
pub fn open(request: &RelReq, key: &RecipientKey, out: &Out) -> Option<PartialPlain> {
    let req_hash = request.req_hash();
    let context = AnswerContext { cluster_id: &request.cluster_id, generation: request.generation, req_hash: &req_hash };
    open_partial(out, &context, key).ok()
}

/// What a client does: receipt, partials against it, combination under the pinned key alone.
pub fn combine(cluster: &Cluster, request: &RelReq, key: &RecipientKey, answer: &ReleaseAnswer) -> Result<Vec<[u8; 64]>, CombineError> {
    combine_certified(cluster, request, key, answer, None)
}

/// The same with the verification keys of the epoch at hand.
pub fn combine_certified(
    cluster: &Cluster,
    request: &RelReq,
    key: &RecipientKey,
    answer: &ReleaseAnswer,
    certified: Option<&BTreeMap<NodeIndex, [u8; 32]>>,
) -> Result<Vec<[u8; 64]>, CombineError> {
    let committed = verify_receipt(&answer.receipt, &request.intent(NodeIndex(0))).unwrap();
    let plains: Vec<PartialPlain> = answer.outs.iter().filter_map(|out| open(request, key, out)).collect();
    let vouched: Vec<VouchedHead> =
        plains.iter().map(|p| VouchedHead { holder: p.index, pos: p.pos, size: p.size, log_root: p.log_root }).collect();
    committed.agrees_with(&vouched).unwrap();
    let t = cluster.log.read(|state| state.genesis.t);
    let mut combiner = Combiner::new(Batch::of_request(request).unwrap(), request.generation, &cluster.public_key())?;
    let mut group = None;
    for plain in &plains {
        group = Some(combiner.add(plain).unwrap());
    }
    let Some(group) = group else { return Err(CombineError::TooFew { have: 0, need: usize::from(t), culprits: vec![] }) };
    let combined = combiner.combine(&group, t, certified)?;
    assert!(combined.failed_sets.is_empty() && combined.culprits.is_empty());
    Ok(combined.outputs.iter().map(|output| output.expose(|z| *z)).collect())
}

/// A secp256k1 key as apps have it.
pub struct AppKey(EcdsaKeyPair);

impl AppKey {
    pub fn generate() -> Self {
        Self(EcdsaKeyPair::generate(&ECDSA_P256K1_SHA256_FIXED_SIGNING).unwrap())
    }

    /// SEC1 compressed.
    pub fn public(&self) -> [u8; 33] {
        let point = self.0.public_key().as_ref();
        let mut compressed = [2 + (point[64] & 1); 33];
        compressed[1..].copy_from_slice(&point[1..33]);
        compressed
    }

    /// `r ‖ s` over SHA-256 of the message, low s.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        loop {
            let signature: [u8; 64] = self.0.sign(&SystemRandom::new(), message).unwrap().as_ref().try_into().unwrap();
            // Half the order begins with 0x7fff…: below that s is low beyond doubt.
            if signature[32] < 0x7f {
                return signature;
            }
        }
    }
}
