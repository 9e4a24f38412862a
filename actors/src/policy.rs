//! Judges requests against the applied state.
//!
//! Owns: reading the state at one moment and handing it to the core. Never: a rule, a state of its own; so it is called, not sent to
//! (ADR 0031). Source: architecture.md §4, §6.

use std::sync::Arc;
use std::time::Instant;

use dstack_attest::VerifiedIdentity;
use dstack_policy::Permit;
use dstack_protocol::release::{Ask, Go};
use dstack_protocol::{ClusterId, NodeIndex, Refusal};
use dstack_release::AttributedAsk;
use dstack_release::clearance::{Clearance, HolderView, clear, precheck};

use crate::metrics;
use crate::ports::{Certificates, Log, Now, read};
use crate::standings::{Standings, Subject};

/// See the module text.
pub struct Policy {
    /// Cluster.
    pub cluster_id: ClusterId,
    /// Applied state.
    pub log: Arc<dyn Log>,
    /// Certificates at hand.
    pub certificates: Arc<dyn Certificates>,
    /// Own clock.
    pub now: Now,
    /// Where the TCB of an app is noted that is accepted and not up to date.
    pub standings: Arc<Standings>,
}

impl Policy {
    fn view<T>(&self, permit: Option<&Permit>, judge: impl FnOnce(HolderView<'_>) -> Result<T, Refusal>) -> Result<T, Refusal> {
        let began = Instant::now();
        let now = (self.now)();
        let certified = |pos| self.certificates.certifies_beacon(pos);
        let verdict =
            read(&*self.log, |state| judge(HolderView { cluster_id: &self.cluster_id, state, now, beacon_certified: &certified, permit }))?;
        metrics::stage("decide", began.elapsed());
        verdict
    }

    /// Everything but the committed row: asked before anything is recorded, and by a holder that is asked early. The answer proves who
    /// asks. `from`: index of the node that brings it, 0 for a client; `identity`: what its evidence proved, none in mode E; `permit`: the
    /// word of this node's own authority, where there is one at hand.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn precheck(
        &self,
        ask: Arc<Ask>,
        from: NodeIndex,
        identity: Option<&VerifiedIdentity>,
        permit: Option<&Permit>,
    ) -> Result<AttributedAsk, Refusal> {
        self.view(permit, |view| precheck(ask, from, identity, view))
    }

    /// The whole judgement of a holder against the committed row. `identity` and `permit` as in [`Self::precheck`].
    ///
    /// # Errors
    /// The first rule broken.
    pub fn clear(
        &self,
        attributed: &AttributedAsk,
        go: &Go,
        identity: Option<&VerifiedIdentity>,
        permit: Option<&Permit>,
    ) -> Result<Clearance, Refusal> {
        let clearance = self.view(permit, |view| clear(attributed, go, identity, view))?;
        let grant = clearance.grant();
        self.standings.note(Subject::App(grant.app_id()), grant.tcb_standing(), (self.now)());
        Ok(clearance)
    }
}
