//! Mode E under faults: the node named is down, a holder lies, the leader changes; the key comes all the same, and it is the right one.

use std::cell::RefCell;
use std::collections::BTreeMap;

use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use dstack_actors::ports::Peers;
use dstack_protocol::env::combiner;
use dstack_protocol::governance::{ActionKind, Object};
use dstack_protocol::limits::ENV_ATTEMPT_MS_MAX;
use dstack_protocol::release::RelReq;
use dstack_threshold::prf::PrfShare;
use tokio::task::JoinHandle;

use super::*;
use crate::env_attempts;
use crate::support::client::Client;
use crate::support::cluster::{Cluster, copy, direct, renamed};
use crate::support::holders::Node;
use crate::support::peers::{InProcess, Manner};
use crate::support::{run, until};

const GENERATION: Generation = Generation(0);

struct World {
    cluster: Cluster,
    shares: Vec<PrfShare>,
    nodes: Vec<Node>,
    tasks: RefCell<Vec<JoinHandle<()>>>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.borrow().iter().for_each(JoinHandle::abort);
    }
}

impl World {
    fn new() -> Self {
        let (cluster, shares) = Cluster::with_root(3);
        let nodes = (1..).zip(&shares).map(|(seat, share)| Node::start(&cluster, seat, copy(share))).collect();
        Self { cluster, shares, nodes, tasks: RefCell::default() }
    }

    /// An app whose first attempts name these nodes, registered.
    fn app(&self, named: &[u16]) -> AppId {
        let holders: Vec<NodeIndex> = (1..=3).map(NodeIndex).collect();
        let fits = |app_id: &AppId| {
            (1..).zip(named).all(|(attempt, index)| combiner(app_id, GENERATION, attempt, &holders) == Some(NodeIndex(*index)))
        };
        let app_id = (0..=255u8).map(|first| AppId([first; 20])).find(fits).expect("one of 256");
        assert_eq!(self.cluster.govern(ActionKind::SetAppPolicy, Object::App(app_id), Cluster::legacy_policy().encode()), None);
        app_id
    }

    /// That node's combiner at work, over these peers.
    fn works(&self, seat: u16, peers: Arc<dyn Peers>) {
        let node = &self.nodes[usize::from(seat) - 1];
        let node_key = Arc::clone(&self.cluster.keys[usize::from(seat) - 1]);
        let combiner = EnvCombiner { seat: node.seat, node_key, log: node.log.clone(), combine: node.combine(&self.cluster, peers) };
        self.tasks.borrow_mut().push(tokio::spawn(combiner.run()));
    }

    fn honest(&self, asker: u16) -> Arc<dyn Peers> {
        let others = self.nodes.iter().filter(|node| node.seat.0 != asker);
        InProcess::asked_by(asker, others.map(|node| (node.seat.0, Manner::Honest(Arc::clone(&node.holder)))))
    }

    /// Somebody who leads, as far as it knows.
    fn leader(&self) -> JoinHandle<()> {
        tokio::spawn(env_attempts::run(self.cluster.log.node(true)))
    }

    fn row(&self, app_id: AppId) -> Option<EnvRow> {
        self.cluster.log.read(|state| state.env_keys.get(&(GENERATION, app_id)).cloned())
    }

    async fn begun(&self, app_id: AppId, attempt: u8) -> EnvRow {
        until("the attempt", || self.row(app_id).filter(|row| row.attempt == attempt)).await
    }

    async fn published(&self, app_id: AppId) -> [u8; 32] {
        until("the key", || self.cluster.log.read(|state| state.env_key(GENERATION, &app_id).ok())).await
    }

    fn time_passes(&self) {
        assert_eq!(self.cluster.beacon(self.cluster.log_time().plus_ms(ENV_ATTEMPT_MS_MAX + 1)), None);
        self.nodes.iter().for_each(|node| node.now.set(self.cluster.log_time()));
    }

    /// The public half of what the whole secret gives.
    fn expected(&self, app_id: AppId) -> Vec<u8> {
        let wish = Wish::new(KeyClass::Env, Vec::new()).unwrap();
        let (request, _) = Client::new(&self.cluster, "guest").request(&self.cluster, vec![wish]);
        let output = direct(&self.cluster, &self.shares, &RelReq { app_id, ..request })[0];
        // threshold.md §1.4, written out.
        let prk = Salt::new(HKDF_SHA256, b"DKMS-V1-EXTRACT").extract(&output);
        let info: [&[u8]; 4] = [b"DKMS-V1-EXPAND", &[2, 0, 20], &app_id.0, &[0, 0]];
        let mut key = [0; 32];
        prk.expand(&info, HKDF_SHA256).unwrap().fill(&mut key).unwrap();
        x25519_dalek::x25519(key, x25519_dalek::X25519_BASEPOINT_BYTES).to_vec()
    }
}

#[test]
fn another_node_is_named_when_the_first_is_down_and_another_leader_goes_on() {
    run(async {
        let w = World::new();
        let app = w.app(&[2, 3]);
        let first = w.leader();
        assert_eq!(w.begun(app, 1).await.combiner, NodeIndex(2));
        // Node 2 is down, and so is the leader by then; the others look on and publish nothing that they are not named for.
        for seat in [1, 3] {
            let peers = InProcess::asked_by(seat, [(4 - seat, Manner::Honest(Arc::clone(&w.nodes[usize::from(4 - seat) - 1].holder)))]);
            w.works(seat, peers);
        }
        first.abort();
        w.time_passes();
        assert_eq!(w.row(app).map(|row| (row.attempt, row.published)), Some((1, None)));
        // Two that both believe they lead begin one attempt between them.
        let leaders = [w.leader(), w.leader()];
        assert_eq!(w.begun(app, 2).await.combiner, NodeIndex(3));
        assert_eq!(w.published(app).await.to_vec(), w.expected(app));
        let attempts =
            w.cluster.log.read(|state| state.env_keys.iter().map(|((_, id), row)| (*id, row.attempt)).collect::<BTreeMap<_, _>>());
        assert_eq!(attempts[&app], 2);
        leaders.iter().for_each(JoinHandle::abort);
    });
}

#[test]
fn a_lying_holder_does_not_change_the_key_and_a_lying_combiner_is_not_believed_about_another_attempt() {
    run(async {
        let w = World::new();
        let app = w.app(&[1]);
        // Sealed well, proven well, for another share: node 2, the nearest.
        let liar = Node::start(&w.cluster, 2, renamed(&w.shares[2], NodeIndex(2)));
        let manners = [(2, Manner::Honest(Arc::clone(&liar.holder))), (3, Manner::Honest(Arc::clone(&w.nodes[2].holder)))];
        w.works(1, InProcess::measured(manners, &[(2, 1), (3, 5)]));
        let leader = w.leader();
        assert_eq!(w.published(app).await.to_vec(), w.expected(app));

        // An app whose attempt names node 2, which is down: node 1 says a key of its own for it, node 2 one of low order.
        let other = w.app(&[2, 3]);
        w.begun(other, 1).await;
        let say = |index: u16, attempt: u8, envpub: [u8; 32]| {
            let body = EnvPubBody { app_id: other, generation: GENERATION, attempt, envpub }.encode();
            let key = &w.cluster.keys[usize::from(index) - 1];
            let message = key.sign_message(&w.cluster.id, MessageKind::EnvPub, NodeIndex(index), [0; 32], body);
            w.cluster.log.code(&Command::Ceremony(message))
        };
        assert_eq!(say(1, 1, [9; 32]), Some(RefusalCode::EnvNotNamed));
        assert_eq!(say(2, 1, [0; 32]), Some(RefusalCode::Malformed));
        assert_eq!(say(2, 2, [9; 32]), Some(RefusalCode::EnvNotNamed));
        w.time_passes();
        w.begun(other, 2).await;
        assert_eq!(say(2, 1, [9; 32]), Some(RefusalCode::EnvNotNamed), "its minute is over");
        w.works(3, w.honest(3));
        assert_eq!(w.published(other).await.to_vec(), w.expected(other));
        assert_eq!(say(3, 2, [9; 32]), Some(RefusalCode::EnvKeyPinned), "said once");
        leader.abort();
    });
}
