//! Pools under more than they hold: refused at once with a hint, served again when there is room.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use dstack_actors::mailbox::FULL_RETRY_MS;
use dstack_actors::ports::Judge;
use dstack_actors::share_holder::ShareHolderPool;
use dstack_actors::verifier::VerifierPool;
use dstack_protocol::command::Command;
use dstack_protocol::genesis::collateral_id;
use dstack_protocol::release::Go;
use dstack_protocol::{Epoch, Generation, NodeIndex, Refusal, RefusalCode, Wire as _};
use dstack_release::AttributedAsk;
use dstack_release::clearance::{Clearance, HolderView, clear};
use dstack_threshold::share::ShareId;
use support::client::{Client, open};
use support::cluster::{Cluster, copy};
use support::{run, until};

/// A door in front of a judge.
#[derive(Default)]
struct Door {
    open: Mutex<bool>,
    moved: Condvar,
    waiting: AtomicUsize,
}

impl Door {
    fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.moved.wait(open).unwrap();
        }
    }
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.moved.notify_all();
    }
}

fn overloaded<T>(answer: Result<T, Refusal>) {
    let refusal = answer.err().expect("a full pool refuses");
    assert_eq!((refusal.code, refusal.retry_after_ms), (RefusalCode::Overloaded, FULL_RETRY_MS));
}

#[test]
fn a_full_verifier_refuses_early_and_recovers() {
    run(async {
        let cluster = Cluster::new(3, 0);
        let client = Client::new(&cluster, "guest");
        let door = Arc::new(Door::default());
        let (judge, before) = (cluster.judge(), Arc::clone(&door));
        let behind_a_door: Judge = Arc::new(move |evidence, collateral_id, now| {
            before.pass();
            judge(evidence, collateral_id, now)
        });
        let now = support::TestNow::at(cluster.born);
        let pool = VerifierPool::start(1, 2, behind_a_door, now.port());
        let evidence: Arc<[u8]> = Arc::from(client.evidence.as_slice());
        let id = collateral_id(cluster.roots.bundle());
        let running: Vec<_> = (0..2)
            .map(|_| {
                let (pool, evidence) = (pool.clone(), Arc::clone(&evidence));
                actix::spawn(async move { pool.verify(evidence, id).await })
            })
            .collect();
        until("both to enter", || (pool.free() == 0).then_some(())).await;
        overloaded(pool.verify(Arc::clone(&evidence), id).await);
        overloaded(pool.verify(Arc::clone(&evidence), id).await);
        door.open();
        for task in running {
            assert_eq!(task.await.unwrap().unwrap().app_id(), Some(support::cluster::APP));
        }
        assert_eq!(pool.free(), 2);
        pool.verify(Arc::clone(&evidence), id).await.unwrap();
        assert_eq!(door.waiting.load(Ordering::SeqCst), 3, "refused evidence was never judged");
        let mut forged = client.evidence.clone();
        let middle = forged.len() / 2;
        forged[middle] ^= 1;
        assert_eq!(pool.verify(Arc::from(forged), id).await.unwrap_err().code, RefusalCode::EvidenceInvalid);
        assert_eq!(pool.verify(Arc::from(&b""[..]), id).await.unwrap_err().code, RefusalCode::EvidenceInvalid);
    });
}

fn cleared(cluster: &Cluster, client: &Client) -> (Clearance, dstack_protocol::release::RelReq, dstack_threshold::answer::RecipientKey) {
    let (request, recipient) = client.request(cluster, client.wishes());
    let intent = request.intent(NodeIndex(0));
    let pos = cluster.log.apply(&Command::Intents(vec![intent.clone()])).outcomes[0].pos;
    let identity = cluster.judge()(&client.evidence, &collateral_id(cluster.roots.bundle()), cluster.born).unwrap();
    let certified = |_| true;
    let clearance = cluster.log.read(|state| {
        let view = HolderView { cluster_id: &cluster.id, state, now: cluster.born, beacon_certified: &certified, permit: None };
        let signed = AttributedAsk::check(Arc::new(client.ask(&request)), NodeIndex(0)).unwrap();
        clear(&signed, &Go { intent_id: intent.id(), pos }, Some(&identity), view).unwrap()
    });
    (clearance, request, recipient)
}

#[test]
fn a_full_share_holder_refuses_early_and_recovers() {
    run(async {
        let (cluster, shares) = Cluster::with_root(3);
        let client = Client::new(&cluster, "guest");
        let pool = ShareHolderPool::start(1, 1, cluster.id);
        let (first, request, recipient) = cleared(&cluster, &client);
        let (second, ..) = cleared(&cluster, &client);
        let (third, ..) = cleared(&cluster, &client);

        let refusal = pool.evaluate(third).await.unwrap_err();
        assert_eq!(refusal.code, RefusalCode::NotReady, "no share yet");
        assert!(refusal.retry_after_ms > 0);
        assert_eq!(pool.in_use(), None);

        pool.install(copy(&shares[0]));
        assert_eq!(pool.in_use(), Some(ShareId { index: NodeIndex(1), generation: Generation(0), epoch: Epoch(1) }));
        // Both are polled before either can end; the pool has one place.
        let (served, refused) = futures::join!(pool.evaluate(first), pool.evaluate(second));
        overloaded(refused);
        let plain = open(&request, &recipient, &served.unwrap()).expect("sealed to the client");
        assert_eq!((plain.index, plain.vk), (NodeIndex(1), shares[0].vk()));
        let (again, ..) = cleared(&cluster, &client);
        assert_eq!(pool.evaluate(again).await.unwrap().index, NodeIndex(1));
    });
}

#[test]
fn a_partial_opens_for_the_client_alone_and_for_its_request_alone() {
    run(async {
        let (cluster, shares) = Cluster::with_root(3);
        let client = Client::new(&cluster, "guest");
        let pool = ShareHolderPool::start(2, 8, cluster.id);
        pool.install(copy(&shares[1]));
        let (clearance, request, recipient) = cleared(&cluster, &client);
        let (_, other_request, other_recipient) = cleared(&cluster, &client);
        let out = pool.evaluate(clearance).await.unwrap();
        assert!(open(&request, &recipient, &out).is_some());
        assert!(open(&request, &other_recipient, &out).is_none());
        assert!(open(&other_request, &recipient, &out).is_none());
        let mut renamed = out.clone();
        renamed.index = NodeIndex(1);
        assert!(open(&request, &recipient, &renamed).is_none(), "the holder's index is bound");
        assert!(!out.encode().windows(32).any(|window| shares[1].scalar().expose(|share| share == window)));
    });
}
