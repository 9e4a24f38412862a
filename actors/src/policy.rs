//! The actor that judges requests against the applied state.
//!
//! Owns: reading the state at one moment and handing it to the core. Never: a rule. Source: architecture.md §4, §6.

use std::sync::Arc;
use std::time::Instant;

use actix::{Actor, Context, Handler, Message};
use dstack_attest::VerifiedIdentity;
use dstack_policy::Permit;
use dstack_protocol::release::{Ask, Go};
use dstack_protocol::{ClusterId, NodeIndex, Refusal};
use dstack_release::AttributedAsk;
use dstack_release::clearance::{Clearance, HolderView, clear, precheck};

use crate::metrics;
use crate::ports::{Certificates, Log, Now, read};
use crate::standings::{Standings, Subject};

/// Messages that may wait.
pub const CAPACITY: usize = 1024;
/// Name in refusals and metrics.
pub const NAME: &str = "policy";

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

impl Actor for Policy {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(CAPACITY);
    }
}

impl actix::Supervised for Policy {}

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
}

/// Everything but the committed row: asked before anything is recorded, and by a holder that is asked early. The answer proves who asks.
#[derive(Message)]
#[rtype(result = "Result<AttributedAsk, Refusal>")]
pub struct Precheck {
    /// The request.
    pub ask: Arc<Ask>,
    /// Index of the node that brings it, 0 for a client.
    pub from: NodeIndex,
    /// What its evidence proved; none in mode E.
    pub identity: Option<Arc<VerifiedIdentity>>,
    /// The word of this node's own authority, where there is one at hand.
    pub permit: Option<Permit>,
}

impl Handler<Precheck> for Policy {
    type Result = Result<AttributedAsk, Refusal>;

    fn handle(&mut self, message: Precheck, _context: &mut Self::Context) -> Self::Result {
        self.view(message.permit.as_ref(), |view| precheck(message.ask, message.from, message.identity.as_deref(), view))
    }
}

/// The whole judgement of a holder against the committed row.
#[derive(Message)]
#[rtype(result = "Result<Clearance, Refusal>")]
pub struct Clear {
    /// The request; who asks it was checked here.
    pub attributed: AttributedAsk,
    /// Where its intent is.
    pub go: Go,
    /// What its evidence proved; none in mode E.
    pub identity: Option<Arc<VerifiedIdentity>>,
    /// The word of this node's own authority, where there is one at hand.
    pub permit: Option<Permit>,
}

impl Handler<Clear> for Policy {
    type Result = Result<Clearance, Refusal>;

    fn handle(&mut self, message: Clear, _context: &mut Self::Context) -> Self::Result {
        let (permit, identity) = (message.permit.as_ref(), message.identity.as_deref());
        let clearance = self.view(permit, |view| clear(&message.attributed, &message.go, identity, view))?;
        let grant = clearance.grant();
        self.standings.note(Subject::App(grant.app_id()), grant.tcb_standing(), (self.now)());
        Ok(clearance)
    }
}
