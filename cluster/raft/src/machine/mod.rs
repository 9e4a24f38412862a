//! The replicated state machine of the KMS: commands in, leaves and effects out.
//!
//! Owns: the order of things inside `apply`, leaves, heads due, checkpoint positions. Never: reads a clock or makes
//! randomness (both come in commands), judges evidence (verdicts may differ between binaries, so evidence is judged
//! outside), fails. Source: architecture.md §7, threshold.md §2.2, §2.6, §3.

mod admission;
mod adopt;
mod beacon;
mod ceremony;
pub mod collateral;
pub mod env;
mod intents;
pub mod sign;
mod snapshot;
#[cfg(test)]
mod tests;
pub mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use dstack_attest::TrustRoots;
use dstack_audit::{Frontier, make_receipt};
use dstack_policy::governance as quorum;
use dstack_protocol::command::{Command, CommandAnswer, Outcome};
use dstack_protocol::coordinated::CoordinatorWord;
use dstack_protocol::genesis::{Genesis, collateral_id};
use dstack_protocol::governance::Entry;
use dstack_protocol::limits::CHECKPOINT_EVERY_LEAVES;
use dstack_protocol::log::{Head, Record, RecordKind, body_hash};
use dstack_protocol::receipt::Receipt;
use dstack_protocol::state::{AppRow, Blob, State};
use dstack_protocol::{ClusterId, Epoch, NodeIndex, RefusalCode, Seat, UnixMillis, Wire};

use crate::contract::{Applied, Leaf, Machine};

pub use ceremony::{Replay, epoch_of_new_roots, instance, joined_holders, missing_roots, run_of};
pub use view::{Formation, Signers};

/// What this node must do, or may want to know, after a command was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Sign this head and push the signature to all nodes.
    HeadDue(Head),
    /// Intents were recorded: their receipts, in the order of their leaves.
    IntentsRecorded(Vec<Receipt>),
    /// A beacon was applied.
    BeaconApplied {
        /// Its leaf number.
        pos: u64,
        /// Log time it set.
        log_time: UnixMillis,
    },
    /// Something of that kind changed: who acts on it looks at the state.
    Changed(RecordKind),
    /// A governance action began to wait for its timelock; the node counts from here with its monotonic clock.
    TimelockStarted([u8; 16]),
    /// An app's key was replaced by the app's own claim. An alarm.
    AppKeyReplaced(sign::Replaced),
    /// A command was rejected.
    Rejected {
        /// What it was.
        kind: RecordKind,
        /// Why.
        code: RefusalCode,
    },
}

/// What every node of a cluster is given at its start: the genesis document and the bundle it names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Birth {
    genesis: Genesis,
    document: Vec<u8>,
    collateral: Vec<u8>,
    cluster_id: ClusterId,
    roots: TrustRoots,
}

impl Birth {
    /// Checks that document and bundle belong together.
    ///
    /// # Errors
    /// Says which of them is wrong.
    pub fn new(document: &[u8], collateral: &[u8]) -> Result<Self, String> {
        let genesis = Genesis::decode(document).map_err(|error| format!("genesis document: {error}"))?;
        if genesis.collateral_id != collateral_id(collateral) {
            return Err("the collateral bundle is not the one that the genesis document names".to_owned());
        }
        let cluster_id = genesis.cluster_id();
        Ok(Self { genesis, document: document.to_vec(), collateral: collateral.to_vec(), cluster_id, roots: TrustRoots::production() })
    }

    /// With the software roots that the genesis document names: pinned collateral is judged under these roots, by all nodes alike.
    ///
    /// # Errors
    /// Says which root is named and not given, or given and not named.
    pub fn with_roots(mut self, roots: TrustRoots) -> Result<Self, String> {
        let given: BTreeSet<[u8; 32]> = roots.iter().filter(|root| root.is_software()).map(|root| *root.spki_sha256()).collect();
        let named: BTreeSet<[u8; 32]> = self.genesis.software_roots.iter().copied().collect();
        if let Some(root) = given.symmetric_difference(&named).next() {
            let hex: String = root.iter().map(|byte| format!("{byte:02x}")).collect();
            return Err(format!("software root with SPKI {hex} is not both given and named by the genesis document"));
        }
        self.roots = roots;
        Ok(self)
    }

    /// The roots that collateral is judged under.
    #[must_use]
    pub fn roots(&self) -> &TrustRoots {
        &self.roots
    }

    /// The genesis document.
    #[must_use]
    pub fn genesis(&self) -> &Genesis {
        &self.genesis
    }

    /// Its name.
    #[must_use]
    pub fn cluster_id(&self) -> &ClusterId {
        &self.cluster_id
    }

    /// The collateral bundle.
    #[must_use]
    pub fn collateral(&self) -> &[u8] {
        &self.collateral
    }

    /// The command that opens the log.
    #[must_use]
    pub fn command(&self) -> Command {
        Command::Genesis { genesis: self.document.clone(), collateral: self.collateral.clone() }
    }
}

/// The machine.
#[derive(Debug, Clone)]
pub struct KmsMachine {
    birth: Arc<Birth>,
    state: Option<State>,
    at_checkpoint: bool,
    unconfirmed: Option<Head>,
}

/// A leaf to be: kind, outcome, body.
struct Draft {
    kind: RecordKind,
    outcome: Result<(), RefusalCode>,
    body: Vec<u8>,
}

impl KmsMachine {
    /// A machine before genesis.
    #[must_use]
    pub fn new(birth: Arc<Birth>) -> Self {
        Self { birth, state: None, at_checkpoint: false, unconfirmed: None }
    }

    /// The state, once the genesis was applied.
    #[must_use]
    pub fn state(&self) -> Option<&State> {
        self.state.as_ref()
    }

    /// The head that a certificate must confirm before this node serves: that of the snapshot its state came from
    /// (architecture.md §7 "Snapshots").
    #[must_use]
    pub fn unconfirmed(&self) -> Option<&Head> {
        self.unconfirmed.as_ref()
    }

    /// What this cluster was born from.
    #[must_use]
    pub fn birth(&self) -> &Arc<Birth> {
        &self.birth
    }

    fn run(&mut self, command: Command) -> Applied<Effect> {
        match (command, self.state.take()) {
            (Command::Genesis { genesis, collateral }, None) => self.open_log(&genesis, &collateral),
            (_, None) => refused(RefusalCode::NoGenesis),
            (command, Some(mut state)) => {
                let size_before = state.size;
                let applied = self.advance(&mut state, command, size_before);
                self.state = Some(state);
                applied
            }
        }
    }

    fn open_log(&mut self, genesis: &[u8], collateral: &[u8]) -> Applied<Effect> {
        if genesis != self.birth.document || collateral != self.birth.collateral {
            return refused(RefusalCode::GenesisMismatch);
        }
        let document = &self.birth.genesis;
        let mut state = State {
            genesis: document.clone(),
            collaterals: BTreeMap::from([(document.collateral_id, Blob(collateral.to_vec()))]),
            collateral_id: document.collateral_id,
            tcb_known: BTreeMap::new(),
            size: 0,
            peaks: Vec::new(),
            log_time: UnixMillis(0),
            epoch: Epoch(0),
            beacons: BTreeMap::new(),
            latest_beacon: None,
            members: BTreeMap::new(),
            members_version: 0,
            seats: BTreeMap::new(),
            admits: BTreeMap::new(),
            admissions: BTreeMap::new(),
            next_index: NodeIndex(document.n.saturating_add(1)),
            attempt: None,
            attempts: 0,
            roots: BTreeMap::new(),
            ceremonies: BTreeMap::new(),
            governance: quorum::at_genesis(document),
            apps: BTreeMap::new(),
            policies: BTreeMap::new(),
            intents: BTreeMap::new(),
            signatures: BTreeMap::new(),
            env_keys: BTreeMap::new(),
            sightings: BTreeMap::new(),
            legacy_rates: BTreeMap::new(),
            delegation: None,
            adopt_rates: BTreeMap::new(),
        };
        let draft = Draft { kind: RecordKind::Genesis, outcome: Ok(()), body: genesis.to_vec() };
        let (leaves, outcomes, _) = append(&mut state, vec![draft]);
        let response = answer(&state, outcomes);
        self.state = Some(state);
        Applied { response, leaves, effects: vec![Effect::Changed(RecordKind::Genesis)] }
    }

    fn advance(&mut self, state: &mut State, command: Command, size_before: u64) -> Applied<Effect> {
        let wants_checkpoint = matches!(command, Command::Checkpoint);
        let is_beacon = matches!(command, Command::Beacon(_));
        let cluster_id = self.birth.cluster_id;
        let mut effects = Vec::new();
        let (leaves, outcomes) = match command {
            Command::Intents(batch) => record_intents(state, None, batch, &mut effects),
            Command::Coordinated(batch) => {
                let word = batch.word();
                let word = intents::is_signed(state, &cluster_id, &word).then_some(word);
                record_intents(state, word, batch.intents, &mut effects)
            }
            other => {
                let (kind, body) = named(&other);
                // Leaf of the first ask, where a signature is asked for again.
                let mut first = None;
                let mut retry_after_ms = 0;
                let outcome = match &other {
                    Command::Genesis { .. } => Err(RefusalCode::GenesisRepeated),
                    Command::Beacon(readings) => beacon::apply(state, &cluster_id, readings),
                    Command::Ceremony(message) => match kind {
                        RecordKind::Admission => admission::apply(state, &cluster_id, message),
                        RecordKind::Env => env::publish(state, &cluster_id, message),
                        _ => ceremony::message(state, &cluster_id, message),
                    },
                    Command::Open(open) => ceremony::open(state, open),
                    Command::Step(step) => ceremony::step(state, &cluster_id, step),
                    Command::Governance(entry) => govern(state, &cluster_id, entry, &mut effects),
                    Command::Collateral(pin) => collateral::apply(state, &self.birth.roots, pin),
                    Command::Sign(ask) => sign::ask(state, &cluster_id, ask, size_before).map(|pos| first = Some(pos)),
                    Command::Signed(signed) => sign::stored(state, &cluster_id, signed, size_before)
                        .map(|replaced| effects.extend(replaced.map(Effect::AppKeyReplaced))),
                    Command::Env(attempt) => env::attempt(state, &cluster_id, attempt, size_before),
                    Command::Adopt(adoption) => adopt::apply(state, &cluster_id, adoption).map_err(|(code, wait_ms)| {
                        retry_after_ms = wait_ms;
                        code
                    }),
                    Command::Checkpoint | Command::Intents(_) | Command::Coordinated(_) => Ok(()),
                };
                let (leaves, mut outcomes, _) = append(state, vec![Draft { kind, outcome, body }]);
                if let [answered] = outcomes.as_mut_slice() {
                    answered.pos = first.unwrap_or(answered.pos);
                    answered.retry_after_ms = retry_after_ms;
                }
                match outcome {
                    Ok(()) => effects.push(Effect::Changed(kind)),
                    Err(code) => effects.push(Effect::Rejected { kind, code }),
                }
                if is_beacon && outcome.is_ok() {
                    let pos = state.size - 1;
                    beacon::settle(state, pos, frontier(state).root());
                    effects.push(Effect::BeaconApplied { pos, log_time: state.log_time });
                }
                (leaves, outcomes)
            }
        };
        let grown = state.size / CHECKPOINT_EVERY_LEAVES > size_before / CHECKPOINT_EVERY_LEAVES;
        self.at_checkpoint = wants_checkpoint || grown;
        let beacon_applied = effects.iter().any(|effect| matches!(effect, Effect::BeaconApplied { .. }));
        // threshold.md §2.6: a node signs the end of each entry that holds a beacon or is a checkpoint position.
        if (beacon_applied || self.at_checkpoint) && state.members.contains_key(&state.members_version) {
            effects.push(Effect::HeadDue(head(state, self.at_checkpoint)));
        }
        Applied { response: answer(state, outcomes), leaves, effects }
    }
}

/// Records a batch. `by`: the word of who signed for its intents of modes L and E; it stands before the first of them that is accepted.
fn record_intents(
    state: &mut State,
    by: Option<CoordinatorWord>,
    batch: Vec<dstack_protocol::release::Intent>,
    effects: &mut Vec<Effect>,
) -> (Vec<Leaf>, Vec<Outcome>) {
    let judged = intents::judge(state, &batch, by.as_ref());
    let is_combined = judged.iter().zip(&batch).any(|(verdict, intent)| {
        intent.mode != dstack_protocol::release::Mode::Client && matches!(verdict.kind, intents::Kind::New(Ok(())))
    });
    let word = by.filter(|_| is_combined).map(|word| Draft { kind: RecordKind::Coordinator, outcome: Ok(()), body: word.encode() });
    let words = usize::from(word.is_some());
    let of_intents = judged.iter().filter_map(|verdict| match verdict.kind {
        intents::Kind::Duplicate(_) => None,
        intents::Kind::New(outcome) => {
            Some(Draft { kind: RecordKind::Intent, outcome: outcome.map_err(|(code, _)| code), body: verdict.body.clone() })
        }
    });
    let drafts = word.into_iter().chain(of_intents).collect();
    let (leaves, fresh, nodes) = append(state, drafts);
    let mut receipts = Vec::new();
    let mut fresh = fresh.into_iter().skip(words);
    let size = state.size;
    let mut outcomes = Vec::with_capacity(judged.len());
    for (verdict, intent) in judged.into_iter().zip(batch) {
        let outcome = match verdict.kind {
            intents::Kind::Duplicate(id) => {
                let pos = state.intents.get(&id).map_or(0, |row| row.pos);
                Outcome { pos, code: 0, retry_after_ms: 0 }
            }
            intents::Kind::New(result) => {
                let Some(mut outcome) = fresh.next() else { continue };
                if let Err((code, retry_after_ms)) = result {
                    outcome.retry_after_ms = retry_after_ms;
                    effects.push(Effect::Rejected { kind: RecordKind::Intent, code });
                } else {
                    intents::insert(state, &intent, outcome.pos);
                    let record = leaves.iter().find(|leaf| leaf.pos == outcome.pos).map(|leaf| Record::decode(&leaf.record));
                    if let Some(Ok(record)) = record
                        && let Ok(receipt) = make_receipt(intent, record, &nodes, size)
                    {
                        receipts.push(receipt);
                    }
                }
                outcome
            }
        };
        outcomes.push(outcome);
    }
    if !receipts.is_empty() {
        effects.push(Effect::IntentsRecorded(receipts));
    }
    (leaves, outcomes)
}

/// Kind and body of a single-leaf command's record (threshold.md §2.6).
fn named(command: &Command) -> (RecordKind, Vec<u8>) {
    use dstack_protocol::ceremony::MessageKind;
    match command {
        Command::Genesis { genesis, .. } => (RecordKind::Genesis, genesis.clone()),
        Command::Beacon(body) => (RecordKind::Beacon, body.encode()),
        Command::Intents(_) | Command::Coordinated(_) => (RecordKind::Intent, Vec::new()),
        Command::Ceremony(message) => {
            let kind = match message.kind {
                MessageKind::Admit | MessageKind::Vouch => RecordKind::Admission,
                MessageKind::EnvPub => RecordKind::Env,
                _ => RecordKind::Ceremony,
            };
            (kind, message.encode())
        }
        Command::Open(open) => (RecordKind::Ceremony, open.encode()),
        Command::Step(step) => (RecordKind::Ceremony, step.encode()),
        Command::Governance(entry) => (RecordKind::Governance, entry.encode()),
        Command::Checkpoint => (RecordKind::Checkpoint, Vec::new()),
        Command::Collateral(pin) => (RecordKind::Collateral, pin.collateral_id().to_vec()),
        Command::Sign(ask) => (RecordKind::Signature, ask.encode()),
        Command::Signed(signed) => (RecordKind::Signature, signed.encode()),
        Command::Env(attempt) => (RecordKind::Env, attempt.encode()),
        Command::Adopt(adoption) => (RecordKind::Adoption, adoption.encode()),
    }
}

fn govern(state: &mut State, cluster_id: &ClusterId, entry: &Entry, effects: &mut Vec<Effect>) -> Result<(), RefusalCode> {
    let clocks = view::clock_keys(state);
    let threshold = usize::from(state.genesis.t);
    let context = quorum::Context { cluster_id, log_time: state.log_time, clocks: &clocks, threshold };
    match quorum::apply(&mut state.governance, entry, context)? {
        quorum::Effect::Pending { action_id, ready: true } => effects.push(Effect::TimelockStarted(action_id)),
        quorum::Effect::Pending { ready: false, .. } => {}
        quorum::Effect::Applied(action) => {
            use dstack_protocol::governance::{ActionKind, Object, policy_hash};
            let policy = || dstack_protocol::policy::AppPolicy::decode(&action.body);
            match (action.kind, &action.object) {
                (ActionKind::SetAppPolicy, Object::App(app_id)) => {
                    let Ok(policy) = policy() else { return Ok(()) };
                    let policy_hash = policy_hash(&action.body);
                    let tokens_milli = dstack_policy::rate::full(policy.rate);
                    state.policies.insert(policy_hash, Blob(action.body));
                    // The operators' word replaces an adoption.
                    state.apps.insert(*app_id, AppRow { policy_hash, tokens_milli, refilled: state.log_time, adopted: None });
                }
                (ActionKind::SetDelegation, Object::Delegation) => {
                    let Ok(policy) = policy() else { return Ok(()) };
                    adopt::delegate(state, policy.rate, &action.body);
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn frontier(state: &State) -> Frontier {
    Frontier::from_parts(state.size, state.peaks.clone())
        .expect("size and peaks of the state come from a frontier, and snapshots are checked")
}

/// Appends leaves; log time and epoch are those after applying.
fn append(state: &mut State, drafts: Vec<Draft>) -> (Vec<Leaf>, Vec<Outcome>, dstack_audit::RecentNodes) {
    let mut tree = frontier(state);
    let records: Vec<(Record, Vec<u8>)> = drafts
        .into_iter()
        .zip(state.size..)
        .map(|(draft, pos)| {
            let outcome = draft.outcome.err().map_or(0, RefusalCode::number);
            let body_hash = body_hash(draft.kind, &draft.body);
            (Record { pos, log_time: state.log_time, epoch: state.epoch, kind: draft.kind, outcome, body_hash }, draft.body)
        })
        .collect();
    let hashes: Vec<[u8; 32]> = records.iter().map(|(record, _)| record.leaf()).collect();
    let nodes = tree.append_batch(&hashes).expect("2^64 leaves are never reached");
    state.size = tree.size();
    state.peaks = tree.peaks().to_vec();
    let outcomes = records.iter().map(|(record, _)| Outcome { pos: record.pos, code: record.outcome, retry_after_ms: 0 }).collect();
    let leaves = records.into_iter().map(|(record, body)| Leaf { pos: record.pos, record: record.encode(), body }).collect();
    (leaves, outcomes, nodes)
}

fn head(state: &State, checkpoint: bool) -> Head {
    Head {
        members_version: state.members_version,
        size: state.size,
        log_root: frontier(state).root(),
        state_root: if checkpoint { state.root() } else { [0; 32] },
    }
}

fn answer(state: &State, outcomes: Vec<Outcome>) -> Vec<u8> {
    CommandAnswer { outcomes, size: state.size, log_root: frontier(state).root() }.encode()
}

/// A command that makes no leaf: there is no log yet, or its bytes are no command.
fn refused(code: RefusalCode) -> Applied<Effect> {
    let outcomes = vec![Outcome { pos: 0, code: code.number(), retry_after_ms: 0 }];
    let response = CommandAnswer { outcomes, size: 0, log_root: dstack_audit::empty_root() }.encode();
    Applied { response, leaves: Vec::new(), effects: Vec::new() }
}

impl Machine for KmsMachine {
    type Effect = Effect;

    fn apply(&mut self, command: &[u8]) -> Applied<Effect> {
        self.at_checkpoint = false;
        match Command::decode(command) {
            Ok(command) => self.run(command),
            // Bytes that are no command name no kind, so they make no leaf; proposers decode before they propose.
            Err(_) => refused(RefusalCode::Malformed),
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        self.state.as_ref().map(State::to_bytes).unwrap_or_default()
    }

    fn restored(&self, bytes: &[u8]) -> Result<Self, String> {
        let state = if bytes.is_empty() { None } else { Some(snapshot::checked(&self.birth, bytes)?) };
        let unconfirmed = state.as_ref().map(|state| head(state, true));
        Ok(Self { birth: Arc::clone(&self.birth), at_checkpoint: state.is_some(), state, unconfirmed })
    }

    fn at_checkpoint(&self) -> bool {
        self.at_checkpoint
    }

    fn size(&self) -> u64 {
        self.state.as_ref().map_or(0, |state| state.size)
    }

    fn seats(&self) -> Option<BTreeSet<Seat>> {
        self.state.as_ref().map(|state| state.genesis.seats.iter().map(|grant| grant.seat).collect())
    }
}
