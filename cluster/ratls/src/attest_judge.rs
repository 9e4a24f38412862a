//! The judge of production: the attestation crate, a cache of its verdicts, the two bindings, a rule of acceptance.
//! Owns: which trust material is in force. Never: fetches collateral, keeps a refusal.
//! Source: threshold.md §2.2 (session rule; verdicts cached until earliest expiry or a change of collateral).

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use dstack_attest::{AttestError, CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity, VerifyContext, verify, verify_legacy};
use dstack_protocol::codec::{Reader, sha256};
use dstack_protocol::collateral::Wants;
use dstack_protocol::limits::EVIDENCE_BYTES_MAX;
use dstack_protocol::{ClusterId, UnixMillis, binding};

use crate::judge::{EvidenceJudge, JudgeError};
use crate::metrics;
use crate::peer::{Binding, PeerCertificate, PeerRole};
pub use crate::verdicts::VERDICTS_MAX;
use crate::verdicts::Verdicts;

/// The beacons a node knows, for the session rule.
pub trait Beacons: Send + Sync {
    /// The cluster that sessions must name.
    fn cluster_id(&self) -> ClusterId;
    /// The value of the beacon at this leaf, if it is one and still kept.
    fn beacon(&self, beacon_pos: u64) -> Option<[u8; 32]>;
}

/// The collateral that the log pins. Asked at each judgement: it answers from memory.
pub trait PinnedCollateral: Send + Sync {
    /// The bundle in force; `None` before the log has one, then that of the trust material counts.
    fn in_force(&self) -> Option<[u8; 32]>;
    /// The bundle of that id: in force, or named by an open intent.
    fn bundle(&self, id: &[u8; 32]) -> Option<CollateralBundle>;
}

/// Bundles kept beside the first, parsed.
const BUNDLES_KEPT: usize = 8;

/// Decides on a verified identity; the text says what was expected and what came.
pub type Acceptance = Box<dyn Fn(PeerRole, &VerifiedIdentity) -> Result<(), String> + Send + Sync>;

/// What evidence is verified with.
pub struct TrustMaterial {
    /// Roots of trust.
    pub roots: TrustRoots,
    /// Collateral of the platforms.
    pub collateral: CollateralBundle,
    /// Allowed states of the platforms.
    pub tcb: TcbPolicy,
}

/// See the module text.
pub struct AttestJudge {
    material: RwLock<Arc<InForce>>,
    verdicts: Mutex<Verdicts<VerifiedIdentity>>,
    beacons: Option<Arc<dyn Beacons>>,
    pinned: Option<Arc<dyn PinnedCollateral>>,
    /// Trust material with pinned bundles, the latest used last.
    others: Mutex<Vec<Arc<InForce>>>,
    collateral_age_ms_max: u64,
    wants: Mutex<Wants>,
    acceptance: Acceptance,
}

struct InForce {
    material: TrustMaterial,
    /// Counts replacements, so that a verdict under other roots or another TCB policy is never found again.
    version: u64,
}

impl AttestJudge {
    /// A judge that accepts every identity whose evidence holds in dstack's binding.
    pub fn new(material: TrustMaterial) -> Self {
        Self {
            material: RwLock::new(Arc::new(InForce::new(material, 0))),
            verdicts: Mutex::new(Verdicts::default()),
            beacons: None,
            pinned: None,
            others: Mutex::default(),
            collateral_age_ms_max: u64::MAX,
            wants: Mutex::default(),
            acceptance: Box::new(|_role, _identity| Ok(())),
        }
    }

    /// Also accepts session certificates from clients.
    pub fn with_beacons(mut self, beacons: Arc<dyn Beacons>) -> Self {
        self.beacons = Some(beacons);
        self
    }

    /// Judges with the collateral that the log pins, from the moment on that it pins it.
    pub fn with_pinned(mut self, pinned: Arc<dyn PinnedCollateral>) -> Self {
        self.pinned = Some(pinned);
        self
    }

    /// Refuses what rests on collateral issued longer ago than this, whatever its own dates say.
    pub fn with_collateral_age_max(mut self, age_ms_max: u64) -> Self {
        self.collateral_age_ms_max = age_ms_max;
        self
    }

    /// Asks this rule about every identity, cached or not.
    pub fn with_acceptance(mut self, acceptance: Acceptance) -> Self {
        self.acceptance = acceptance;
        self
    }

    /// Replaces the trust material; forgets all verdicts.
    pub fn replace(&self, material: TrustMaterial) {
        {
            let mut in_force = self.material.write().unwrap_or_else(PoisonError::into_inner);
            *in_force = Arc::new(InForce::new(material, in_force.version.wrapping_add(1)));
        }
        *self.verdicts() = Verdicts::default();
    }

    /// Id of the collateral in force.
    pub fn collateral_id(&self) -> [u8; 32] {
        let pinned = self.pinned.as_ref().and_then(|pinned| pinned.in_force());
        pinned.unwrap_or_else(|| *self.in_force().material.collateral.id())
    }

    /// The identity that evidence proves, from the cache where it is known. Binding and acceptance are not asked.
    ///
    /// # Errors
    /// [`JudgeError::Evidence`].
    pub fn identity(&self, evidence: &[u8], now: UnixMillis) -> Result<Arc<VerifiedIdentity>, JudgeError> {
        self.identity_under(&self.collateral_id(), evidence, now)
    }

    /// As [`Self::identity`], judged with the bundle `collateral_id`: the one that an intent's row names.
    ///
    /// # Errors
    /// [`JudgeError::Evidence`], [`JudgeError::CollateralTooOld`], [`JudgeError::CollateralMissing`].
    pub fn identity_under(&self, collateral_id: &[u8; 32], evidence: &[u8], now: UnixMillis) -> Result<Arc<VerifiedIdentity>, JudgeError> {
        let identity = self.verdict(&*self.with_bundle(collateral_id)?, evidence, now)?;
        // Asked of cached verdicts too: age passes while they are kept.
        match identity.collateral_issued() {
            Some(issued) if now.since(issued) > self.collateral_age_ms_max => {
                Err(JudgeError::CollateralTooOld { issued_ms: issued.0, age_ms_max: self.collateral_age_ms_max, now_ms: now.0 })
            }
            _ => Ok(identity),
        }
    }

    fn verdict(&self, in_force: &InForce, evidence: &[u8], now: UnixMillis) -> Result<Arc<VerifiedIdentity>, JudgeError> {
        let key = sha256(&[&in_force.version.to_be_bytes(), in_force.material.collateral.id(), evidence]);
        if let Some(identity) = self.verdicts().find(&key, now) {
            metrics::verdict("cached");
            return Ok(identity);
        }
        let TrustMaterial { roots, collateral, tcb } = &in_force.material;
        let identity = verify_any(evidence, &VerifyContext { now, roots, collateral, tcb }).map_err(|error| {
            self.note_missing(&error);
            metrics::verdict("refused");
            match error {
                AttestError::CollateralExpired { part, expired_at_ms, now_ms } => {
                    JudgeError::CollateralExpired { part, expired_at_ms, now_ms }
                }
                error => JudgeError::Evidence { class: error.class().as_str(), detail: error.to_string() },
            }
        })?;
        metrics::verdict("verified");
        let identity = Arc::new(identity);
        let kept = self.verdicts().keep(key, &identity, identity.earliest_expiry());
        metrics::verdicts_kept(kept);
        Ok(identity)
    }

    /// The trust material with the bundle `id`. A bundle is parsed once.
    fn with_bundle(&self, id: &[u8; 32]) -> Result<Arc<InForce>, JudgeError> {
        let first = self.in_force();
        if first.material.collateral.id() == id {
            return Ok(first);
        }
        let same = |other: &Arc<InForce>| other.material.collateral.id() == id && other.version == first.version;
        let known = self.others.lock().unwrap_or_else(PoisonError::into_inner).iter().find(|other| same(other)).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let bundle = self.pinned.as_ref().and_then(|pinned| pinned.bundle(id));
        let collateral = bundle.ok_or_else(|| JudgeError::CollateralMissing { id: hex::encode(id) })?;
        let material = TrustMaterial { roots: first.material.roots.clone(), collateral, tcb: first.material.tcb.clone() };
        let made = Arc::new(InForce { material, version: first.version });
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        if others.len() >= BUNDLES_KEPT {
            others.remove(0);
        }
        others.push(Arc::clone(&made));
        Ok(made)
    }

    /// What evidence needed and the collateral did not hold, since this was asked last. Claims, bounded: whoever fetches for them finds
    /// out whether it exists.
    pub fn wants(&self) -> Wants {
        std::mem::take(&mut *self.wants.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note_missing(&self, error: &AttestError) {
        if let Some(want) = error.wants() {
            self.wants.lock().unwrap_or_else(PoisonError::into_inner).add([want]);
        }
    }

    fn in_force(&self) -> Arc<InForce> {
        Arc::clone(&self.material.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn verdicts(&self) -> MutexGuard<'_, Verdicts<VerifiedIdentity>> {
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expected_report_data(&self, certificate: &PeerCertificate<'_>) -> Result<[u8; 64], JudgeError> {
        let beacon_pos = match certificate.binding {
            Binding::Dstack => return Ok(binding::ratls_certificate(certificate.spki)),
            Binding::Session { beacon_pos } => beacon_pos,
        };
        let refused = JudgeError::SessionNotAllowed { role: certificate.role };
        if certificate.role != PeerRole::Client {
            return Err(refused);
        }
        let beacons = self.beacons.as_ref().ok_or(refused)?;
        let beacon = beacons.beacon(beacon_pos).ok_or(JudgeError::UnknownBeacon { beacon_pos })?;
        Ok(binding::session(&beacons.cluster_id(), beacon_pos, &beacon, certificate.spki))
    }
}

impl EvidenceJudge for AttestJudge {
    fn judge(&self, certificate: &PeerCertificate<'_>) -> Result<Arc<VerifiedIdentity>, JudgeError> {
        // Cheap first: a session that names no known beacon costs no verification.
        let expected = self.expected_report_data(certificate)?;
        let identity = self.identity(certificate.evidence, certificate.now)?;
        // Attestation reference §3: report_data == SHA-512("ratls-cert:" ‖ SPKI); threshold.md §2.2 for sessions.
        if *identity.report_data() != expected {
            return Err(JudgeError::Binding);
        }
        (self.acceptance)(certificate.role, &identity).map_err(|reason| JudgeError::NotAccepted { reason })?;
        Ok(identity)
    }
}

impl fmt::Debug for AttestJudge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttestJudge").field("collateral_id", &hex::encode(self.collateral_id())).finish_non_exhaustive()
    }
}

impl InForce {
    fn new(material: TrustMaterial, version: u64) -> Self {
        // Issue 2, item 4: whoever trusts a software root says so.
        for root in material.roots.iter().filter(|root| root.is_software() && is_first(root.spki_sha256())) {
            tracing::warn!(root = hex::encode(root.spki_sha256()), "a software root is trusted: nothing under it is backed by hardware");
        }
        Self { material, version }
    }
}

/// Whether this process names this root for the first time: its judges, one for each kind of peer, trust the same ones.
fn is_first(spki_sha256: &[u8; 32]) -> bool {
    static NAMED: Mutex<BTreeSet<[u8; 32]>> = Mutex::new(BTreeSet::new());
    NAMED.lock().unwrap_or_else(PoisonError::into_inner).insert(*spki_sha256)
}

/// Evidence as threshold.md §2.2 writes it: a versioned attestation, or `"DKMS-V1-LEGACY" ‖ lp4(quote) ‖ lp4(event log)`.
fn verify_any(evidence: &[u8], context: &VerifyContext<'_>) -> Result<VerifiedIdentity, AttestError> {
    match legacy_pair(evidence) {
        Some((quote, event_log)) => verify_legacy(quote, event_log, context),
        None => verify(evidence, context),
    }
}

/// The pair inside evidence of that form.
pub(crate) fn legacy_pair(evidence: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut reader = Reader::new(evidence);
    reader.label("DKMS-V1-LEGACY").ok()?;
    let quote = reader.lp4("quote", EVIDENCE_BYTES_MAX).ok()?;
    let event_log = reader.lp4("event log", EVIDENCE_BYTES_MAX).ok()?;
    reader.finish().ok()?;
    Some((quote, event_log))
}
