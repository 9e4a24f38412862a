//! This node as its own client: it makes a request, releases it as any other, opens the partials and combines them.
//!
//! Owns: modes L (for the guest whose TLS ends here) and E (for an env attempt that names this node), from the wanted keys to the keys in
//! locked memory. Never: keeps a key, trusts a peer's partial without proof, receipt and public key.
//! Source: threshold.md §1.3, §2.4, §2.5, §2.7; ADR 0027.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use dstack_audit::{CommittedIntent, VouchedHead, verify_receipt};
use dstack_protocol::release::{Ask, KeyClass, Mode, PartialPlain, RelReq, Wish};
use dstack_protocol::state::{BeaconRow, State};
use dstack_protocol::{AppId, ClusterId, Generation, NodeIndex, Refusal, RefusalCode, RootTag, binding, env};
use dstack_secret::Locked;
use dstack_threshold::answer::{AnswerContext, RecipientKey, open_partial};
use dstack_threshold::combine::{AnswerGroup, CombineError, Combiner, PrfOutput};
use dstack_threshold::keys::derive;
use dstack_threshold::known::{Expected, KnownOutputs, Unproven};
use dstack_threshold::prf::Batch;
use tracing::warn;

use crate::metrics;
use crate::ports::{Certificates, Log, random, random_secret, read};
use crate::release::{Coordinator, Gathered};
use crate::share_holder::OwnPartial;

/// See the module text. Cheap to clone.
#[derive(Clone)]
pub struct Combine {
    /// Cluster.
    pub cluster_id: ClusterId,
    /// Releases requests, this node's own too.
    pub coordinator: Coordinator,
    /// Certificates at hand: a request names a beacon that has one.
    pub certificates: Arc<dyn Certificates>,
    known: Arc<Mutex<KnownOutputs>>,
}

/// For whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// Mode L: a guest with evidence in dstack's own binding.
    Legacy {
        /// The evidence, as holders judge it.
        evidence: Vec<u8>,
        /// The key that it is bound to, DER.
        spki: Vec<u8>,
    },
    /// Mode E: the open attempt at this position.
    Env {
        /// Leaf number of the attempt.
        attempt_pos: u64,
    },
}

/// What a release gave this node.
#[derive(Debug)]
pub struct Served {
    /// The committed intent: what a node's claim to a signature over the key rests on.
    pub intent_id: [u8; 32],
    /// One key a wish, in the order of the wishes.
    pub keys: Vec<ServedKey>,
}

/// A key of one app in this node's memory, for as long as it takes to answer.
#[derive(Debug)]
pub struct ServedKey {
    /// Kind of key.
    pub class: KeyClass,
    /// Public key, where the class has one: X25519 (32 bytes) or SEC1 compressed (33 bytes).
    pub public: Option<Vec<u8>>,
    /// The key: locked, wiped on drop.
    pub bytes: Locked<32>,
}

/// The latest beacon that has a head certificate: an uncertified one does not count (threshold.md §2.6).
///
/// # Errors
/// [`RefusalCode::NoCert`] before there is one.
pub fn certified_beacon(log: &dyn Log, certificates: &dyn Certificates) -> Result<(u64, BeaconRow), Refusal> {
    let latest = |state: &State| {
        let mut beacons = state.beacons.iter().rev();
        beacons.find(|(pos, _)| certificates.certifies_beacon(**pos)).map(|(pos, row)| (*pos, row.clone()))
    };
    read(log, latest)?.ok_or_else(|| Refusal::new(RefusalCode::NoCert, "a beacon with a head certificate", "none yet").retry_after(300))
}

/// What of the state a combination rests on.
struct Root {
    own: NodeIndex,
    public_key: [u8; 32],
    t: u16,
    certified: BTreeMap<NodeIndex, [u8; 32]>,
}

impl Combine {
    /// One that knows no output yet.
    #[must_use]
    pub fn new(cluster_id: ClusterId, coordinator: Coordinator, certificates: Arc<dyn Certificates>) -> Self {
        Self { cluster_id, coordinator, certificates, known: Arc::default() }
    }

    /// The keys of `wishes`, in their order. A holder whose partial is wrong is named in the log and replaced, as a client does; the
    /// request stays the same and is recorded once.
    ///
    /// # Errors
    /// What the release refuses, here or at the holders.
    pub async fn keys(&self, wanted: Wanted, generation: Generation, app_id: AppId, wishes: Vec<Wish>) -> Result<Served, Refusal> {
        let root = self.root(generation)?;
        let (beacon_pos, beacon) = certified_beacon(&*self.coordinator.log, &*self.certificates)?;
        let recipient = Arc::new(RecipientKey::new(random_secret()?));
        let (mode, evidence_hash, evidence, spki) = match wanted {
            Wanted::Legacy { evidence, spki } => (Mode::Legacy, binding::evidence_hash(&evidence), evidence, spki),
            Wanted::Env { attempt_pos } => (Mode::Env, env::evidence_hash(attempt_pos), Vec::new(), Vec::new()),
        };
        let request = RelReq {
            cluster_id: self.cluster_id,
            generation,
            beacon_pos,
            beacon: beacon.value,
            mode,
            evidence_hash,
            epk: recipient.public(),
            nonce: random()?,
            app_id,
            wishes,
        };
        let ask = Ask { request, sig: [0; 64], session_pos: 0, spki, evidence };
        let (intent_id, root) = (ask.request.intent(root.own).id(), Arc::new(root));
        let mut bad = BTreeSet::new();
        let mut expected = lock(&self.known).expected(&ask.request);
        loop {
            let exclude: Vec<NodeIndex> = bad.iter().copied().collect();
            let gathered = self.coordinator.gather(ask.clone(), root.own, expected.is_some(), &exclude).await?;
            let (request, recipient, root, known) =
                (ask.request.clone(), Arc::clone(&recipient), Arc::clone(&root), Arc::clone(&self.known));
            let began = Instant::now();
            let expected_now = expected.take();
            let combined = tokio::task::spawn_blocking(move || match expected_now {
                Some(expected) => recombine(&request, &recipient, &root, &expected, gathered),
                None => combine(&request, &recipient, &root, gathered, &known),
            });
            let combined = combined.await;
            metrics::stage("combine", began.elapsed());
            match combined.map_err(|error| internal(error.to_string()))? {
                Ok(keys) => return Ok(Served { intent_id, keys }),
                Err(Failed::Refused(refusal)) => return Err(refusal),
                // Somebody lies, or an answer is none: proofs will tell who.
                Err(Failed::NotAsKnown) => metrics::combined("mismatch"),
                Err(Failed::Culprits(culprits)) => {
                    let named: Vec<u16> = culprits.iter().map(|index| index.0).collect();
                    warn!(%app_id, holders = ?named, "wrong partials: these holders are not asked again for this request");
                    metrics::wrong_partials(named.len());
                    let before = bad.len();
                    bad.extend(culprits);
                    if bad.len() == before {
                        return Err(internal("a holder that was excluded answered".to_owned()));
                    }
                }
            }
        }
    }

    fn root(&self, generation: Generation) -> Result<Root, Refusal> {
        let seat = self.coordinator.seat;
        let found = read(&*self.coordinator.log, |state| {
            let row = state.roots.get(&(generation, RootTag::Prf))?;
            let own = state.seats.get(&seat)?.index;
            let certified = row.vks.iter().filter_map(|(index, vk)| Some((*index, vk.0.as_slice().try_into().ok()?)));
            Some(Root { own, public_key: row.public_key.0.as_slice().try_into().ok()?, t: row.t, certified: certified.collect() })
        })?;
        found.ok_or_else(|| {
            Refusal::new(RefusalCode::UnknownGeneration, "a generation with a root, and a seat of this node", generation.to_string())
        })
    }
}

enum Failed {
    /// These holders' partials do not belong.
    Culprits(Vec<NodeIndex>),
    /// They do not lead to the outputs that are known.
    NotAsKnown,
    Refused(Refusal),
}

fn internal(what: String) -> Refusal {
    Refusal::new(RefusalCode::Internal, "keys of a release", what)
}

/// Receipt, partials against it, combination under the public key, typed keys: what a client does (threshold.md §1.3, §1.4, §2.7). The
/// certified keys are at hand here, so a liar is named at once.
fn combine(
    request: &RelReq,
    recipient: &RecipientKey,
    root: &Root,
    gathered: Gathered,
    known: &Mutex<KnownOutputs>,
) -> Result<Vec<ServedKey>, Failed> {
    let Gathered { answer, own } = gathered;
    let refused = |what: String| Failed::Refused(internal(what));
    let committed = verify_receipt(&answer.receipt, &request.intent(root.own)).map_err(|error| refused(error.to_string()))?;
    let batch = Batch::of_request(request).map_err(|error| refused(error.to_string()))?;
    let mut combiner = Combiner::new(batch, request.generation, &root.public_key).map_err(|error| refused(error.to_string()))?;
    let req_hash = request.req_hash();
    let context = AnswerContext { cluster_id: &request.cluster_id, generation: request.generation, req_hash: &req_hash };
    let mut culprits = Vec::new();
    let mut partials: Vec<(NodeIndex, Result<PartialPlain, _>)> =
        answer.outs.iter().map(|out| (out.index, open_partial(out, &context, recipient).map_err(drop))).collect();
    match own {
        Some(OwnPartial::Proven(plain)) => partials.push((plain.index, Ok(plain))),
        Some(OwnPartial::Unproven(_)) => return Err(refused("this node's own partial has no proof".to_owned())),
        None => {}
    }
    for (index, plain) in partials {
        let added = plain.and_then(|plain| combiner.add(&plain).map_err(drop));
        // One that does not open, does not prove, or speaks of another head than the receipt does not belong.
        if !added.is_ok_and(|group| vouches(&committed, &group, index)) {
            culprits.push(index);
        }
    }
    if !culprits.is_empty() {
        return Err(Failed::Culprits(culprits));
    }
    // Newest epoch first: holders of an older one did not lie, but are not of use either.
    let groups = combiner.groups();
    let Some((group, _)) = groups.iter().next_back() else { return Err(refused("no partials".to_owned())) };
    let combined = match combiner.combine(group, root.t, Some(&root.certified)) {
        Ok(combined) => combined,
        Err(error) => return Err(blamed(&error, groups.keys().next_back(), &groups)),
    };
    let heads: Vec<VouchedHead> = combined.used.iter().map(|holder| head(group, *holder)).collect();
    committed.agrees_with(&heads).map_err(|error| refused(error.to_string()))?;
    lock(known).learn(request, &combined.outputs);
    metrics::combined("proven");
    keys(request, &combined.outputs)
}

/// The same where proofs led to these outputs before (ADR 0027): receipt, partials against it, and what comes out must be what is known.
fn recombine(
    request: &RelReq,
    recipient: &RecipientKey,
    root: &Root,
    expected: &Expected,
    gathered: Gathered,
) -> Result<Vec<ServedKey>, Failed> {
    let Gathered { answer, own } = gathered;
    let refused = |what: String| Failed::Refused(internal(what));
    let committed = verify_receipt(&answer.receipt, &request.intent(root.own)).map_err(|error| refused(error.to_string()))?;
    let req_hash = request.req_hash();
    let context = AnswerContext { cluster_id: &request.cluster_id, generation: request.generation, req_hash: &req_hash };
    let mut partials = Vec::new();
    match own {
        // It was cleared against the row that the receipt is of.
        Some(OwnPartial::Unproven(evaluation)) => partials.push(Unproven::own(evaluation)),
        Some(OwnPartial::Proven(plain)) => partials.extend(Unproven::of(&plain)),
        None => {}
    }
    for out in answer.outs.iter().take(usize::from(root.t).saturating_sub(partials.len())) {
        let plain = open_partial(out, &context, recipient).map_err(|_| Failed::NotAsKnown)?;
        let head = VouchedHead { holder: plain.index, pos: plain.pos, size: plain.size, log_root: plain.log_root };
        committed.agrees_with(&[head]).map_err(|_| Failed::NotAsKnown)?;
        partials.push(Unproven::of(&plain).ok_or(Failed::NotAsKnown)?);
    }
    if partials.len() != usize::from(root.t) {
        return Err(Failed::NotAsKnown);
    }
    let outputs = expected.combine(&partials).ok_or(Failed::NotAsKnown)?;
    metrics::combined("known");
    keys(request, &outputs)
}

fn keys(request: &RelReq, outputs: &[PrfOutput]) -> Result<Vec<ServedKey>, Failed> {
    let keys = request.wishes.iter().zip(outputs).map(|(wish, output)| {
        let key = derive(wish, &request.app_id, output).map_err(|error| Failed::Refused(internal(error.to_string())))?;
        Ok(ServedKey { class: key.class(), public: key.public_key(), bytes: Locked::new(key.into_bytes()) })
    });
    keys.collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain data: a holder that panicked left it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn head(group: &AnswerGroup, holder: NodeIndex) -> VouchedHead {
    VouchedHead { holder, pos: group.pos, size: group.size, log_root: group.log_root }
}

fn vouches(committed: &CommittedIntent, group: &AnswerGroup, holder: NodeIndex) -> bool {
    committed.agrees_with(&[head(group, holder)]).is_ok()
}

/// Whom to leave out next time: whose key is not the certified one, or who answered under an older epoch.
fn blamed(error: &CombineError, newest: Option<&AnswerGroup>, groups: &BTreeMap<AnswerGroup, Vec<NodeIndex>>) -> Failed {
    let older = groups.iter().filter(|(group, _)| Some(*group) != newest).flat_map(|(_, holders)| holders);
    let culprits: Vec<NodeIndex> = error.culprits().iter().chain(older).copied().collect();
    if culprits.is_empty() { Failed::Refused(internal(error.to_string())) } else { Failed::Culprits(culprits) }
}
