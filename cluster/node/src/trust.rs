//! Whom this node believes: roots, collateral, measurements, platform identities.
//!
//! Owns: the judges of peers and clients, made from the genesis document and the applied state. Never: verifies by itself (`attest`).
//! Source: architecture.md §2, §7 "Seats"; threshold.md §3.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, bail};
use dstack_actors::ports::{Log, Now};
use dstack_actors::standings::{Standings, Subject};
use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity};
use dstack_protocol::state::State;
use dstack_protocol::{ClusterId, Refusal, RefusalCode, Seat, TcbStatus, UnixMillis};
use dstack_raft::machine::Birth;
use dstack_ratls::attest_judge::{Beacons, TrustMaterial};
use dstack_ratls::{AttestJudge, JudgeError, PeerRole};
use dstack_runtime::guard;

use crate::collateral::Pinned;
use crate::collateral::pinned::ForNodes;
use crate::config::Config;

/// Statuses that evidence may have at all; policies and the node's configuration choose among them.
const TCB_EXAMINED: [TcbStatus; 6] = [
    TcbStatus::UpToDate,
    TcbStatus::SwHardeningNeeded,
    TcbStatus::ConfigurationNeeded,
    TcbStatus::ConfigurationAndSwHardeningNeeded,
    TcbStatus::OutOfDate,
    TcbStatus::OutOfDateConfigurationNeeded,
];

/// What evidence may be at all: an app's policy and `node_tcb` choose among it, VLEKs included.
fn examined(config: &Config) -> TcbPolicy {
    let examined = TcbPolicy::allowing(&TCB_EXAMINED).accepting_vlek();
    if config.collateral.accept_missing_crl { examined.accepting_missing_crl() } else { examined }
}

/// The applied state, once there is one; judges are made before Raft starts.
#[derive(Default)]
pub(crate) struct Applied(OnceLock<Arc<dyn Log>>);

impl Applied {
    /// Connects the state.
    pub(crate) fn connect(&self, log: Arc<dyn Log>) {
        let _second_time_is_the_same = self.0.set(log);
    }

    fn state<T>(&self, read: impl FnOnce(&State) -> T) -> Option<T> {
        dstack_actors::ports::read(&**self.0.get()?, read).ok()
    }
}

/// Beacons for the session rule of client certificates.
struct AppliedBeacons {
    cluster_id: ClusterId,
    applied: Arc<Applied>,
}

impl Beacons for AppliedBeacons {
    fn cluster_id(&self) -> ClusterId {
        self.cluster_id
    }
    fn beacon(&self, beacon_pos: u64) -> Option<[u8; 32]> {
        self.applied.state(|state| state.beacons.get(&beacon_pos).map(|row| row.value)).flatten()
    }
}

/// Everything that judges.
#[derive(Clone)]
pub(crate) struct Trust {
    birth: Arc<Birth>,
    applied: Arc<Applied>,
    node_tcb: TcbPolicy,
    now: Now,
    /// Whose TCB is accepted and not up to date: apps and nodes.
    pub(crate) standings: Arc<Standings>,
    /// Judges nodes that connect to us, and those we connect to.
    pub(crate) nodes: Arc<AttestJudge>,
    /// Judges clients.
    pub(crate) clients: Arc<AttestJudge>,
    /// Whether a software root is trusted here.
    pub(crate) software: bool,
    /// The collateral that the log pins.
    pub(crate) pinned: Arc<Pinned>,
}

impl Trust {
    /// Reads the roots that the configuration names and checks them against the genesis document.
    pub(crate) fn load(config: &Config, birth: &Arc<Birth>, now: Now) -> anyhow::Result<Self> {
        let genesis = birth.genesis();
        let software = !config.software_roots.is_empty();
        if software == genesis.software_roots.is_empty() {
            bail!(
                "node.software_roots names {} roots, the genesis document {}: a software root is trusted only where both do",
                config.software_roots.len(),
                genesis.software_roots.len()
            );
        }
        let applied = Arc::new(Applied::default());
        let examined = examined(config);
        let material = || -> anyhow::Result<TrustMaterial> {
            Ok(TrustMaterial {
                roots: roots(&config.software_roots, &genesis.software_roots)?,
                collateral: CollateralBundle::parse(birth.collateral()).context("collateral bundle")?,
                tcb: examined.clone(),
            })
        };
        let pinned = Arc::new(Pinned::default());
        let mut trust = Self {
            birth: Arc::clone(birth),
            applied: Arc::clone(&applied),
            node_tcb: if config.collateral.accept_missing_crl {
                config.node_tcb.clone().accepting_missing_crl()
            } else {
                config.node_tcb.clone()
            },
            now,
            standings: Arc::default(),
            nodes: Arc::new(AttestJudge::new(material()?)),
            clients: Arc::new(AttestJudge::new(material()?)),
            software,
            pinned: Arc::clone(&pinned),
        };
        let accepting = trust.clone();
        let for_nodes = Arc::new(ForNodes(Arc::clone(&pinned)));
        let nodes = AttestJudge::new(material()?).with_pinned(for_nodes).with_acceptance(Box::new(move |role, identity| match role {
            PeerRole::Node | PeerRole::Server => accepting.measured(identity).map_err(|refusal| refusal.to_string()),
            PeerRole::Client => Ok(()),
        }));
        let beacons = Arc::new(AppliedBeacons { cluster_id: *birth.cluster_id(), applied });
        trust.nodes = Arc::new(nodes);
        let clients = AttestJudge::new(material()?).with_beacons(beacons).with_pinned(pinned);
        trust.clients = Arc::new(clients.with_collateral_age_max(config.collateral.age_ms_max));
        Ok(trust)
    }

    /// Names the rules by which this node takes another's TCB: nodes whose rules differ may disagree about a peer.
    pub(crate) fn node_policy(&self) -> [u8; 32] {
        self.node_tcb.digest()
    }

    /// Connects the applied state, once Raft runs.
    pub(crate) fn connect(&self, log: Arc<dyn Log>) {
        self.applied.connect(Arc::clone(&log));
        self.pinned.connect(log);
    }

    /// The verifier pool's judge: evidence of clients, guarded against the parser's panics.
    pub(crate) fn client_evidence(&self) -> dstack_actors::ports::Judge {
        let judge = Arc::clone(&self.clients);
        Arc::new(move |evidence, collateral_id, now| identity(&judge, evidence, collateral_id, now))
    }

    /// Judges a node's evidence for a seat: identity of that seat, allowed measurement, `report_data` as expected.
    pub(crate) fn node_evidence(&self, seat: Seat, evidence: &[u8], report_data: &[u8; 64], now: UnixMillis) -> Result<(), Refusal> {
        let identity = identity(&self.nodes, evidence, &self.nodes.collateral_id(), now)?;
        if identity.report_data() != report_data {
            return Err(Refusal::new(RefusalCode::EvidenceInvalid, hex::encode(report_data), hex::encode(identity.report_data())));
        }
        self.admissible(seat, &identity)
    }

    /// What evidence of this node's own device proves, by the rules for nodes.
    pub(crate) fn own(&self, evidence: &[u8], now: UnixMillis) -> Result<Arc<VerifiedIdentity>, Refusal> {
        identity(&self.nodes, evidence, &self.nodes.collateral_id(), now)
    }

    /// Whether a node with this identity may be in this seat.
    pub(crate) fn admissible(&self, seat: Seat, identity: &VerifiedIdentity) -> Result<(), Refusal> {
        self.measured(identity)?;
        self.of_seat(seat, identity)
    }

    /// Whether the measurement is one that the log allows; before genesis is applied, one that the document allows.
    fn measured(&self, identity: &VerifiedIdentity) -> Result<(), Refusal> {
        let platform = identity.platform();
        let key = (platform.byte(), identity.measurement().to_vec());
        let allowed = self.applied.state(|state| state.governance.allowed_nodes.contains(&key)).unwrap_or_else(|| {
            let mut nodes = self.birth.genesis().allowed_nodes.iter();
            nodes.any(|node| node.platform == platform && node.measurement == key.1)
        });
        if !allowed {
            let got = hex::encode(dstack_protocol::codec::sha256(&[identity.measurement()]));
            let expected = format!("a node measurement that the log allows on {}", platform.name());
            return Err(Refusal::new(RefusalCode::MeasurementNotAllowed, expected, format!("measurement with SHA-256 {got}")));
        }
        // By log time, so that a grace ends for all nodes together; before there is a log, by the own clock.
        let applied = self.applied.state(|state| (state.log_time, state.tcb_known.clone()));
        let (at, known) = applied.unwrap_or_else(|| ((self.now)(), BTreeMap::new()));
        let standing = dstack_policy::check_tcb(&self.node_tcb, identity.tcb(), &known, at)?;
        let mut grants = self.birth.genesis().seats.iter();
        if let Some(grant) = grants.find(|grant| grant.platform_identity == identity.platform_identity()) {
            self.standings.note(Subject::Node(grant.seat), standing, at);
        }
        Ok(())
    }

    /// Whether the platform is the one that the seat is granted to.
    pub(crate) fn of_seat(&self, seat: Seat, identity: &VerifiedIdentity) -> Result<(), Refusal> {
        let grant = self.birth.genesis().seats.iter().find(|grant| grant.seat == seat);
        let Some(grant) = grant else {
            return Err(Refusal::new(RefusalCode::PlatformIdentity, "a seat of the genesis document", seat.to_string()));
        };
        if grant.platform_identity != identity.platform_identity() {
            let got = hex::encode(identity.platform_identity());
            return Err(Refusal::new(RefusalCode::PlatformIdentity, hex::encode(&grant.platform_identity), got));
        }
        Ok(())
    }
}

fn identity(judge: &AttestJudge, evidence: &[u8], collateral_id: &[u8; 32], now: UnixMillis) -> Result<Arc<VerifiedIdentity>, Refusal> {
    match guard::run(|| judge.identity_under(collateral_id, evidence, now)) {
        Ok(Ok(identity)) => Ok(identity),
        Ok(Err(JudgeError::CollateralExpired { part, expired_at_ms, now_ms })) => {
            let got = format!("{part} over since {expired_at_ms}, {} ms ago", now_ms.saturating_sub(expired_at_ms));
            Err(Refusal::new(RefusalCode::CollateralExpired, "collateral inside its validity", got))
        }
        Ok(Err(JudgeError::Evidence { class, detail })) => {
            Err(Refusal::new(RefusalCode::EvidenceInvalid, "evidence that verifies", format!("{class}: {detail}")))
        }
        Ok(Err(JudgeError::CollateralTooOld { issued_ms, age_ms_max, now_ms })) => {
            let got = format!("issued at {issued_ms}, {} ms ago", now_ms.saturating_sub(issued_ms));
            Err(Refusal::new(RefusalCode::CollateralTooOld, format!("collateral issued at most {age_ms_max} ms ago"), got))
        }
        Ok(Err(error @ JudgeError::CollateralMissing { .. })) => {
            Err(Refusal::new(RefusalCode::CollateralChanged, "a bundle of this node's state", error.to_string()).retry_after(100))
        }
        Ok(Err(error)) => Err(Refusal::new(RefusalCode::EvidenceInvalid, "evidence that verifies", error.to_string())),
        Err(guard::Panicked) => Err(Refusal::new(RefusalCode::InternalParser, "a verdict", "the parser failed on these bytes")),
    }
}

/// The vendors' roots and those software roots that the configuration and the genesis document both name.
pub(crate) fn roots(files: &[PathBuf], named: &[[u8; 32]]) -> anyhow::Result<TrustRoots> {
    let mut roots = TrustRoots::production();
    for file in files {
        let der = Config::read(file)?;
        roots = roots.with_software_root(&der).map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))?;
    }
    for root in roots.iter().filter(|root| root.is_software()) {
        if !named.contains(root.spki_sha256()) {
            bail!("software root with SPKI {} is not named by the genesis document", hex::encode(root.spki_sha256()));
        }
    }
    Ok(roots)
}

#[cfg(test)]
mod tests;
