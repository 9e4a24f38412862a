//! The recorder over the real state machine: group commit, duplicates, bounds, unknown outcomes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use dstack_actors::board::Board;
use dstack_actors::mailbox::FULL_RETRY_MS;
use dstack_actors::recorder::{Observed, QUEUE_MAX, Recorder};
use dstack_audit::verify_receipt;
use dstack_protocol::governance::{ActionKind, Object};
use dstack_protocol::limits::INTENT_BATCH_MAX;
use dstack_protocol::receipt::Receipt;
use dstack_protocol::release::{Intent, KeyClass, Mode};
use dstack_protocol::{AppId, Generation, NodeIndex, Refusal, RefusalCode, Wire as _};
use futures::future::join_all;
use support::cluster::{APP, Cluster};
use support::holders::recorder;
use support::log::Fault;
use support::run;

fn intent(cluster: &Cluster, nonce: u32) -> Intent {
    let mut req_hash = [0; 32];
    req_hash[..4].copy_from_slice(&nonce.to_be_bytes());
    Intent {
        req_hash,
        evidence_hash: [2; 32],
        generation: Generation(0),
        mode: Mode::Client,
        coordinator: NodeIndex(0),
        beacon_pos: cluster.latest_beacon().0,
        app_id: APP,
        wishes: vec![(KeyClass::K256, [0; 32])],
    }
}

/// Waits until so many intents wait beside a proposal in flight.
async fn queued(recorder: &Recorder, wanted: usize) {
    while recorder.observed() != (Observed { queued: wanted, in_flight: true }) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn start(cluster: &Cluster) -> Recorder {
    recorder(&cluster.log, cluster.log.node(true), cluster.author(1))
}

#[test]
fn intents_are_batched_while_a_proposal_is_in_flight() {
    run(async {
        let (cluster, _) = Cluster::with_root(3);
        let recorder = start(&cluster);
        cluster.log.close();
        let mut all = vec![recorder.record(intent(&cluster, 0), None)];
        queued(&recorder, 0).await;
        all.extend((1..=5).map(|nonce| recorder.record(intent(&cluster, nonce), None)));
        assert_eq!(recorder.observed(), Observed { queued: 5, in_flight: true });
        cluster.log.open();
        for (nonce, answer) in (0..).zip(join_all(all).await) {
            let receipt = answer.unwrap();
            verify_receipt(&receipt, &intent(&cluster, nonce)).unwrap();
        }
        assert_eq!(cluster.log.batches(), vec![1, 5]);
        while recorder.observed().in_flight {
            tokio::task::yield_now().await;
        }
        assert_eq!(recorder.observed().queued, 0);
    });
}

#[test]
fn a_batch_has_a_bound() {
    run(async {
        let (cluster, _) = Cluster::with_root(3);
        let recorder = start(&cluster);
        cluster.log.close();
        let count = u32::try_from(INTENT_BATCH_MAX + 2).unwrap();
        let mut all = vec![recorder.record(intent(&cluster, 0), None)];
        queued(&recorder, 0).await;
        all.extend((1..count).map(|nonce| recorder.record(intent(&cluster, nonce), None)));
        cluster.log.open();
        assert!(join_all(all).await.into_iter().all(|answer| answer.is_ok()));
        assert_eq!(cluster.log.batches(), vec![1, INTENT_BATCH_MAX, 1]);
    });
}

#[test]
fn duplicates_get_the_same_receipt_and_one_leaf() {
    run(async {
        let (cluster, _) = Cluster::with_root(3);
        let recorder = start(&cluster);
        let size = cluster.log.size();
        cluster.log.close();
        let twice: Vec<_> = [9, 1, 1, 1].map(|nonce| recorder.record(intent(&cluster, nonce), None)).into();
        cluster.log.open();
        let receipts: Vec<Receipt> = join_all(twice).await.into_iter().map(Result::unwrap).collect();
        let later = recorder.record(intent(&cluster, 1), None).await.unwrap();
        assert!(receipts[1..].iter().all(|receipt| *receipt == later));
        assert_ne!(receipts[0], later);
        assert_eq!(cluster.log.size(), size + 2);
    });
}

#[test]
fn a_full_queue_refuses_early_and_recovers() {
    run(async {
        let (cluster, _) = Cluster::with_root(3);
        let recorder = start(&cluster);
        cluster.log.close();
        let flood = u32::try_from(QUEUE_MAX).unwrap() + 11;
        let mut all = vec![recorder.record(intent(&cluster, 0), None)];
        queued(&recorder, 0).await;
        all.extend((1..flood).map(|nonce| recorder.record(intent(&cluster, nonce), None)));
        assert_eq!(recorder.observed().queued, QUEUE_MAX);
        // Refused at once, although nothing moves.
        let refusal = recorder.record(intent(&cluster, 1_000_000), None).await.unwrap_err();
        assert_eq!((refusal.code, refusal.retry_after_ms), (RefusalCode::Overloaded, FULL_RETRY_MS));
        cluster.log.open();
        let answers = join_all(all).await;
        let refused: Vec<&Refusal> = answers.iter().filter_map(|answer| answer.as_ref().err()).collect();
        assert!(refused.iter().all(|refusal| refusal.code == RefusalCode::Overloaded && refusal.retry_after_ms == FULL_RETRY_MS));
        assert_eq!(refused.len(), 10, "one in flight and a full queue are served, the rest refused");
        recorder.record(intent(&cluster, 1_000_000), None).await.unwrap();
    });
}

#[test]
fn an_unknown_outcome_is_told_and_a_retry_is_recorded_once() {
    run(async {
        let (cluster, _) = Cluster::with_root(3);
        let recorder = start(&cluster);
        for (nonce, fault, leaves) in [(1, Fault::Unanswered, 1), (2, Fault::Lost, 0)] {
            let size = cluster.log.size();
            cluster.log.fault(fault);
            let refusal = recorder.record(intent(&cluster, nonce), None).await.unwrap_err();
            assert_eq!(refusal.code, RefusalCode::DeadlineExceeded);
            assert!(refusal.code.retryable());
            assert_eq!(cluster.log.size(), size + leaves, "{fault:?}");
            let receipt = recorder.record(intent(&cluster, nonce), None).await.unwrap();
            verify_receipt(&receipt, &intent(&cluster, nonce)).unwrap();
            assert_eq!(receipt.record.pos, size);
            assert_eq!(cluster.log.size(), size + 1, "recorded once: {fault:?}");
        }
    });
}

#[test]
fn a_rejected_intent_does_not_take_its_batch_with_it() {
    run(async {
        let (cluster, _) = Cluster::with_root(3);
        let recorder = start(&cluster);
        cluster.log.close();
        let mut unknown = intent(&cluster, 2);
        unknown.app_id = AppId([9; 20]);
        let all: Vec<_> =
            [intent(&cluster, 0), intent(&cluster, 1), unknown, intent(&cluster, 3)].map(|intent| recorder.record(intent, None)).into();
        cluster.log.open();
        let answers = join_all(all).await;
        let codes: Vec<_> = answers.iter().map(|answer| answer.as_ref().err().map(|refusal| refusal.code)).collect();
        assert_eq!(codes, vec![None, None, Some(RefusalCode::AppUnknown), None]);
    });
}

#[test]
fn after_a_restart_receipts_come_from_the_audit_log() {
    run(async {
        let (cluster, _) = Cluster::with_root(3);
        let before = start(&cluster).record(intent(&cluster, 1), None).await.unwrap();
        start(&cluster).record(intent(&cluster, 2), None).await.unwrap();
        let leaves = Arc::clone(&cluster.log);
        let restarted = Recorder::new(
            cluster.author(1),
            cluster.log.node(true),
            Arc::new(Board::default()),
            Arc::new(move |intent| leaves.rebuild(intent)),
        );
        let again = restarted.record(intent(&cluster, 1), None).await.unwrap();
        verify_receipt(&again, &intent(&cluster, 1)).unwrap();
        assert_eq!(again.record, before.record);
        assert!(again.size > before.size, "the tree has grown since");
    });
}

#[test]
fn a_node_without_the_leaf_says_that_it_is_behind() {
    run(async {
        let (cluster, _) = Cluster::with_root(3);
        let amnesiac = Recorder::new(cluster.author(1), cluster.log.node(true), Arc::new(Board::default()), Arc::new(|_| None));
        let refusal = amnesiac.record(intent(&cluster, 1), None).await.unwrap_err();
        assert_eq!(refusal.code, RefusalCode::NotYet);
        assert!(refusal.retry_after_ms > 0);
        start(&cluster).record(intent(&cluster, 1), None).await.unwrap();
    });
}

#[test]
fn what_this_node_combines_is_recorded_under_its_signature() {
    run(async {
        let (cluster, _) = Cluster::with_root(3);
        assert_eq!(cluster.govern(ActionKind::SetAppPolicy, Object::App(APP), Cluster::legacy_policy().encode()), None);
        let recorder = start(&cluster);
        cluster.log.close();
        let of_node = |nonce: u32, node: u16| Intent { mode: Mode::Legacy, coordinator: NodeIndex(node), ..intent(&cluster, nonce) };
        let mut all = vec![recorder.record(intent(&cluster, 0), None)];
        queued(&recorder, 0).await;
        // One batch: clients' and its own, and one in another's name, which its key cannot speak for.
        let waiting = [intent(&cluster, 1), of_node(2, 1), of_node(3, 2), of_node(4, 1)];
        all.extend(waiting.iter().map(|intent| recorder.record(intent.clone(), None)));
        cluster.log.open();
        let answers: Vec<_> = join_all(all).await;
        let codes: Vec<_> = answers.iter().map(|answer| answer.as_ref().err().map(|refusal| refusal.code)).collect();
        assert_eq!(codes, [None, None, None, Some(RefusalCode::NotTheCoordinator), None]);
        assert_eq!(cluster.log.batches(), vec![1, 4]);
        for (intent, answer) in waiting.iter().zip(&answers[1..]).filter(|(_, answer)| answer.is_ok()) {
            verify_receipt(answer.as_ref().unwrap(), intent).unwrap();
        }
    });
}
