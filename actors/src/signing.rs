//! Signatures of the roots `ca` and `id`, by `t` holders.
//!
//! Owns: the way from a typed object to its signature in the log: ask, runs, proof, row; the cluster's root certificate right after its
//! root is in force. Never: bytes to be signed from outside; every signer rebuilds them from its own applied state.
//! Source: threshold.md §5, ADR 0018.
//!
//! ```text
//! sign(object) ─▶ row in the log? ──yes──▶ done
//!                   │ no: propose Sign, unless somebody has asked already
//!                   ▼
//!        t holders, the nearest first ── FROST: commit, share │ ECDSA: three rounds between the signers
//!                   │ one late or wrong: another attempt with others, under another name
//!                   ▼
//!        signature, verified ─▶ propose Signed ─▶ row
//! ```

pub mod claim;
mod coordinate;
pub mod pairwise;
mod redo;
mod send;
pub mod signer;
mod subject;
pub mod wire;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use dstack_protocol::command::Command;
use dstack_protocol::rpc::{
    PATH_PEER_SIGN_COMMIT, PATH_PEER_SIGN_PAIR, PATH_PEER_SIGN_PAIR_DONE, PATH_PEER_SIGN_ROUND, PATH_PEER_SIGN_RUN, PATH_PEER_SIGN_SETUP,
    PATH_PEER_SIGN_SHARE,
};
use dstack_protocol::sign::{Basis, SignAsk, SignKey, SignObject, Signed};
use dstack_protocol::state::{AskRow, SignedRow, State};
use dstack_protocol::{Generation, NodeIndex, Refusal, RefusalCode, RootTag, Wire};
use dstack_raft::machine::view;
use dstack_threshold::share::has_pairwise_setup;
use tokio::sync::Mutex as AsyncMutex;
use tracing::{info, warn};

use self::pairwise::Setups;
use self::redo::Redo;
use self::signer::{Parts, Signer, applied};
use self::subject::Subject;
use self::wire::{RoundMessage, RunAsk, ShareAsk};
use crate::metrics;
use crate::ports::read;

const PATIENCE: Duration = Duration::from_secs(8);
/// Between two looks at whether the root's certificate is there.
const KEEP_EVERY: Duration = Duration::from_secs(1);

/// See the module text. Cheap to clone.
#[derive(Clone)]
pub struct Signing {
    signer: Arc<Signer>,
    setups: Arc<Setups>,
    redo: Arc<Redo>,
    /// Counts this node's attempts; with its index in front no two coordinators name the same run.
    attempts: Arc<AtomicU16>,
    /// One signature of an object at a time.
    under_way: Arc<Mutex<HashMap<SignKey, Weak<AsyncMutex<()>>>>>,
}

impl Signing {
    /// A signing service over `parts`. `setups`: those that the ceremony actor begins.
    #[must_use]
    pub fn new(parts: Parts, setups: Arc<Setups>) -> Self {
        // Not from 0: a restarted node does not name the runs of its last process again while others remember them.
        let start = u16::try_from((parts.now)().0 / 100 % u64::from(u16::MAX)).unwrap_or(0);
        let attempts = Arc::new(AtomicU16::new(start));
        let redo = Redo::new(parts.clone(), Arc::clone(&setups));
        Self { signer: Signer::new(parts), setups, redo, attempts, under_way: Arc::default() }
    }

    /// The signature of `object` as the log has it; made now if it has none.
    ///
    /// # Errors
    /// What `apply` said of the ask; [`RefusalCode::NotEnoughPartials`] and others that may be tried again when fewer than `t` holders
    /// could be brought to sign.
    pub async fn sign(&self, object: SignObject) -> Result<SignedRow, Refusal> {
        self.sign_on(object, Basis::State, &[]).await
    }

    /// As [`Signing::sign`], where the ask rests on something. `claim`: the encoded claim that [`Basis::Claim`] names.
    ///
    /// # Errors
    /// As [`Signing::sign`].
    pub async fn sign_on(&self, object: SignObject, basis: Basis, claim: &[u8]) -> Result<SignedRow, Refusal> {
        let began = Instant::now();
        let root = object.root();
        let one = self.one_at_a_time(object.key());
        let _turn = one.lock().await;
        let outcome = self.signed(&object, basis, claim).await;
        if let Err(refusal) = &outcome {
            warn!(root = root.name(), code = %refusal.code, expected = refusal.expected, got = refusal.got, "no signature");
        }
        metrics::signature(root, metrics::outcome(&outcome), began.elapsed());
        outcome
    }

    async fn signed(&self, object: &SignObject, basis: Basis, claim: &[u8]) -> Result<SignedRow, Refusal> {
        let parts = self.signer.parts();
        let (stored, asked) = read(&*parts.log, |state| (state.signed(object).cloned(), waiting(state, object, basis)))?;
        if let Some(row) = stored {
            return Ok(row);
        }
        let pos = match asked {
            Some(pos) => pos,
            None => self.ask(object, basis).await?,
        };
        applied(&*parts.log, pos).await?;
        let key = object.key();
        let (subject, stored) =
            read(&*parts.log, |state| (Subject::of(state, &parts.cluster_id, &key, pos), state.signed(object).cloned()))?;
        if let Some(row) = stored {
            return Ok(row);
        }
        let bytes = self.sign_now(&subject?, claim).await?;
        self.store(object, Signed { ask_pos: pos, key, bytes }).await
    }

    /// Proposes the ask; its leaf.
    async fn ask(&self, object: &SignObject, basis: Basis) -> Result<u64, Refusal> {
        let parts = self.signer.parts();
        let author = self.signer.index()?;
        let beacon = read(&*parts.log, |state| view::latest_beacon(state).map(|(pos, _)| pos))?;
        let beacon_pos = beacon.ok_or_else(|| Refusal::new(RefusalCode::NotReady, "a beacon", "none yet").retry_after(500))?;
        let mut ask = SignAsk { author, beacon_pos, object: object.clone(), basis, sig: [0; 64] };
        ask.sig = parts.node_key.sign(&ask.signed_bytes(&parts.cluster_id));
        let answer = parts.log.propose(Command::Sign(ask), PATIENCE).await?;
        let outcome = answer.outcomes.first().ok_or_else(|| Refusal::new(RefusalCode::Internal, "an outcome", "none"))?;
        match RefusalCode::from_number(outcome.code) {
            None => Ok(outcome.pos),
            Some(code) => Err(Refusal::new(code, "an ask that the log accepts", "rejected").retry_after(outcome.retry_after_ms)),
        }
    }

    /// Proposes the signature; the row as applied here.
    async fn store(&self, object: &SignObject, signed: Signed) -> Result<SignedRow, Refusal> {
        let parts = self.signer.parts();
        let answer = parts.log.propose(Command::Signed(signed), PATIENCE).await?;
        let outcome = answer.outcomes.first().ok_or_else(|| Refusal::new(RefusalCode::Internal, "an outcome", "none"))?;
        let refused = RefusalCode::from_number(outcome.code);
        // Of two coordinators one is the first; the other finds its row.
        if let Some(code) = refused.filter(|code| !matches!(code, RefusalCode::SignUnknown | RefusalCode::Duplicate)) {
            return Err(Refusal::new(code, "a signature that the log accepts", "rejected"));
        }
        applied(&*parts.log, outcome.pos).await?;
        let row = read(&*parts.log, |state| state.signed(object).cloned())?;
        row.ok_or_else(|| {
            Refusal::new(refused.unwrap_or(RefusalCode::Internal), "the signature in the log", "another took its place").retry_after(200)
        })
    }

    /// Answers another node, whose index its connection is attested to.
    ///
    /// # Errors
    /// The first rule broken.
    pub async fn answer(&self, from: NodeIndex, path: &str, body: &[u8]) -> Result<Vec<u8>, Refusal> {
        match path {
            PATH_PEER_SIGN_SETUP => self.setups.receive(from, body).await,
            PATH_PEER_SIGN_PAIR => self.redo.answer(from, body),
            PATH_PEER_SIGN_PAIR_DONE => self.redo.is_done(from, body),
            PATH_PEER_SIGN_COMMIT => self.signer.commit(from, RunAsk::decode(body)?).await,
            PATH_PEER_SIGN_SHARE => self.signer.share(from, ShareAsk::decode(body)?).await,
            PATH_PEER_SIGN_RUN => self.signer.run(from, RunAsk::decode(body)?).await,
            PATH_PEER_SIGN_ROUND => self.signer.round(from, RoundMessage::decode(body)?).await,
            other => Err(Refusal::new(RefusalCode::UnknownMethod, "a path of signing", other)),
        }
    }

    /// Whom this node makes no more runs of `root` with, since they cheated.
    #[must_use]
    pub fn expelled(&self, root: RootTag) -> Vec<NodeIndex> {
        self.signer.parts().shares.expelled(root)
    }

    /// Holders with whom this node has no secrets for runs of `root`, since they were lost; they are being made anew.
    #[must_use]
    pub fn pairs_missing(&self, root: RootTag) -> Vec<NodeIndex> {
        self.signer.parts().shares.pairs_missing(root).unwrap_or_default()
    }

    /// Whether this node can take part in runs of `root`: it holds a share and, where the root has pairs, the secrets with as many
    /// others as a run needs.
    #[must_use]
    pub fn can_sign(&self, root: RootTag) -> bool {
        let parts = self.signer.parts();
        let seen = read(&*parts.log, |state| (state.genesis.ca_algorithm, state.roots.get(&(Generation(0), root)).map(|row| row.t)));
        let Ok((ca, Some(t))) = seen else { return false };
        let pairs = !has_pairwise_setup(root, ca) || parts.shares.pairs_count(root) + 1 >= usize::from(t);
        root != RootTag::Prf && parts.shares.in_use_of(root).is_some() && pairs
    }

    /// Makes anew the secrets of pairs that were lost, and seals what changed, for the life of the node.
    pub async fn keep_pairs(self) {
        self.redo.keep().await;
    }

    /// Runs under way at this node.
    #[must_use]
    pub fn running(&self) -> usize {
        self.signer.running()
    }

    /// Asks for the root's certificate once its root is in force, while this node leads.
    pub async fn keep_root_certificate(self) {
        let mut applied = self.signer.parts().log.applied();
        loop {
            let object = SignObject::RootCa { generation: Generation(0) };
            if self.signer.parts().log.leads() && self.lacks(&object) {
                match self.sign(object).await {
                    Ok(row) => info!(pos = row.pos, "the cluster's root certificate is signed"),
                    Err(_) => tokio::time::sleep(KEEP_EVERY).await,
                }
            }
            let changed = tokio::time::timeout(KEEP_EVERY, applied.changed()).await;
            if matches!(changed, Ok(Err(_))) {
                return;
            }
            // The log changes many times a second while the cluster works.
            tokio::time::sleep(KEEP_EVERY / 4).await;
        }
    }

    fn lacks(&self, object: &SignObject) -> bool {
        let (generation, own) = (object.generation(), self.signer.index().is_ok());
        let lacks =
            read(&*self.signer.parts().log, |state| state.roots.contains_key(&(generation, RootTag::Ca)) && state.signed(object).is_none());
        own && lacks.unwrap_or(false)
    }

    fn next_attempt(&self) -> Result<u32, Refusal> {
        let index = self.signer.index()?;
        let count = self.attempts.fetch_add(1, Ordering::Relaxed);
        Ok(u32::from(index.0) << 16 | u32::from(count))
    }

    fn one_at_a_time(&self, key: SignKey) -> Arc<AsyncMutex<()>> {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        under_way.retain(|_, one| one.strong_count() > 0);
        if let Some(one) = under_way.get(&key).and_then(Weak::upgrade) {
            return one;
        }
        let one = Arc::new(AsyncMutex::new(()));
        under_way.insert(key, Arc::downgrade(&one));
        one
    }
}

/// The leaf of an ask that serves as well as an own one. Each claim is an ask of its own: signers judge its evidence.
fn waiting(state: &State, object: &SignObject, basis: Basis) -> Option<u64> {
    let claim = |basis: &Basis| matches!(basis, Basis::Claim { .. });
    let serves = |ask: &&AskRow| ask.object == *object && (ask.basis == basis || !claim(&ask.basis) && !claim(&basis));
    state.signatures.get(&object.key())?.open.values().find(serves).map(|ask| ask.pos)
}
