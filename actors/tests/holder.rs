//! A holder against everything that a coordinator or a client may get wrong: no partial without its own judgement.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::sync::Arc;

use dstack_actors::holder::Holder;
use dstack_actors::share_holder::ShareHolderPool;
use dstack_protocol::command::Command;
use dstack_protocol::governance::{ActionKind, Object};
use dstack_protocol::release::{Ask, Go, Intent, KeyClass, Out, RelReq, Wish};
use dstack_protocol::{AppId, ClusterId, Generation, NodeIndex, Platform, Refusal, RefusalCode, UnixMillis};
use support::client::{Client, open};
use support::cluster::{APP, Cluster, copy};
use support::holders::Node;
use support::run;

const TEN_YEARS_MS: u64 = 315_360_000_000;

struct World {
    cluster: Cluster,
    node: Node,
    client: Client,
}

impl World {
    fn new() -> Self {
        let (cluster, shares) = Cluster::with_root(3);
        let node = Node::start(&cluster, 1, copy(&shares[0]));
        let client = Client::new(&cluster, "guest");
        Self { cluster, node, client }
    }

    fn holder(&self) -> &Arc<Holder> {
        &self.node.holder
    }

    fn request(&self) -> (RelReq, dstack_threshold::answer::RecipientKey) {
        self.client.request(&self.cluster, self.client.wishes())
    }

    fn commit(&self, intent: &Intent) -> Go {
        let outcome = self.cluster.log.apply(&Command::Intents(vec![intent.clone()])).outcomes[0];
        assert_eq!(outcome.code, 0);
        Go { intent_id: intent.id(), pos: outcome.pos }
    }

    /// Asks, commits; what is left is `go`.
    async fn asked(&self) -> Go {
        let (request, _) = self.request();
        self.holder().ask(self.client.ask(&request), NodeIndex(0)).await.unwrap();
        self.commit(&request.intent(NodeIndex(0)))
    }

    async fn refused_ask(&self, ask: Ask) -> RefusalCode {
        let request = ask.request.clone();
        let refusal = self.holder().ask(ask, NodeIndex(0)).await.unwrap_err();
        // A refused ask leaves nothing behind that a later go could use.
        let go = Go { intent_id: request.intent(NodeIndex(0)).id(), pos: 0 };
        assert_eq!(self.refused_go(go).await.code, RefusalCode::IntentUnknown);
        refusal.code
    }

    async fn refused_go(&self, go: Go) -> Refusal {
        self.holder().go(go).await.unwrap_err()
    }
}

#[test]
fn an_honest_request_gets_a_partial_and_the_same_one_again() {
    run(async {
        let w = World::new();
        let (request, recipient) = w.request();
        w.holder().ask(w.client.ask(&request), NodeIndex(0)).await.unwrap();
        let go = w.commit(&request.intent(NodeIndex(0)));
        let outs: Vec<Out> = vec![w.holder().go(go).await.unwrap(), w.holder().go(go).await.unwrap()];
        let plains: Vec<_> = outs.iter().map(|out| open(&request, &recipient, out).unwrap()).collect();
        assert_eq!(plains[0].elements, plains[1].elements);
        assert_eq!(plains[0].elements.len(), 2);
        assert_eq!((plains[0].pos, plains[0].generation), (go.pos, Generation(0)));
        assert_ne!(outs[0].kem, outs[1].kem, "sealed afresh");
    });
}

#[test]
fn no_partial_without_an_ask_or_without_a_committed_intent() {
    run(async {
        let w = World::new();
        let (request, _) = w.request();
        let go = w.commit(&request.intent(NodeIndex(0)));
        let refusal = w.refused_go(go).await;
        assert_eq!(refusal.code, RefusalCode::IntentUnknown);
        assert!(refusal.code.retryable() && refusal.retry_after_ms > 0);

        let (uncommitted, _) = w.request();
        w.holder().ask(w.client.ask(&uncommitted), NodeIndex(0)).await.unwrap();
        let intent_id = uncommitted.intent(NodeIndex(0)).id();
        assert_eq!(w.refused_go(Go { intent_id, pos: 0 }).await.code, RefusalCode::IntentUnknown);
        let size = w.cluster.log.size();
        let refusal = w.refused_go(Go { intent_id, pos: size }).await;
        assert_eq!(refusal.code, RefusalCode::NotYet, "not applied within 500 ms");
        assert!(refusal.retry_after_ms > 0);
    });
}

#[test]
fn a_go_that_comes_before_its_entry_waits_for_it() {
    run(async {
        let w = World::new();
        let (request, _) = w.request();
        w.holder().ask(w.client.ask(&request), NodeIndex(0)).await.unwrap();
        let intent = request.intent(NodeIndex(0));
        let early = Go { intent_id: intent.id(), pos: w.cluster.log.size() };
        let later = async {
            tokio::time::sleep(std::time::Duration::from_millis(150)).await;
            assert_eq!(w.commit(&intent), early);
        };
        let (out, ()) = futures::join!(w.holder().go(early), later);
        assert_eq!(out.unwrap().index, NodeIndex(1));
    });
}

#[test]
fn evidence_of_another_session_is_refused() {
    run(async {
        let w = World::new();
        let stranger = Client::new(&w.cluster, "stranger");
        // Another's evidence under an own key: its report data binds another key.
        let (mut request, _) = w.request();
        request.evidence_hash = dstack_protocol::binding::evidence_hash(&stranger.evidence);
        let mut ask = w.client.ask(&request);
        ask.evidence = stranger.evidence.clone();
        assert_eq!(w.refused_ask(ask).await, RefusalCode::SessionMismatch);
        // Another's evidence and key, own signature.
        let mut ask = w.client.ask(&request);
        ask.evidence = stranger.evidence.clone();
        ask.spki = stranger.spki.clone();
        assert_eq!(w.refused_ask(ask).await, RefusalCode::BadSignature);
        // Evidence that the request does not name.
        let (request, _) = w.request();
        let mut ask = w.client.ask(&request);
        ask.evidence = stranger.evidence;
        assert_eq!(w.refused_ask(ask).await, RefusalCode::EvidenceHash);
        // A session that began at another beacon than the evidence says.
        assert_eq!(w.cluster.beacon(w.cluster.born.plus_ms(1000)), None);
        let mut ask = w.client.ask(&w.request().0);
        ask.session_pos = w.cluster.latest_beacon().0;
        assert_eq!(w.refused_ask(ask).await, RefusalCode::SessionMismatch);
        // A position that is no beacon, a beacon with a false value, another cluster, a changed request.
        let mut ask = w.client.ask(&w.request().0);
        ask.session_pos += 1;
        assert_eq!(w.refused_ask(ask).await, RefusalCode::UnknownBeacon);
        let (mut request, _) = w.request();
        request.beacon[0] ^= 1;
        assert_eq!(w.refused_ask(w.client.ask(&request)).await, RefusalCode::UnknownBeacon);
        let (mut request, _) = w.request();
        request.cluster_id = ClusterId([9; 32]);
        assert_eq!(w.refused_ask(w.client.ask(&request)).await, RefusalCode::WrongCluster);
        let mut ask = w.client.ask(&w.request().0);
        ask.request.nonce[0] ^= 1;
        assert_eq!(w.refused_ask(ask).await, RefusalCode::BadSignature);
        let mut ask = w.client.ask(&w.request().0);
        ask.spki = b"no key at all".to_vec();
        assert_eq!(w.refused_ask(ask).await, RefusalCode::SessionMismatch);
    });
}

#[test]
fn wishes_beyond_the_identity_are_refused() {
    run(async {
        let w = World::new();
        let other_app = AppId([3; 20]);
        let (mut request, _) = w.request();
        request.app_id = other_app;
        assert_eq!(w.refused_ask(w.client.ask(&request)).await, RefusalCode::AppUnknown);
        assert_eq!(w.cluster.set_policy(other_app), None);
        assert_eq!(w.refused_ask(w.client.ask(&request)).await, RefusalCode::AppIdMismatch);

        let neighbour = Client::new(&w.cluster, "neighbour");
        assert_ne!(neighbour.instance, w.client.instance);
        let disk = |ctx: Vec<u8>| vec![Wish::new(KeyClass::Disk, ctx).unwrap()];
        for ctx in [neighbour.instance, Vec::new()] {
            let (request, _) = w.client.request(&w.cluster, disk(ctx));
            assert_eq!(w.refused_ask(w.client.ask(&request)).await, RefusalCode::InstanceMismatch);
        }
        let path = Wish::new(KeyClass::Custom, b"other/main".to_vec()).unwrap();
        let (request, _) = w.client.request(&w.cluster, vec![path]);
        assert_eq!(w.refused_ask(w.client.ask(&request)).await, RefusalCode::PathNotAllowed);
        let (request, _) = w.client.request(&w.cluster, vec![Wish::new(KeyClass::Env, vec![]).unwrap()]);
        assert_eq!(w.refused_ask(w.client.ask(&request)).await, RefusalCode::ClassNotAllowed);
    });
}

#[test]
fn a_go_for_another_position_is_refused() {
    run(async {
        let w = World::new();
        let go = w.asked().await;
        for pos in [0, go.pos - 1] {
            assert_eq!(w.refused_go(Go { pos, ..go }).await.code, RefusalCode::IntentPosition);
        }
        assert_eq!(w.refused_go(Go { pos: u64::MAX, ..go }).await.code, RefusalCode::NotYet);
        assert!(w.holder().go(go).await.is_ok());
    });
}

#[test]
fn an_intent_that_differs_from_the_request_gets_nothing() {
    run(async {
        let w = World::new();
        let (request, _) = w.request();
        let ask = w.client.ask(&request);
        w.holder().ask(ask.clone(), NodeIndex(0)).await.unwrap();
        let honest = request.intent(NodeIndex(0));
        let mut other = [honest.clone(), honest.clone(), honest.clone(), honest.clone()];
        other[0].wishes.pop();
        other[1].evidence_hash[0] ^= 1;
        other[2].req_hash[0] ^= 1;
        other[3].app_id = AppId([3; 20]);
        assert_eq!(w.cluster.set_policy(AppId([3; 20])), None);
        let identity = w.holder().identify(&ask, NodeIndex(0)).await.unwrap();
        let signed = w.holder().judge(Arc::new(ask), NodeIndex(0), &identity).await.unwrap();
        for intent in other {
            let go = w.commit(&intent);
            assert_eq!(w.refused_go(go).await.code, RefusalCode::IntentUnknown, "its id is not that of an ask");
            assert_eq!(w.refused_go(Go { intent_id: honest.id(), ..go }).await.code, RefusalCode::IntentUnknown, "not committed");
            let cleared = w.node.policy.clear(&signed, &go, identity.as_deref(), None);
            assert_eq!(cleared.unwrap_err().code, RefusalCode::IntentMismatch);
        }
        let go = w.commit(&honest);
        assert!(w.holder().go(go).await.is_ok());
    });
}

#[test]
fn a_revocation_after_the_intent_stops_the_partial() {
    run(async {
        for object in [Object::App(APP), Object::Platform(Platform::Tdx), Object::Generation(Generation(0))] {
            let w = World::new();
            let go = w.asked().await;
            assert_eq!(w.cluster.govern(ActionKind::Revoke, object.clone(), vec![]), None);
            let code = w.refused_go(go).await.code;
            let expected = match object {
                Object::App(_) => RefusalCode::AppRevoked,
                Object::Platform(_) => RefusalCode::PlatformRevoked,
                _ => RefusalCode::GenerationRevoked,
            };
            assert_eq!(code, expected);
            let (request, _) = w.request();
            assert_eq!(w.refused_ask(w.client.ask(&request)).await, expected);
        }
    });
}

#[test]
fn a_stale_row_is_refused_by_log_time_and_by_the_own_clock() {
    run(async {
        let w = World::new();
        let born = w.cluster.born;
        let go = w.asked().await;
        // 170 s by the log, 170 + 71 s by the holder's clock, which is within its skew.
        assert_eq!(w.cluster.beacon(born.plus_ms(170_000)), None);
        w.node.now.set(born.plus_ms(241_000));
        assert_eq!(w.refused_go(go).await.code, RefusalCode::IntentTooOld);
        w.node.now.set(born.plus_ms(240_000));
        assert!(w.holder().go(go).await.is_ok());
        // The log forgets the row with its time.
        assert_eq!(w.cluster.beacon(born.plus_ms(240_001)), None);
        w.node.now.set(born.plus_ms(200_000));
        assert_eq!(w.refused_go(go).await.code, RefusalCode::IntentUnknown);
    });
}

#[test]
fn a_request_over_an_old_beacon_is_refused_before_it_is_recorded() {
    run(async {
        let w = World::new();
        let (request, _) = w.request();
        let later = w.cluster.born.plus_ms(120_001);
        assert_eq!(w.cluster.beacon(later), None);
        w.node.now.set(later);
        assert_eq!(w.refused_ask(w.client.ask(&request)).await, RefusalCode::BeaconStale);
        let much_later = w.cluster.born.plus_ms(3_600_001);
        assert_eq!(w.cluster.beacon(much_later), None);
        w.node.now.set(much_later);
        let (request, _) = w.request();
        assert_eq!(w.refused_ask(w.client.ask(&request)).await, RefusalCode::SessionExpired);
    });
}

#[test]
fn a_clock_ten_years_off_serves_nothing() {
    run(async {
        let w = World::new();
        let go = w.asked().await;
        let log_time = w.cluster.log_time();
        for wrong in [log_time.plus_ms(TEN_YEARS_MS), UnixMillis(log_time.0 - TEN_YEARS_MS), log_time.plus_ms(90_001)] {
            w.node.now.set(wrong);
            let refusal = w.refused_go(go).await;
            assert_eq!(refusal.code, RefusalCode::ClockSkew);
            assert!(refusal.code.retryable(), "another node may serve");
        }
        // An ask is refused too, by the verifier or by the clock rule, whichever is first.
        w.node.now.set(log_time.plus_ms(TEN_YEARS_MS));
        let (request, _) = w.request();
        let code = w.refused_ask(w.client.ask(&request)).await;
        assert!(matches!(code, RefusalCode::EvidenceInvalid | RefusalCode::ClockSkew), "{code}");
        w.node.now.set(log_time);
        assert!(w.holder().go(go).await.is_ok());
    });
}

#[test]
fn evidence_is_asked_for_until_it_is_known_and_again_when_it_has_expired() {
    run(async {
        let w = World::new();
        let light = || {
            let mut ask = w.client.ask(&w.request().0);
            ask.evidence.clear();
            ask
        };
        assert_eq!(w.refused_ask(light()).await, RefusalCode::NeedEvidence);
        w.holder().ask(w.client.ask(&w.request().0), NodeIndex(0)).await.unwrap();
        w.holder().ask(light(), NodeIndex(0)).await.unwrap();
        // Knowing another session's evidence is of no use.
        let stranger = Client::new(&w.cluster, "stranger");
        let mut ask = stranger.ask(&stranger.request(&w.cluster, stranger.wishes()).0);
        ask.evidence.clear();
        assert_eq!(w.refused_ask(ask).await, RefusalCode::NeedEvidence);
        w.node.now.set(w.cluster.log_time().plus_ms(TEN_YEARS_MS));
        assert_eq!(w.refused_ask(light()).await, RefusalCode::NeedEvidence);
    });
}

#[test]
fn a_beacon_counts_only_with_its_certificate() {
    run(async {
        let w = World::new();
        let go = w.asked().await;
        let (pos, _) = w.cluster.latest_beacon();
        w.node.certs.take(pos);
        let refusal = w.refused_go(go).await;
        assert_eq!(refusal.code, RefusalCode::NoCert);
        assert!(refusal.retry_after_ms > 0);
        assert_eq!(w.refused_ask(w.client.ask(&w.request().0)).await, RefusalCode::NoCert);
        w.node.certs.give(pos);
        assert!(w.holder().go(go).await.is_ok());
    });
}

#[test]
fn a_node_without_a_share_says_so() {
    run(async {
        let (cluster, _) = Cluster::with_root(3);
        let client = Client::new(&cluster, "guest");
        let node = Node::with(&cluster, 1, ShareHolderPool::start(1, 4, cluster.id), cluster.judge(), 4);
        let (request, _) = client.request(&cluster, client.wishes());
        node.holder.ask(client.ask(&request), NodeIndex(0)).await.unwrap();
        let intent = request.intent(NodeIndex(0));
        let pos = cluster.log.apply(&Command::Intents(vec![intent.clone()])).outcomes[0].pos;
        assert_eq!(node.holder.go(Go { intent_id: intent.id(), pos }).await.unwrap_err().code, RefusalCode::NotReady);
    });
}
