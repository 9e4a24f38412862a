//! Signatures while nodes die, cheat, lose what they hold, or were born without the roots that sign.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use dstack_actors::signing::wire::{RoundMessage, RunAsk};
use dstack_certificates::identity;
use dstack_protocol::ceremony::MessageKind;
use dstack_protocol::command::Command;
use dstack_protocol::env::{EnvAttempt, EnvPubBody};
use dstack_protocol::governance::{ActionKind, Object};
use dstack_protocol::release::{Intent, KeyClass, Mode};
use dstack_protocol::rpc::{PATH_PEER_SIGN_PAIR, PATH_PEER_SIGN_PAIR_DONE, PATH_PEER_SIGN_ROUND, PATH_PEER_SIGN_RUN};
use dstack_protocol::sign::{AppPkClaim, Basis, SignAsk, SignObject};
use dstack_protocol::state::SignedRow;
use dstack_protocol::{Epoch, Generation, NodeIndex, Refusal, RefusalCode, RootTag, Seat, Wire as _};
use support::client::{AppKey, Client};
use support::cluster::{APP, Cluster};
use support::members::{Letter, Member, Net, Sealed};
use support::{run, until};

const GENERATION: Generation = Generation(0);
const ENVPUB: [u8; 32] = [0x42; 32];
const ROOT_CA: SignObject = SignObject::RootCa { generation: GENERATION };

fn root_key(cluster: &Cluster, root: RootTag) -> Vec<u8> {
    cluster.log.read(|state| state.roots[&(GENERATION, root)].public_key.0.clone())
}

async fn claimed(member: &Member, claim: &AppPkClaim) -> Result<SignedRow, Refusal> {
    member.signing.sign_on(claim.object(), Basis::Claim { claim_hash: claim.hash() }, &claim.encode()).await
}

/// The identity's signature over that object, checked by code that shares nothing with the signers.
fn by_identity(cluster: &Cluster, row: &SignedRow) {
    let digest = row.ask.object.identity_digest().unwrap();
    identity::verify(&root_key(cluster, RootTag::Id), &digest, &row.bytes.0).unwrap();
}

/// A key that was never asked for: each is an ECDSA run of its own.
fn new_claim(cluster: &Cluster, name: &str) -> AppPkClaim {
    Client::new(cluster, name).claim(cluster, &AppKey::generate())
}

/// A dated signature of the env key by the identity: as many different ones as there are minutes. What may be tried again is.
async fn dated(cluster: &Cluster, member: &Member) {
    assert_eq!(cluster.beacon(cluster.log_time().plus_ms(61_000)), None);
    let timestamp_s = cluster.log_time().0 / 1000;
    let object = SignObject::EnvKeyAt { generation: GENERATION, app_id: APP, envpub: ENVPUB, timestamp_s };
    for _ in 0..4 {
        match member.signing.sign(object.clone()).await {
            Ok(row) => {
                assert_eq!(row.ask.object, object);
                return by_identity(cluster, &row);
            }
            Err(refusal) => assert!(refusal.code.retryable(), "{refusal}"),
        }
    }
    panic!("no signature");
}

/// The app's env key as the node named for it publishes it.
fn publish_env_key(cluster: &Cluster) {
    let attempt = EnvAttempt { app_id: APP, generation: GENERATION, attempt: 1, operator: None };
    assert_eq!(cluster.log.code(&Command::Env(attempt)), None);
    let named = cluster.log.read(|state| state.env_keys[&(GENERATION, APP)].combiner);
    let body = EnvPubBody { app_id: APP, generation: GENERATION, attempt: 1, envpub: ENVPUB }.encode();
    let message = cluster.keys[usize::from(named.0) - 1].sign_message(&cluster.id, MessageKind::EnvPub, named, [0; 32], body);
    assert_eq!(cluster.log.code(&Command::Ceremony(message)), None);
}

/// A committed release of mode L of that class to that node.
fn released(cluster: &Cluster, class: KeyClass, coordinator: u16) -> Basis {
    let intent = Intent {
        req_hash: [class as u8; 32],
        evidence_hash: [7; 32],
        generation: GENERATION,
        mode: Mode::Legacy,
        coordinator: NodeIndex(coordinator),
        beacon_pos: cluster.latest_beacon().0,
        app_id: APP,
        wishes: vec![(class, [9; 32])],
    };
    assert_eq!(cluster.log.apply(&cluster.recorded(&intent, Some([7; 32]))).outcomes[0].code, 0);
    Basis::Release { intent_id: intent.id() }
}

#[test]
fn with_a_node_dead_every_kind_of_signature_is_made_and_a_dead_coordinators_run_is_finished_by_another() {
    run(async {
        let cluster = Cluster::new(3, 0);
        assert_eq!(cluster.govern(ActionKind::SetAppPolicy, Object::App(APP), Cluster::legacy_policy().encode()), None);
        let net = Net::new();
        let mut members = Member::formed(&cluster, &net).await;
        publish_env_key(&cluster);

        // Node 1 leads, has asked for the root's certificate, and dies before any run of it is over.
        net.wire(|(from, ..)| *from != Seat(1));
        let asking = members[0].signing.clone();
        let asked = tokio::spawn(async move { asking.sign(ROOT_CA).await });
        let pos = until("the ask in the log", || cluster.log.read(|state| state.asked(&ROOT_CA).map(|ask| ask.pos))).await;
        asked.abort();
        drop(members.remove(0).kill());
        net.cut(1);
        net.straight();
        let row = members[0].signing.sign(ROOT_CA).await.unwrap();
        assert_eq!((row.ask.pos, row.ask.author), (pos, NodeIndex(1)), "the ask of the dead node, finished by another");

        // Everything new, with one node dead: app key by claim, app CA, env key, dated env key.
        let claim = new_claim(&cluster, "guest");
        by_identity(&cluster, &claimed(&members[1], &claim).await.unwrap());
        let public_key = p256_point();
        let ca = SignObject::AppCa { generation: GENERATION, app_id: APP, public_key };
        let basis = released(&cluster, KeyClass::P256, 2);
        let row = members[0].signing.sign_on(ca.clone(), basis, &[]).await.unwrap();
        assert_eq!(cluster.log.read(|state| state.signed(&ca).cloned()), Some(row));
        let envpub = SignObject::EnvKey { generation: GENERATION, app_id: APP, envpub: ENVPUB };
        by_identity(&cluster, &members[0].signing.sign(envpub).await.unwrap());
        dated(&cluster, &members[1]).await;
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

fn p256_point() -> [u8; 33] {
    // The generator of P-256, compressed.
    let hex = "036b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296";
    let mut point = [0; 33];
    for (byte, at) in point.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    }
    point
}

#[test]
fn damaged_secrets_of_pairs_are_made_anew_and_sealed() {
    run(async {
        let cluster = Cluster::new(3, 0);
        assert_eq!(cluster.set_policy(APP), None);
        let net = Net::new();
        let mut members = Member::formed(&cluster, &net).await;
        publish_env_key(&cluster);
        let restart = |members: &mut Vec<Member>, damage: &dyn Fn(&Sealed)| {
            let files = members.remove(2).kill();
            damage(&files);
            let machine = Arc::clone(&cluster.machines[2]);
            members.push(Member::start(&cluster, &net, 3, machine, files));
        };
        let signs = async |members: &[Member], with: usize| {
            until("node 3 to have all pairs, sealed", || {
                let held = members[2].shares.pairs_count(RootTag::Id) == 2 && members[2].signing.can_sign(RootTag::Id);
                (held && members[2].files.pairs_sealed(&cluster, 3) == 2).then_some(())
            })
            .await;
            // Between these two alone: the third is cut off.
            let third = u16::try_from(2 - with).unwrap();
            net.cut(third);
            dated(&cluster, &members[2]).await;
            net.heal(third);
        };

        // Whoever asks first is told by the others; meanwhile they sign without it.
        net.wire(|(_, _, path, _)| *path != PATH_PEER_SIGN_PAIR);
        restart(&mut members, &|files| assert_eq!(files.damage_pairs(), 1));
        until("node 3 to hold its share without pairs", || {
            (members[2].signing.pairs_missing(RootTag::Id) == [NodeIndex(1), NodeIndex(2)]).then_some(())
        })
        .await;
        assert!(!members[2].signing.can_sign(RootTag::Id) && members[2].signing.can_sign(RootTag::Ca));
        dated(&cluster, &members[0]).await;
        dated(&cluster, &members[2]).await;

        // The way is open: made anew with both, in use, and sealed.
        net.straight();
        signs(&members, 1).await;
        signs(&members, 0).await;
        net.forget();
        restart(&mut members, &|_| {});
        signs(&members, 0).await;
        assert!(net.sent(PATH_PEER_SIGN_PAIR).is_empty(), "what was sealed opens, nothing is made again");

        // Both ends of a pair lose it at once: one setup, not two that cross.
        let files = members.remove(1).kill();
        assert_eq!(files.damage_pairs(), 1);
        members.insert(1, Member::start(&cluster, &net, 2, Arc::clone(&cluster.machines[1]), files));
        restart(&mut members, &|files| assert_eq!(files.damage_pairs(), 1));
        signs(&members, 1).await;
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

#[test]
fn an_old_file_of_pairs_is_noticed_and_nobody_is_called_a_cheat() {
    run(async {
        let cluster = Cluster::new(3, 0);
        assert_eq!(cluster.set_policy(APP), None);
        let net = Net::new();
        let mut members = Member::formed(&cluster, &net).await;
        publish_env_key(&cluster);
        // Node 3's file is kept, then damaged: new pairs are made. Node 3 dies before its last word comes, and starts with the old file.
        let files = members.remove(2).kill();
        let old = Sealed::on(&cluster, &cluster.machines[2]);
        old.copy(&files);
        assert_eq!(files.damage_pairs(), 1);
        members.push(Member::start(&cluster, &net, 3, Arc::clone(&cluster.machines[2]), files));
        until("new pairs", || (members[2].shares.pairs_count(RootTag::Id) == 2).then_some(())).await;
        drop(members.remove(2).kill());
        members.push(Member::start(&cluster, &net, 3, Arc::clone(&cluster.machines[2]), old));
        until("the old pairs", || (members[2].shares.pairs_count(RootTag::Id) == 2).then_some(())).await;

        // The first run between 3 and 1 ends before any secret is used; both ends make the pair anew, and sign.
        net.forget();
        net.cut(2);
        dated(&cluster, &members[0]).await;
        assert!(!net.sent(PATH_PEER_SIGN_PAIR_DONE).is_empty(), "a pair was made anew");
        for member in &members {
            assert_eq!(member.signing.expelled(RootTag::Id), []);
        }
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

#[test]
fn a_cheat_is_left_out_and_the_others_sign() {
    run(async {
        let cluster = Cluster::new(3, 0);
        assert_eq!(cluster.set_policy(APP), None);
        let net = Net::new();
        let members = Member::formed(&cluster, &net).await;
        publish_env_key(&cluster);
        // One bit of the extension's matrix in each first message of node 2: behind the run, the envelope, the pair and the head.
        let spoiled = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&spoiled);
        net.wire(move |letter: &mut Letter| {
            if letter.0 == Seat(2)
                && letter.2 == PATH_PEER_SIGN_ROUND
                && let Ok(mut round) = RoundMessage::decode(&letter.3)
                && round.message[47] == 1
            {
                round.message[56 + 32 + 2 + 96 + 100] ^= 1;
                letter.3 = round.encode();
                count.fetch_add(1, Ordering::SeqCst);
            }
            true
        });
        // Node 2 is the nearest to node 1, so the first run is with it.
        dated(&cluster, &members[0]).await;
        assert!(spoiled.load(Ordering::SeqCst) >= 1);
        assert_eq!(members[0].signing.expelled(RootTag::Id), [NodeIndex(2)]);
        net.straight();

        // It is refused with a code from then on, by node 1, in this root and no other; a setup of the pair does not let it in again.
        let (beacon_pos, _) = cluster.latest_beacon();
        let object = SignObject::EnvKey { generation: GENERATION, app_id: APP, envpub: ENVPUB };
        let mut ask = SignAsk { author: NodeIndex(2), beacon_pos, object: object.clone(), basis: Basis::State, sig: [0; 64] };
        ask.sig = cluster.keys[1].sign(&ask.signed_bytes(&cluster.id));
        assert_eq!(cluster.log.code(&Command::Sign(ask)), None);
        let ask_pos = cluster.log.read(|state| state.asked(&object).unwrap().pos);
        let signers = vec![NodeIndex(1), NodeIndex(2)];
        let with_the_cheat = RunAsk { key: object.key(), ask_pos, epoch: Epoch(1), attempt: 2 << 16 | 7, signers, claim: Vec::new() };
        let refused = members[0].signing.answer(NodeIndex(2), PATH_PEER_SIGN_RUN, &with_the_cheat.encode()).await.unwrap_err();
        assert_eq!(refused.code, RefusalCode::SignerExpelled, "{refused}");
        assert!(members[0].signing.pairs_missing(RootTag::Id).is_empty());
        members[0].signing.sign(ROOT_CA).await.unwrap();
        // Node 3 has no quarrel with either.
        net.cut(1);
        dated(&cluster, &members[2]).await;
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

#[test]
fn a_cluster_with_prf_alone_gets_the_other_roots_and_one_that_lost_its_files_is_done_without() {
    run(async {
        let cluster = Cluster::new(3, 0);
        drop(cluster.dkg());
        assert_eq!(cluster.set_policy(APP), None);
        let before = cluster.public_key();
        let net = Net::new();
        let mut members: Vec<Member> = (1..=3).map(|seat| Member::honest(&cluster, &net, seat)).collect();
        let rows = until("roots ca and id", || {
            cluster.log.read(|state| {
                let row = |root| state.roots.get(&(GENERATION, root)).map(|row| (row.attempt, row.epoch));
                Some((row(RootTag::Prf)?, row(RootTag::Ca)?, row(RootTag::Id)?))
            })
        })
        .await;
        assert_eq!((rows.0.0, rows.1.0, rows.2.0), (1, 2, 2), "a ceremony of their own");
        assert!(rows.0.1 == rows.1.1 && rows.1.1 == rows.2.1, "in the epoch in force");
        assert_eq!(cluster.public_key(), before);
        for member in &members {
            until("both to sign", || [RootTag::Ca, RootTag::Id].into_iter().all(|root| member.signing.can_sign(root)).then_some(())).await;
        }
        members[1].signing.sign(ROOT_CA).await.unwrap();
        by_identity(&cluster, &claimed(&members[0], &new_claim(&cluster, "guest")).await.unwrap());

        // Node 3 loses everything: it holds nothing, says so, and is done without.
        let files = members.remove(2).kill();
        files.wipe();
        members.push(Member::start(&cluster, &net, 3, Arc::clone(&cluster.machines[2]), files));
        publish_env_key(&cluster);
        net.forget();
        dated(&cluster, &members[2]).await;
        assert!(RootTag::ALL.into_iter().all(|root| !members[2].signing.can_sign(root)));
        assert!(net.sent(PATH_PEER_SIGN_PAIR).is_empty(), "without a share it asks for no pairs");
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}
