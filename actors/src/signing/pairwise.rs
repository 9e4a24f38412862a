//! Pairwise setups of the ECDSA roots: of all holders in the background of a key generation, before this node's Ready; of two holders
//! whose secrets were lost (`redo`).
//!
//! Owns: setups in progress and those done, until their root is in force; who must get which message. Never: uses what comes out (the
//! share holder does), decides whether the key generation goes on. A message is taken from the node that its connection is attested
//! to, and from nobody in its name. Source: threshold.md §5.1, ADR 0018.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::rpc::PATH_PEER_SIGN_SETUP;
use dstack_protocol::{NodeIndex, Refusal, RefusalCode, RootTag, Seat};
use dstack_secret::SecretBytes;
use dstack_threshold::group::{NistP256, Secp256k1};
use dstack_threshold::sign::dkls::{Pairwise, Setup};
use dstack_threshold::sign::ecdsa::{EcdsaError, EcdsaGroup, Outgoing, Rounds as _};
use tokio::runtime::Handle;
use tracing::{error, info, warn};

use super::send::{Letter, deliver};
use crate::guarded::guarded;
use crate::metrics;
use crate::ports::Peers;
use crate::share_holder::Pairs;

/// Setups kept at once: those of one attempt, of the one before it, and those of pairs made anew.
const SETUPS_MAX: usize = 4 + super::redo::AT_ONCE_MAX;
/// A setup's messages are sent again until this is over: longer than the rounds of a key generation take.
const SEND_FOR: Duration = Duration::from_secs(240);

/// Members of a setup and where they are.
pub type Members = BTreeMap<NodeIndex, Seat>;

/// See the module text.
pub struct Setups {
    peers: Arc<dyn Peers>,
    runtime: Handle,
    by_inst: Mutex<Vec<([u8; 32], Arc<Entry>)>>,
}

struct Entry {
    root: RootTag,
    index: NodeIndex,
    members: Members,
    machine: Mutex<Machine>,
}

enum Machine {
    Beginning,
    Ca(Setup<NistP256>),
    Id(Setup<Secp256k1>),
    Done(Pairs),
    Failed,
}

/// What a message led to.
struct Step {
    send: Vec<Outgoing>,
    done: bool,
}

impl Setups {
    /// None in progress.
    #[must_use]
    pub fn new(peers: Arc<dyn Peers>, runtime: Handle) -> Arc<Self> {
        Arc::new(Self { peers, runtime, by_inst: Mutex::default() })
    }

    /// Begins the setup of a run, once. `inst`: the run's name.
    pub fn begin(self: &Arc<Self>, root: RootTag, ca: CaAlgorithm, inst: [u8; 32], index: NodeIndex, members: Members) {
        let entry = {
            let mut by_inst = lock(&self.by_inst);
            if by_inst.iter().any(|(known, _)| *known == inst) {
                return;
            }
            let entry = Arc::new(Entry { root, index, members, machine: Mutex::new(Machine::Beginning) });
            by_inst.push((inst, Arc::clone(&entry)));
            if by_inst.len() > SETUPS_MAX {
                by_inst.remove(0);
            }
            entry
        };
        let this = Arc::clone(self);
        self.runtime.spawn_blocking(move || {
            let members: Vec<NodeIndex> = entry.members.keys().copied().collect();
            let begun = match (root, ca) {
                (RootTag::Id, _) => Setup::begin(inst, index, &members).map(|(setup, send)| (Machine::Id(setup), send)),
                (RootTag::Ca, CaAlgorithm::P256) => Setup::begin(inst, index, &members).map(|(setup, send)| (Machine::Ca(setup), send)),
                (RootTag::Prf | RootTag::Ca, _) => return,
            };
            match begun {
                Ok((machine, send)) => {
                    *lock(&entry.machine) = machine;
                    this.post(&inst, &entry, send);
                }
                Err(error) => entry.fail(&error),
            }
        });
    }

    /// Takes a message of the setup `inst` that came over the connection of node `from`.
    ///
    /// # Errors
    /// [`RefusalCode::NotReady`] before this node has begun: to be sent again. [`RefusalCode::Malformed`] for what the engine refuses.
    pub async fn receive(self: &Arc<Self>, from: NodeIndex, body: &[u8]) -> Result<Vec<u8>, Refusal> {
        let malformed = |what: &str| Refusal::new(RefusalCode::Malformed, "inst(32) and a message of a setup", what);
        let (inst, message) = body.split_first_chunk::<32>().ok_or_else(|| malformed("fewer than 32 bytes"))?;
        let (inst, message) = (*inst, message.to_vec());
        let not_yet = || Refusal::new(RefusalCode::NotReady, "a setup of this name in progress", "none here").retry_after(200);
        let entry = self.entry(&inst).ok_or_else(not_yet)?;
        let this = Arc::clone(self);
        guarded(move || {
            let step = entry.receive(from, &message)?;
            if step.done {
                info!(root = entry.root.name(), "pairwise setup complete");
            }
            this.post(&inst, &entry, step.send);
            Ok(Vec::new())
        })
        .await?
    }

    /// The digest of a setup that is done: `setup` of Ready.
    #[must_use]
    pub fn digest(&self, inst: &[u8; 32]) -> Option<[u8; 32]> {
        self.entry(inst)?.with_pairs(Pairs::digest)
    }

    /// The secrets of a setup that is done, to be sealed.
    #[must_use]
    pub fn secret(&self, inst: &[u8; 32]) -> Option<SecretBytes> {
        self.entry(inst)?.with_pairs(|pairs| pairs.to_secret().ok())?
    }

    /// Whether a setup is done; `None` where it has failed, or there is none of that name.
    pub(super) fn is_done(&self, inst: &[u8; 32]) -> Option<bool> {
        let entry = self.entry(inst)?;
        let machine = lock(&entry.machine);
        match &*machine {
            Machine::Done(_) => Some(true),
            Machine::Beginning | Machine::Ca(_) | Machine::Id(_) => Some(false),
            Machine::Failed => None,
        }
    }

    /// Drops a setup that nobody waits for any more.
    pub(super) fn forget(&self, inst: &[u8; 32]) {
        lock(&self.by_inst).retain(|(known, _)| known != inst);
    }

    /// Hands over what a setup gave.
    #[must_use]
    pub fn take(&self, inst: &[u8; 32]) -> Option<Pairs> {
        let entry = self.entry(inst)?;
        let mut machine = lock(&entry.machine);
        match std::mem::replace(&mut *machine, Machine::Failed) {
            Machine::Done(pairs) => {
                lock(&self.by_inst).retain(|(known, _)| known != inst);
                Some(pairs)
            }
            other => {
                *machine = other;
                None
            }
        }
    }

    fn entry(&self, inst: &[u8; 32]) -> Option<Arc<Entry>> {
        lock(&self.by_inst).iter().find(|(known, _)| known == inst).map(|(_, entry)| Arc::clone(entry))
    }

    fn post(&self, inst: &[u8; 32], entry: &Entry, send: Vec<Outgoing>) {
        for Outgoing { to, bytes } in send {
            let Some(seat) = entry.members.get(&to) else { continue };
            let body = bytes.expose(|bytes| [inst.as_slice(), bytes].concat());
            let letter = Letter { seat: *seat, path: PATH_PEER_SIGN_SETUP, body: SecretBytes::take(body) };
            self.runtime.spawn(deliver(Arc::clone(&self.peers), letter, SEND_FOR));
        }
    }
}

impl Entry {
    fn receive(&self, from: NodeIndex, message: &[u8]) -> Result<Step, Refusal> {
        let mut machine = lock(&self.machine);
        let outcome = match &mut *machine {
            Machine::Beginning => {
                return Err(Refusal::new(RefusalCode::NotReady, "a setup in progress", "it only begins").retry_after(200));
            }
            // Sent again because the first answer was lost.
            Machine::Done(_) => return Ok(Step { send: Vec::new(), done: false }),
            Machine::Failed => return Err(Refusal::new(RefusalCode::SignRun, "a setup in progress", "it has failed")),
            Machine::Ca(setup) => step(setup, from, message).map(|(send, done)| (send, done.map(Pairs::Ca))),
            Machine::Id(setup) => step(setup, from, message).map(|(send, done)| (send, done.map(Pairs::Id))),
        };
        match outcome {
            Ok((send, done)) => {
                let step = Step { send, done: done.is_some() };
                if let Some(pairs) = done {
                    *machine = Machine::Done(pairs);
                }
                Ok(step)
            }
            Err(EcdsaError::Duplicate { .. }) => Ok(Step { send: Vec::new(), done: false }),
            Err(error) => {
                let ends = error.ends_run();
                if ends {
                    *machine = Machine::Failed;
                }
                drop(machine);
                self.report(&error, ends);
                Err(Refusal::new(RefusalCode::Malformed, "a message of this setup", error.to_string()))
            }
        }
    }

    fn fail(&self, error: &EcdsaError) {
        *lock(&self.machine) = Machine::Failed;
        self.report(error, true);
    }

    fn report(&self, error: &EcdsaError, ended: bool) {
        let culprit = error.culprit().map(|index| index.0);
        if culprit.is_some() {
            metrics::misbehaved(self.root);
        }
        if ended {
            // No Ready from this node: the attempt ends by its timeout, and the next one begins anew.
            error!(root = self.root.name(), node = self.index.0, ?culprit, %error, "pairwise setup failed");
        } else {
            warn!(root = self.root.name(), node = self.index.0, ?culprit, %error, "message of a pairwise setup dropped");
        }
    }

    fn with_pairs<T>(&self, use_it: impl FnOnce(&Pairs) -> T) -> Option<T> {
        match &*lock(&self.machine) {
            Machine::Done(pairs) => Some(use_it(pairs)),
            Machine::Beginning | Machine::Ca(_) | Machine::Id(_) | Machine::Failed => None,
        }
    }
}

type Stepped<G> = (Vec<Outgoing>, Option<Pairwise<G>>);

fn step<G: EcdsaGroup>(setup: &mut Setup<G>, from: NodeIndex, message: &[u8]) -> Result<Stepped<G>, EcdsaError> {
    setup.receive(from, message).map(|progress| (progress.send, progress.done))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
