//! Mode L: the node that terminates a guest's TLS is its own client, and its peers believe it nothing.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use dstack_actors::combine::{Combine, ServedKey, Wanted};
use dstack_actors::ports::Peers;
use dstack_attest::tdx::Quote;
use dstack_attest::wire::{Attestation, PlatformEvidence};
use dstack_protocol::binding::Statement;
use dstack_protocol::governance::{ActionKind, Object};
use dstack_protocol::policy::{AppPolicy, Rate};
use dstack_protocol::release::{Ask, Go, Intent, KeyClass, Mode, Out, RelReq, Wish};
use dstack_protocol::rpc::PATH_PEER_GO;
use dstack_protocol::{AppId, Epoch, Generation, NodeIndex, Platform, Refusal, RefusalCode, Seat, Wire as _, binding};
use dstack_release::pace::HEDGE_AFTER_FIRST;
use dstack_threshold::combine::Combiner;
use dstack_threshold::keys::derive;
use dstack_threshold::prf::{Batch, PrfShare};
use support::client::{Client, open};
use support::cluster::{APP, Cluster, copy, renamed};
use support::holders::Node;
use support::peers::{InProcess, Manner};
use support::run;

const DAY_MS: u64 = 86_400_000;

struct World {
    cluster: Cluster,
    shares: Vec<PrfShare>,
    nodes: Vec<Node>,
    guest: Client,
}

impl World {
    fn new(n: u16) -> Self {
        let (cluster, shares) = Cluster::with_root(n);
        assert_eq!(cluster.govern(ActionKind::SetAppPolicy, Object::App(APP), Cluster::legacy_policy().encode()), None);
        let nodes = (1..).zip(&shares).map(|(seat, share)| Node::start(&cluster, seat, copy(share))).collect();
        let guest = Client::legacy(&cluster, "guest");
        Self { cluster, shares, nodes, guest }
    }

    fn set_policy(&self, policy: &AppPolicy) {
        assert_eq!(self.cluster.govern(ActionKind::SetAppPolicy, Object::App(APP), policy.encode()), None);
    }

    fn peers(&self, others: &[(u16, Manner)]) -> Vec<(u16, Manner)> {
        let honest = self.nodes.iter().map(|node| (node.seat.0, Manner::Honest(Arc::clone(&node.holder))));
        let changed = |seat: u16| others.iter().find(|(other, _)| *other == seat).map(|(_, manner)| manner.clone());
        honest.map(|(seat, manner)| (seat, changed(seat).unwrap_or(manner))).collect()
    }

    fn wishes(&self) -> Vec<Wish> {
        let disk = Wish::new(KeyClass::Disk, self.guest.instance.clone()).unwrap();
        [disk].into_iter().chain([KeyClass::Env, KeyClass::K256].map(|class| Wish::new(class, vec![]).unwrap())).collect()
    }

    fn wanted(&self, guest: &Client) -> Wanted {
        Wanted::Legacy { evidence: guest.evidence.clone(), spki: guest.spki.clone() }
    }

    /// Served by that node, over those peers.
    async fn served(&self, seat: u16, peers: Arc<dyn Peers>) -> Result<Vec<ServedKey>, Refusal> {
        let combine = self.nodes[usize::from(seat) - 1].combine(&self.cluster, peers);
        combine.keys(self.wanted(&self.guest), Generation(0), APP, self.wishes()).await.map(|served| served.keys)
    }

    /// The request that node 1 would make, as it sends it.
    fn ask(&self) -> Ask {
        let (request, _) = self.guest.request(&self.cluster, self.wishes());
        let request = RelReq { mode: Mode::Legacy, ..request };
        Ask { request, sig: [0; 64], session_pos: 0, spki: self.guest.spki.clone(), evidence: self.guest.evidence.clone() }
    }

    fn commit(&self, intent: &Intent) -> Result<Go, (RefusalCode, u32)> {
        self.commit_over(intent, statement(&self.guest.evidence))
    }

    /// Records an intent as a node that tells the log of that statement.
    fn commit_over(&self, intent: &Intent, statement_id: [u8; 32]) -> Result<Go, (RefusalCode, u32)> {
        let outcome = self.cluster.log.apply(&self.cluster.recorded(intent, Some(statement_id))).outcomes[0];
        match RefusalCode::from_number(outcome.code) {
            Some(code) => Err((code, outcome.retry_after_ms)),
            None => Ok(Go { intent_id: intent.id(), pos: outcome.pos }),
        }
    }

    /// What node 2's holder says to an ask of that node.
    async fn asked(&self, ask: Ask, from: u16) -> Option<RefusalCode> {
        self.nodes[1].holder.ask(ask, NodeIndex(from)).await.err().map(|refusal| refusal.code)
    }

    async fn gone(&self, go: Go) -> Option<RefusalCode> {
        self.nodes[1].holder.go(go).await.err().map(|refusal| refusal.code)
    }
}

fn bytes(keys: &[ServedKey]) -> Vec<(KeyClass, [u8; 32])> {
    keys.iter().map(|key| (key.class, key.bytes.expose(|bytes| *bytes))).collect()
}

const ME: NodeIndex = NodeIndex(1);

/// The name of what the evidence's quote says, taken from its bytes.
fn statement(evidence: &[u8]) -> [u8; 32] {
    let PlatformEvidence::Tdx(td) = Attestation::decode(evidence).unwrap().platform else { panic!("a TDX guest") };
    let quote = Quote::parse(&td.quote).unwrap();
    binding::statement_id(Statement::TdxQuote(quote.signed, quote.parts.signature.first_chunk().unwrap()))
}

/// The same evidence, written in another way: the encoding and the VmConfig are nobody's signature.
fn rewritten(evidence: &[u8], config: &str) -> Vec<u8> {
    let mut attestation = Attestation::decode(evidence).unwrap();
    attestation.config = config.to_owned();
    attestation.encode_v1()
}

#[test]
fn every_node_serves_the_keys_that_a_native_client_derives() {
    run(async {
        let w = World::new(3);
        let first = w.served(1, InProcess::new(w.peers(&[]))).await.unwrap();
        let second = w.served(2, InProcess::asked_by(2, w.peers(&[(1, Manner::Silent)]))).await.unwrap();
        assert_eq!(bytes(&first), bytes(&second), "another node, another set of holders, the same keys");
        assert_eq!(first.iter().map(|key| key.public.as_ref().map(Vec::len)).collect::<Vec<_>>(), [None, Some(32), Some(33)]);

        let native = Client::new(&w.cluster, "guest");
        let (request, recipient) = native.request(&w.cluster, w.wishes());
        let answer = w.nodes[2].coordinator(InProcess::new(w.peers(&[])), 8);
        let answer = answer.release(native.ask(&request), &[]).await.unwrap();
        let mut combiner = Combiner::new(Batch::of_request(&request).unwrap(), Generation(0), &w.cluster.public_key()).unwrap();
        let groups: Vec<_> = answer.outs.iter().map(|out| combiner.add(&open(&request, &recipient, out).unwrap()).unwrap()).collect();
        let combined = combiner.combine(&groups[0], 2, None).unwrap();
        for ((wish, output), (class, served)) in request.wishes.iter().zip(&combined.outputs).zip(bytes(&first)) {
            assert_eq!(wish.class, class);
            derive(wish, &APP, output).unwrap().bytes().expose(|own| assert_eq!(own, &served));
        }
    });
}

#[test]
fn a_silent_peer_costs_one_delay_and_a_liar_is_replaced() {
    run(async {
        let w = World::new(3);
        let honest = bytes(&w.served(1, InProcess::new(w.peers(&[]))).await.unwrap());
        let size = w.cluster.log.size();
        let began = Instant::now();
        let peers = InProcess::measured(w.peers(&[(2, Manner::Silent)]), &[(2, 1), (3, 5)]);
        assert_eq!(bytes(&w.served(1, peers).await.unwrap()), honest);
        assert!(began.elapsed() < HEDGE_AFTER_FIRST + Duration::from_secs(2));
        assert_eq!(w.cluster.log.size(), size + 2);

        // Sealed well, proven well, for a key of its own; and bytes that do not open at all.
        let liar = Node::start(&w.cluster, 2, renamed(&w.shares[2], NodeIndex(2)));
        let noise = Out { index: NodeIndex(2), epoch: Epoch(1), kem: [1; 32], ct: vec![2; 64] };
        for manner in [Manner::Honest(Arc::clone(&liar.holder)), Manner::Says(noise.encode())] {
            let size = w.cluster.log.size();
            let peers = InProcess::measured(w.peers(&[(2, manner)]), &[(2, 1), (3, 5)]);
            assert_eq!(bytes(&w.served(1, peers.clone()).await.unwrap()), honest);
            assert_eq!(w.cluster.log.size(), size + 2, "the same request again: recorded once");
            let told = peers.reached(PATH_PEER_GO);
            assert!(told.contains(&Seat(2)) && told.contains(&Seat(3)), "{told:?}");
        }
        // Nobody is left to take its place.
        let manners = [(2, Manner::Honest(Arc::clone(&liar.holder))), (3, Manner::Refuses(RefusalCode::ShuttingDown))];
        let refusal = w.served(1, InProcess::measured(w.peers(&manners), &[(2, 1), (3, 5)])).await.unwrap_err();
        assert!(refusal.code.retryable(), "{refusal}");
    });
}

#[test]
fn known_outputs_are_compared_and_a_liar_is_named_one_round_later() {
    run(async {
        let w = World::new(3);
        let mut combine = w.nodes[0].combine(&w.cluster, InProcess::new(w.peers(&[])));
        let served = async |combine: &Combine| combine.keys(w.wanted(&w.guest), Generation(0), APP, w.wishes()).await.unwrap().keys;
        let first = bytes(&served(&combine).await);
        // Known now; each time an intent of its own, and the holder that answers changes.
        for near in [2, 3] {
            let size = w.cluster.log.size();
            let far = Manner::Behind(Arc::clone(&w.nodes[usize::from(4 - near)].holder), Seat(near));
            let peers = InProcess::measured(w.peers(&[(5 - near, far)]), &[(near, 1), (5 - near, 5)]);
            combine.coordinator = w.nodes[0].coordinator(peers.clone(), 8);
            assert_eq!(bytes(&served(&combine).await), first);
            assert_eq!(w.cluster.log.size(), size + 2, "the intent, behind this node's word");
            assert!(peers.reached(PATH_PEER_GO).contains(&Seat(near)));
        }
        // Whoever lies is asked once without and once with proofs, then another in its place.
        let liar = Node::start(&w.cluster, 2, renamed(&w.shares[2], NodeIndex(2)));
        let noise = Out { index: NodeIndex(2), epoch: Epoch(1), kem: [1; 32], ct: vec![2; 64] };
        for manner in [Manner::Honest(Arc::clone(&liar.holder)), Manner::Says(noise.encode())] {
            let size = w.cluster.log.size();
            let other = Manner::Behind(Arc::clone(&w.nodes[2].holder), Seat(2));
            let peers = InProcess::measured(w.peers(&[(2, manner), (3, other)]), &[(2, 1), (3, 500)]);
            combine.coordinator = w.nodes[0].coordinator(peers.clone(), 8);
            assert_eq!(bytes(&served(&combine).await), first);
            assert_eq!(w.cluster.log.size(), size + 2, "the same request: recorded once");
            let told = peers.reached(PATH_PEER_GO);
            let to = |seat| told.iter().filter(|reached| **reached == Seat(seat)).count();
            // Twice or more, but where the machine was so busy that seat 3 had answered before it was asked again.
            assert!(to(2) >= 1 && to(3) >= 1, "{told:?}");
        }
        // Another wish beside known ones is proven: this node cannot tell it from memory.
        let wishes = [KeyClass::Env, KeyClass::P256].map(|class| Wish::new(class, vec![]).unwrap()).to_vec();
        combine.coordinator = w.nodes[0].coordinator(InProcess::new(w.peers(&[])), 8);
        let mixed = combine.keys(w.wanted(&w.guest), Generation(0), APP, wishes).await.unwrap().keys;
        assert_eq!(bytes(&mixed)[0], first[1]);
    });
}

#[test]
fn a_peer_answers_the_node_that_the_intent_names_and_no_other() {
    run(async {
        let w = World::new(3);
        let ask = w.ask();
        assert_eq!(w.asked(ask.clone(), 1).await, None);
        let intent = ask.request.intent(ME);
        // Each field of the intent changed: its id is not that of what was asked.
        let mut other = vec![intent.clone(); 6];
        other[0].wishes.pop();
        other[1].evidence_hash[0] ^= 1;
        other[2].req_hash[0] ^= 1;
        other[3].coordinator = NodeIndex(3);
        other[4].wishes[0].1[0] ^= 1;
        other[5].wishes.swap(0, 1);
        for intent in other {
            let go = w.commit(&intent).unwrap();
            assert_eq!(w.gone(go).await, Some(RefusalCode::IntentUnknown));
            assert_eq!(w.gone(Go { intent_id: ask.request.intent(ME).id(), ..go }).await, Some(RefusalCode::IntentUnknown));
        }
        let go = w.commit(&intent).unwrap();
        assert_eq!(w.gone(Go { pos: go.pos - 1, ..go }).await, Some(RefusalCode::IntentPosition));
        assert_eq!(w.gone(go).await, None);
        // Node 3 brings node 1's request: the intent that it leads to is not the committed one.
        let fresh = World { guest: w.guest, ..w };
        let ask = fresh.ask();
        assert_eq!(fresh.asked(ask.clone(), 3).await, None);
        let go = fresh.commit(&ask.request.intent(ME)).unwrap();
        assert_eq!(fresh.gone(go).await, Some(RefusalCode::IntentUnknown));
        // A client cannot ask in a mode of nodes, and a request of this mode has no session.
        assert_eq!(fresh.asked(ask.clone(), 0).await, Some(RefusalCode::NotTheCoordinator));
        assert_eq!(fresh.asked(Ask { sig: [1; 64], ..ask.clone() }, 1).await, Some(RefusalCode::BadSignature));
        assert_eq!(fresh.asked(Ask { session_pos: 3, ..ask }, 1).await, Some(RefusalCode::BadSignature));
    });
}

#[test]
fn evidence_counts_for_its_tls_key_its_app_and_its_instance() {
    run(async {
        let w = World::new(3);
        let native = Client::new(&w.cluster, "guest");
        let stranger = Client::legacy(&w.cluster, "stranger");
        let with = |evidence: &[u8], spki: &[u8]| {
            let mut ask = w.ask();
            ask.request.evidence_hash = binding::evidence_hash(evidence);
            Ask { evidence: evidence.to_vec(), spki: spki.to_vec(), ..ask }
        };
        assert_eq!(w.asked(with(&native.evidence, &native.spki), 1).await, Some(RefusalCode::BindingMismatch), "a session is not dstack's");
        assert_eq!(w.asked(with(&w.guest.evidence, &stranger.spki), 1).await, Some(RefusalCode::BindingMismatch));
        assert_eq!(w.asked(with(&stranger.evidence, &stranger.spki), 1).await, Some(RefusalCode::InstanceMismatch));
        let mut ask = w.ask();
        ask.evidence = stranger.evidence.clone();
        assert_eq!(w.asked(ask, 1).await, Some(RefusalCode::EvidenceHash));
        let mut ask = w.ask();
        ask.request.app_id = AppId([3; 20]);
        assert_eq!(w.asked(ask.clone(), 1).await, Some(RefusalCode::AppUnknown));
        assert_eq!(w.cluster.govern(ActionKind::SetAppPolicy, Object::App(AppId([3; 20])), Cluster::legacy_policy().encode()), None);
        assert_eq!(w.asked(ask, 1).await, Some(RefusalCode::AppIdMismatch));
        // Evidence of a session in mode C, and of this mode in a session.
        let (request, _) = w.guest.request(&w.cluster, w.wishes());
        assert_eq!(w.asked(w.guest.ask(&request), 1).await, Some(RefusalCode::SessionMismatch));
    });
}

#[test]
fn an_app_that_does_not_allow_it_is_refused_before_anything_is_recorded() {
    run(async {
        let w = World::new(3);
        w.set_policy(&AppPolicy { allow_legacy: false, ..Cluster::legacy_policy() });
        let size = w.cluster.log.size();
        let peers = InProcess::new(w.peers(&[]));
        assert_eq!(w.served(1, peers.clone()).await.unwrap_err().code, RefusalCode::LegacyNotAllowed);
        assert_eq!((w.cluster.log.size(), peers.sent().len()), (size, 0));
        assert_eq!(w.asked(w.ask(), 1).await, Some(RefusalCode::LegacyNotAllowed), "a peer that is asked all the same");
        // The key of the app CA alone, for a signature: the class is listed.
        let ca = vec![Wish::new(KeyClass::P256, vec![]).unwrap()];
        let combine = w.nodes[0].combine(&w.cluster, peers);
        let served = combine.keys(w.wanted(&w.guest), Generation(0), APP, ca.clone()).await.unwrap();
        assert!(w.cluster.log.read(|state| state.intents.contains_key(&served.intent_id)));
        assert_eq!(served.keys[0].public.as_ref().unwrap().len(), 33);
        let both = [ca, w.wishes()].concat();
        let refused = combine.keys(w.wanted(&w.guest), Generation(0), APP, both).await.unwrap_err();
        assert_eq!(refused.code, RefusalCode::LegacyNotAllowed);
    });
}

#[test]
fn evidence_is_taken_for_a_day_after_the_log_first_saw_it() {
    run(async {
        let w = World::new(3);
        w.served(1, InProcess::new(w.peers(&[]))).await.unwrap();
        let name = statement(&w.guest.evidence);
        let seen = w.cluster.log.read(|state| state.sightings[&APP][&name]);
        assert_eq!(seen, w.cluster.born);
        let at = |time| {
            assert_eq!(w.cluster.beacon(time), None);
            w.nodes.iter().for_each(|node| node.now.set(time));
        };
        at(w.cluster.born.plus_ms(DAY_MS));
        w.served(2, InProcess::asked_by(2, w.peers(&[]))).await.unwrap();
        assert_eq!(w.cluster.log.read(|state| state.sightings[&APP][&name]), seen, "the first sighting counts");
        at(w.cluster.born.plus_ms(DAY_MS + 1));
        let refusal = w.served(1, InProcess::new(w.peers(&[]))).await.unwrap_err();
        assert_eq!(refusal.code, RefusalCode::EvidenceSeen);
        // A serving node that does not look is refused by the log and by its peers.
        let ask = w.ask();
        assert_eq!(w.commit(&ask.request.intent(ME)), Err((RefusalCode::EvidenceSeen, 0)));
        assert_eq!(w.asked(ask, 1).await, Some(RefusalCode::EvidenceSeen));
        // Whoever has stolen it with its key writes it in ever new ways: it is the old evidence.
        let mut w = w;
        let original = w.guest.evidence.clone();
        for config in ["", "{}", "{ }"] {
            w.guest.evidence = rewritten(&original, config);
            assert_ne!(binding::evidence_hash(&w.guest.evidence), binding::evidence_hash(&original));
            let refusal = w.served(1, InProcess::new(w.peers(&[]))).await.unwrap_err();
            assert_eq!(refusal.code, RefusalCode::EvidenceSeen, "VmConfig {config:?}");
        }
        // The guest boots again: new evidence.
        let again = World { guest: Client::legacy(&w.cluster, "guest"), ..w };
        again.served(1, InProcess::new(again.peers(&[]))).await.unwrap();
    });
}

#[test]
fn a_node_that_tells_the_log_of_other_evidence_gets_no_partial() {
    run(async {
        let w = World::new(3);
        let ask = w.ask();
        assert_eq!(w.asked(ask.clone(), 1).await, None);
        let stranger = statement(&Client::legacy(&w.cluster, "stranger").evidence);
        let go = w.commit_over(&ask.request.intent(ME), stranger).unwrap();
        assert_eq!(w.gone(go).await, Some(RefusalCode::EvidenceSeen));
        // With its own statement the next request is served.
        let ask = w.ask();
        assert_eq!(w.asked(ask.clone(), 1).await, None);
        let go = w.commit_over(&ask.request.intent(ME), statement(&w.guest.evidence)).unwrap();
        assert_eq!(w.gone(go).await, None);
    });
}

#[test]
fn a_revocation_after_the_intent_wins() {
    run(async {
        for (object, expected) in [
            (Object::App(APP), RefusalCode::AppRevoked),
            (Object::Platform(Platform::Tdx), RefusalCode::PlatformRevoked),
            (Object::Generation(Generation(0)), RefusalCode::GenerationRevoked),
        ] {
            let w = World::new(3);
            let ask = w.ask();
            assert_eq!(w.asked(ask.clone(), 1).await, None);
            let go = w.commit(&ask.request.intent(ME)).unwrap();
            assert_eq!(w.cluster.govern(ActionKind::Revoke, object, vec![]), None);
            assert_eq!(w.gone(go).await, Some(expected));
            assert_eq!(w.served(1, InProcess::new(w.peers(&[]))).await.unwrap_err().code, expected);
        }
    });
}

#[test]
fn the_apps_rate_is_counted_over_log_time() {
    run(async {
        let w = World::new(3);
        w.set_policy(&AppPolicy { rate: Rate { per_second: 2, burst: 2 }, ..Cluster::legacy_policy() });
        for _ in 0..2 {
            w.served(1, InProcess::new(w.peers(&[]))).await.unwrap();
        }
        let refusal = w.served(2, InProcess::asked_by(2, w.peers(&[]))).await.unwrap_err();
        assert_eq!((refusal.code, refusal.retry_after_ms), (RefusalCode::RateLimited, 500));
        let later = w.cluster.born.plus_ms(500);
        assert_eq!(w.cluster.beacon(later), None);
        w.served(2, InProcess::asked_by(2, w.peers(&[]))).await.unwrap();
    });
}
