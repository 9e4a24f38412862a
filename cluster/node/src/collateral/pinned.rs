//! Pinned bundles, parsed once.
//!
//! Owns: the bundle in force as this node reads it, and one staged beside it. Never: verifies; the log did, and a staged one was
//! judged by the same rules before it came here.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use dstack_actors::ports::{Log, read};
use dstack_attest::CollateralBundle;
use dstack_protocol::UnixMillis;
use dstack_protocol::state::State;
use dstack_ratls::attest_judge::PinnedCollateral;

/// See the module text. Connected to the log once that runs; before, there is nothing pinned.
#[derive(Default)]
pub(crate) struct Pinned {
    log: OnceLock<Arc<dyn Log>>,
    parsed: Mutex<Option<Arc<CollateralBundle>>>,
    staged: Mutex<Option<Arc<CollateralBundle>>>,
}

/// Dates of a bundle over all its platforms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dates {
    /// When the oldest part was issued.
    pub(crate) oldest_issue: UnixMillis,
    /// When the oldest part was issued that is renewed within weeks; the hard maximum age counts from here.
    pub(crate) renewed_issue: UnixMillis,
    /// The first next update.
    pub(crate) next_update: UnixMillis,
}

impl Pinned {
    /// Connects the log.
    pub(crate) fn connect(&self, log: Arc<dyn Log>) {
        let _second_time_is_the_same = self.log.set(log);
    }

    fn state<T>(&self, show: impl FnOnce(&State) -> T) -> Option<T> {
        read(&**self.log.get()?, show).ok()
    }

    /// Id of the bundle in force.
    pub(crate) fn id(&self) -> Option<[u8; 32]> {
        self.state(|state| state.collateral_id)
    }

    /// The bundle in force.
    pub(crate) fn current(&self) -> Option<Arc<CollateralBundle>> {
        let id = self.id()?;
        if let Some(parsed) = lock(&self.parsed).as_ref().filter(|parsed| *parsed.id() == id) {
            return Some(Arc::clone(parsed));
        }
        let parsed = Arc::new(self.load(&id)?);
        *lock(&self.parsed) = Some(Arc::clone(&parsed));
        Some(parsed)
    }

    fn load(&self, id: &[u8; 32]) -> Option<CollateralBundle> {
        let bytes = self.state(|state| state.collaterals.get(id).map(|blob| blob.0.clone())).flatten()?;
        CollateralBundle::parse(&bytes).ok()
    }

    /// Dates of the bundle in force; `None` where it covers no platform.
    pub(crate) fn dates(&self) -> Option<Dates> {
        dates(&*self.current()?)
    }

    /// Keeps a judged bundle for connections between nodes until the log has one at least as new: after everything has expired,
    /// nodes could not talk to pin it otherwise.
    pub(crate) fn stage(&self, bundle: CollateralBundle) {
        *lock(&self.staged) = Some(Arc::new(bundle));
    }

    /// The staged bundle, unless the log has caught up with it.
    pub(crate) fn staged(&self) -> Option<Arc<CollateralBundle>> {
        let mut staged = lock(&self.staged);
        let bundle = staged.clone()?;
        let current = self.current();
        if current.is_some_and(|current| !is_newer(&bundle, &current)) {
            *staged = None;
            return None;
        }
        Some(bundle)
    }
}

/// Whether a bundle has a part that is newer, or a platform more.
fn is_newer(bundle: &CollateralBundle, than: &CollateralBundle) -> bool {
    let current = than.facts();
    let newer = |(fmspc, facts): (&[u8; 6], _)| current.get(fmspc).is_none_or(|old| old.older_part(facts).is_some());
    bundle.facts().iter().any(|(fmspc, facts)| newer((fmspc, facts)))
}

/// Dates of a bundle; `None` where it covers no platform.
pub(crate) fn dates(bundle: &CollateralBundle) -> Option<Dates> {
    let facts = bundle.facts();
    Some(Dates {
        oldest_issue: facts.values().map(|facts| facts.issued().min(facts.root_crl_issued)).min()?,
        renewed_issue: facts.values().map(dstack_attest::tdx::CollateralFacts::issued).min()?,
        next_update: facts.values().map(|facts| facts.next_update).min()?,
    })
}

impl PinnedCollateral for Pinned {
    fn in_force(&self) -> Option<[u8; 32]> {
        self.id()
    }
    fn bundle(&self, id: &[u8; 32]) -> Option<CollateralBundle> {
        self.load(id)
    }
}

/// What connections between nodes are judged with: a staged bundle before the pinned one.
pub(crate) struct ForNodes(pub(crate) Arc<Pinned>);

impl PinnedCollateral for ForNodes {
    fn in_force(&self) -> Option<[u8; 32]> {
        self.0.staged().map(|staged| *staged.id()).or_else(|| self.0.id())
    }
    fn bundle(&self, id: &[u8; 32]) -> Option<CollateralBundle> {
        let staged = self.0.staged().filter(|staged| staged.id() == id);
        staged.map(|staged| (*staged).clone()).or_else(|| self.0.load(id))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
