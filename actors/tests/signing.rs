//! Signatures by real engines between three nodes over one log: whole, disturbed, refused.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dstack_actors::signing::wire::{RoundMessage, RunAsk};
use dstack_certificates::{PublicKey, identity, read::Certificate};
use dstack_protocol::command::Command;
use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::governance::{ActionKind, Object};
use dstack_protocol::rpc::{PATH_PEER_SIGN_COMMIT, PATH_PEER_SIGN_ROUND, PATH_PEER_SIGN_RUN, PATH_PEER_SIGN_SHARE};
use dstack_protocol::sign::{AppPkClaim, Basis, SignAsk, SignObject};
use dstack_protocol::state::SignedRow;
use dstack_protocol::{Epoch, Generation, NodeIndex, Refusal, RefusalCode, RootTag, Seat, Wire as _};
use support::client::{AppKey, Client};
use support::cluster::{APP, Cluster};
use support::members::{Member, Net};
use support::run;

const ROOT_CA: SignObject = SignObject::RootCa { generation: Generation(0) };

fn root_key(cluster: &Cluster, root: RootTag) -> Vec<u8> {
    cluster.log.read(|state| state.roots[&(Generation(0), root)].public_key.0.clone())
}

/// The root's certificate, signed by itself; read by code that shares nothing with the signers.
fn certifies_root(cluster: &Cluster, row: &SignedRow, algorithm: CaAlgorithm) {
    let root = PublicKey::root(algorithm, &root_key(cluster, RootTag::Ca)).unwrap();
    let certificate = Certificate::read(&row.bytes.0).unwrap();
    certificate.signed_by(&root).unwrap();
    assert_eq!(certificate.key(), &root);
    assert_eq!(cluster.log.read(|state| state.signed(&ROOT_CA).cloned()).as_ref(), Some(row));
}

async fn claimed(member: &Member, claim: &AppPkClaim) -> Result<SignedRow, Refusal> {
    member.signing.sign_on(claim.object(), Basis::Claim { claim_hash: claim.hash() }, &claim.encode()).await
}

#[test]
fn the_root_certificate_is_signed_once_whoever_asks() {
    run(async {
        let cluster = Cluster::new(3, 0);
        let net = Net::new();
        let members = Member::formed(&cluster, &net).await;
        let (first, second) = tokio::join!(members[0].signing.sign(ROOT_CA), members[2].signing.sign(ROOT_CA));
        let row = first.unwrap();
        assert_eq!(second.unwrap(), row);
        certifies_root(&cluster, &row, CaAlgorithm::Ed25519);
        // Asked for again, the log answers and nobody signs.
        net.forget();
        assert_eq!(members[1].signing.sign(ROOT_CA).await.unwrap(), row);
        assert!(net.sent(PATH_PEER_SIGN_COMMIT).is_empty());
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

#[test]
fn with_one_node_gone_and_one_that_hangs_up_in_the_middle_signatures_still_come() {
    run(async {
        let cluster = Cluster::new(3, 0);
        assert_eq!(cluster.set_policy(APP), None);
        let net = Net::new();
        let members = Member::formed(&cluster, &net).await;
        let client = Client::new(&cluster, "guest");

        // Node 2 commits and then says nothing more.
        net.wire(|(_, to, path, _)| !(*to == Seat(2) && *path == PATH_PEER_SIGN_SHARE));
        certifies_root(&cluster, &members[0].signing.sign(ROOT_CA).await.unwrap(), CaAlgorithm::Ed25519);

        // Of an ECDSA run it takes the first message and sends none.
        let key = AppKey::generate();
        let claim = client.claim(&cluster, &key);
        net.wire(|(from, _, path, _)| !(*from == Seat(2) && *path == PATH_PEER_SIGN_ROUND));
        let row = claimed(&members[0], &claim).await.unwrap();
        identity::verify(&root_key(&cluster, RootTag::Id), &claim.object().identity_digest().unwrap(), &row.bytes.0).unwrap();

        // It is gone altogether, and was not known to be.
        net.straight();
        net.cut(2);
        let other = Client::new(&cluster, "another");
        assert_eq!(claimed(&members[2], &other.claim(&cluster, &AppKey::generate())).await.unwrap_err().code, RefusalCode::SignPinned);
        assert_eq!(claimed(&members[2], &claim).await.unwrap(), row);
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

#[test]
fn a_wrong_share_is_noticed_and_others_sign() {
    run(async {
        let cluster = Cluster::new(3, 0);
        let net = Net::new();
        let members = Member::formed(&cluster, &net).await;
        let spoiled = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&spoiled);
        net.answers(move |seat, path, answer| {
            if seat == Seat(2) && path == PATH_PEER_SIGN_SHARE {
                // The lowest byte of its scalar: another share, well formed.
                let at = answer.len() - 32;
                answer[at] ^= 1;
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        certifies_root(&cluster, &members[0].signing.sign(ROOT_CA).await.unwrap(), CaAlgorithm::Ed25519);
        assert_eq!(spoiled.load(Ordering::SeqCst), 1, "named after its first wrong share, and not picked again");
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

#[test]
fn a_signer_acts_on_rows_of_its_own_state_and_on_each_run_once() {
    run(async {
        let cluster = Cluster::new(3, 0);
        let net = Net::new();
        let members = Member::formed(&cluster, &net).await;
        let ask = |pos: u64, attempt: u32, signers: &[u16]| RunAsk {
            key: ROOT_CA.key(),
            ask_pos: pos,
            epoch: Epoch(1),
            attempt,
            signers: signers.iter().copied().map(NodeIndex).collect(),
            claim: Vec::new(),
        };
        let commit = |from: u16, ask: RunAsk| {
            let signing = members[1].signing.clone();
            async move { signing.answer(NodeIndex(from), PATH_PEER_SIGN_COMMIT, &ask.encode()).await.map_err(|refusal| refusal.code) }
        };
        let size = cluster.log.size();
        assert_eq!(commit(1, ask(size - 1, 1 << 16, &[1, 2])).await, Err(RefusalCode::SignUnknown), "nobody has asked");
        assert_eq!(commit(1, ask(size + 5, 1 << 16, &[1, 2])).await, Err(RefusalCode::NotYet));

        // Somebody asks, and the row waits.
        let (beacon_pos, _) = cluster.latest_beacon();
        let mut sign = SignAsk { author: NodeIndex(1), beacon_pos, object: ROOT_CA, basis: Basis::State, sig: [0; 64] };
        sign.sig = cluster.keys[0].sign(&sign.signed_bytes(&cluster.id));
        assert_eq!(cluster.log.code(&Command::Sign(sign)), None);
        let pos = cluster.log.read(|state| state.asked(&ROOT_CA).unwrap().pos);
        assert_eq!(commit(3, ask(pos, 1 << 16, &[1, 2])).await, Err(RefusalCode::SignRun), "a number of another coordinator");
        assert_eq!(commit(1, ask(pos, 1 << 16, &[1, 3])).await, Err(RefusalCode::SignRun), "without this node");
        assert_eq!(commit(1, ask(pos, 1 << 16, &[1, 2, 3])).await, Err(RefusalCode::SignRun), "more than t signers");
        assert_eq!(commit(1, ask(pos, 1 << 16, &[2, 9])).await, Err(RefusalCode::SignRun), "no holder");
        let other_epoch = RunAsk { epoch: Epoch(2), ..ask(pos, 1 << 16, &[1, 2]) };
        assert_eq!(commit(1, other_epoch).await, Err(RefusalCode::SignRun));
        assert!(commit(1, ask(pos, 1 << 16, &[1, 2])).await.is_ok());
        assert_eq!(commit(1, ask(pos, 1 << 16, &[1, 2])).await, Err(RefusalCode::Duplicate), "one run for each name");
        // FROST is the algorithm of this root, whoever says what.
        let signing = members[1].signing.clone();
        let run = signing.answer(NodeIndex(1), PATH_PEER_SIGN_RUN, &ask(pos, 1 << 16 | 1, &[1, 2]).encode()).await;
        assert_eq!(run.unwrap_err().code, RefusalCode::SignRun);
        certifies_root(&cluster, &members[2].signing.sign(ROOT_CA).await.unwrap(), CaAlgorithm::Ed25519);
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

#[test]
fn replayed_and_renamed_rounds_change_nothing_and_a_revoked_app_gets_no_signature() {
    run(async {
        let cluster = Cluster::new(3, 0);
        assert_eq!(cluster.set_policy(APP), None);
        let net = Net::new();
        let members = Member::formed(&cluster, &net).await;
        let client = Client::new(&cluster, "guest");
        let claim = client.claim(&cluster, &AppKey::generate());
        // A claim that its key did not sign, one over other evidence, one that is not the one named.
        for bad in [AppPkClaim { sig: [1; 64], ..claim.clone() }, AppPkClaim { evidence: client.evidence.clone(), ..claim.clone() }] {
            assert!(claimed(&members[0], &bad).await.is_err());
        }
        net.forget();
        let row = claimed(&members[0], &claim).await.unwrap();
        identity::verify(&root_key(&cluster, RootTag::Id), &claim.object().identity_digest().unwrap(), &row.bytes.0).unwrap();

        let rounds = net.sent(PATH_PEER_SIGN_ROUND);
        assert!(rounds.len() >= 6, "three rounds each way");
        for (from, to, path, body) in &rounds {
            let target = members[usize::from(to.0) - 1].signing.clone();
            // Again, from its author: no effect. From another: refused.
            drop(target.answer(NodeIndex(from.0), path, body).await);
            let message = RoundMessage::decode(body).unwrap();
            let stranger = (1..=3).find(|i| !message.run.signers.contains(&NodeIndex(*i))).unwrap();
            assert_eq!(target.answer(NodeIndex(stranger), path, body).await.unwrap_err().code, RefusalCode::SignRun);
        }
        assert_eq!(cluster.log.read(|state| state.signed(&claim.object()).cloned()), Some(row));

        // An ask waits; the app is revoked; nobody signs.
        let other = AppKey::generate();
        let object = SignObject::AppKey { generation: Generation(0), app_id: APP, app_pk: other.public() };
        assert_eq!(cluster.govern(ActionKind::Revoke, Object::App(APP), Vec::new()), None);
        let refused = members[0].signing.sign_on(object, Basis::Claim { claim_hash: [1; 32] }, &[1]).await.unwrap_err();
        assert_eq!(refused.code, RefusalCode::AppRevoked);
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

#[test]
fn a_p256_root_signs_by_threshold_ecdsa() {
    run(async {
        let cluster = Cluster::with_ca(3, 0, CaAlgorithm::P256);
        let net = Net::new();
        let members = Member::formed(&cluster, &net).await;
        certifies_root(&cluster, &members[1].signing.sign(ROOT_CA).await.unwrap(), CaAlgorithm::P256);
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}
