//! The actors of one node that answer clients, over the log of a test.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use dstack_actors::adoption::Adoption;
use dstack_actors::authority::{OsImages, OwnAuthority};
use dstack_actors::combine::Combine;
use dstack_actors::holder::Holder;
use dstack_actors::mailbox::Gate;
use dstack_actors::policy::Policy;
use dstack_actors::ports::{Certificates, Judge, Log, Peers};
use dstack_actors::recorder::{Author, Recorder};
use dstack_actors::release::Coordinator;
use dstack_actors::share_holder::ShareHolderPool;
use dstack_actors::standings::Standings;
use dstack_actors::verifier::VerifierPool;
use dstack_authority::Authority;
use dstack_protocol::Seat;
use dstack_threshold::prf::PrfShare;

use super::TestNow;
use super::cluster::Cluster;
use super::log::{NodeLog, SharedLog};

/// Certificates at hand: of every beacon, but those taken away.
#[derive(Default)]
pub struct Certs {
    missing: Mutex<BTreeSet<u64>>,
}

impl Certs {
    pub fn take(&self, pos: u64) {
        self.missing.lock().unwrap().insert(pos);
    }
    pub fn give(&self, pos: u64) {
        self.missing.lock().unwrap().remove(&pos);
    }
}

impl Certificates for Certs {
    fn certifies_beacon(&self, pos: u64) -> bool {
        !self.missing.lock().unwrap().contains(&pos)
    }
}

/// One node.
pub struct Node {
    pub seat: Seat,
    pub adoption: Arc<Adoption>,
    pub log: Arc<NodeLog>,
    pub holder: Arc<Holder>,
    pub policy: Arc<Policy>,
    pub recorder: Recorder,
    pub verifier: VerifierPool,
    pub shares: ShareHolderPool,
    pub certs: Arc<Certs>,
    pub now: TestNow,
    pub standings: Arc<Standings>,
}

impl Node {
    /// A node with a share, at log time.
    pub fn start(cluster: &Cluster, seat: u16, share: PrfShare) -> Self {
        let shares = ShareHolderPool::start(1, 64, cluster.id);
        shares.install(share);
        Self::with(cluster, seat, shares, cluster.judge(), 64)
    }

    /// A node around a pool of shares.
    pub fn with(cluster: &Cluster, seat: u16, shares: ShareHolderPool, judge: Judge, verifiers: usize) -> Self {
        Self::asking(cluster, seat, shares, judge, verifiers, None)
    }

    /// A node with an authority of its own, and what its operator knows of OS images.
    pub fn asking(
        cluster: &Cluster,
        seat: u16,
        shares: ShareHolderPool,
        judge: Judge,
        verifiers: usize,
        authority: Option<(Authority, OsImages)>,
    ) -> Self {
        let log = cluster.log.node(seat == 1);
        let port: Arc<dyn Log> = log.clone();
        let now = TestNow::at(cluster.log_time());
        let certs = Arc::new(Certs::default());
        let verifier = VerifierPool::start(1, verifiers, judge, now.port());
        let certificates: Arc<dyn Certificates> = certs.clone();
        let standings = Arc::<Standings>::default();
        let noted = Arc::clone(&standings);
        let authority = authority.map(|(authority, images)| OwnAuthority::new(authority, images, now.port()));
        let policy = Policy { cluster_id: cluster.id, log: Arc::clone(&port), certificates, now: now.port(), standings: noted };
        let policy = Arc::new(policy);
        let holder = Holder::new(Arc::clone(&port), now.port(), verifier.clone(), Arc::clone(&policy), shares.clone()).asking(authority);
        let holder = Arc::new(holder);
        let recorder = recorder(&cluster.log, port, cluster.author(seat));
        let adoption = Adoption {
            cluster_id: cluster.id,
            seat: Seat(seat),
            node_key: Arc::clone(&cluster.keys[usize::from(seat) - 1]),
            log: log.clone(),
        };
        let adoption = Arc::new(adoption);
        Self { seat: Seat(seat), adoption, log, holder, policy, recorder, verifier, shares, certs, now, standings }
    }

    /// This node as its own client, over its coordinator.
    pub fn combine(&self, cluster: &Cluster, peers: Arc<dyn Peers>) -> Combine {
        let certificates: Arc<dyn Certificates> = self.certs.clone();
        Combine::new(cluster.id, self.coordinator(peers, 8), certificates)
    }

    /// Coordinates releases at this node.
    pub fn coordinator(&self, peers: Arc<dyn Peers>, releases: usize) -> Coordinator {
        Coordinator {
            seat: self.seat,
            log: self.log.clone(),
            peers,
            holder: Arc::clone(&self.holder),
            recorder: self.recorder.clone(),
            now: self.now.port(),
            gate: Gate::new("release", releases),
            pace: Arc::default(),
            adoption: Arc::clone(&self.adoption),
        }
    }
}

/// A recorder that waits on the log's board and rebuilds from its leaves.
pub fn recorder(shared: &Arc<SharedLog>, port: Arc<dyn Log>, author: Author) -> Recorder {
    let leaves = Arc::clone(shared);
    Recorder::new(author, port, Arc::clone(&shared.board), Arc::new(move |intent| leaves.rebuild(intent)))
}
