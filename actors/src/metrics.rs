//! Metrics of this crate. Owns: their names and closed label sets.

use std::time::Duration;

use dstack_protocol::{RefusalCode, RootTag};

/// `(name, kind, labels, meaning)` of every metric here.
pub const METRICS: &[(&str, &str, &str, &str)] = &[
    ("kms_actors_overload_total", "counter", "actor", "Messages refused because a mailbox was full."),
    (
        "kms_actors_stage_seconds",
        "histogram",
        "stage",
        "Time of one stage of a release: verify, decide, record, partials, evaluate, total; combine in modes L and E; sign_step of an ECDSA run.",
    ),
    ("kms_actors_releases_total", "counter", "outcome", "Releases coordinated here; outcome is ok or the refusal's code."),
    ("kms_actors_partials_total", "counter", "outcome", "Partials asked of this holder; outcome is ok or the refusal's code."),
    ("kms_actors_batch_intents", "histogram", "", "Intents in one proposal."),
    ("kms_actors_hedges_total", "counter", "", "Holders asked because partials of others were late."),
    (
        "kms_actors_wrong_partials_total",
        "counter",
        "",
        "Partials dropped while this node combined in mode L or E; the log names the holders.",
    ),
    (
        "kms_actors_combinations_total",
        "counter",
        "how",
        "Keys combined here in modes L and E: proven; known, compared with what was proven before; mismatch, proven after that.",
    ),
    (
        "kms_actors_authority_total",
        "counter",
        "outcome",
        "What this node's authority said: yes, no, lease where a yes was still believed, shared where the guest was asked about already, error where no answer of the protocol came. Alarm on error.",
    ),
    ("kms_actors_releases_running", "gauge", "", "Releases under way here."),
    ("kms_actors_signatures_total", "counter", "root outcome", "Signatures coordinated here; outcome is ok or the refusal's code."),
    ("kms_actors_signature_seconds", "histogram", "root", "Time from the wish for a signature to its row in the log."),
    (
        "kms_actors_signing_attempts_total",
        "counter",
        "root outcome",
        "Attempts of signatures coordinated here: ok or failed. Failed ones are tried again with other signers.",
    ),
    (
        "kms_actors_signing_runs_total",
        "counter",
        "root outcome",
        "ECDSA runs that this holder took part in; outcome is ok, timeout or the refusal's code.",
    ),
    (
        "kms_actors_pairs_redone_total",
        "counter",
        "root outcome",
        "Setups of a pair whose secrets were lost, at either end; outcome is ok or the refusal's code.",
    ),
    (
        "kms_actors_signers_misbehaved_total",
        "counter",
        "root",
        "Wrong messages of signers or in a pairwise setup. Alarm on any: the log names the node.",
    ),
];

/// Text of an outcome.
pub(crate) fn outcome<T>(result: &Result<T, dstack_protocol::Refusal>) -> &'static str {
    result.as_ref().err().map_or("ok", |refusal| RefusalCode::text(refusal.code))
}

pub(crate) fn overload(actor: &'static str) {
    metrics::counter!("kms_actors_overload_total", "actor" => actor).increment(1);
}

/// Notes how long a stage took.
pub fn stage(stage: &'static str, took: Duration) {
    metrics::histogram!("kms_actors_stage_seconds", "stage" => stage).record(took.as_secs_f64());
}

pub(crate) fn release(outcome: &'static str) {
    metrics::counter!("kms_actors_releases_total", "outcome" => outcome).increment(1);
}

pub(crate) fn partial(outcome: &'static str) {
    metrics::counter!("kms_actors_partials_total", "outcome" => outcome).increment(1);
}

pub(crate) fn hedged(holders: u64) {
    metrics::counter!("kms_actors_hedges_total").increment(holders);
}

pub(crate) fn wrong_partials(count: usize) {
    metrics::counter!("kms_actors_wrong_partials_total").increment(u64::try_from(count).unwrap_or(u64::MAX));
}

pub(crate) fn combined(how: &'static str) {
    metrics::counter!("kms_actors_combinations_total", "how" => how).increment(1);
}

pub(crate) fn authority(outcome: &'static str) {
    metrics::counter!("kms_actors_authority_total", "outcome" => outcome).increment(1);
}

pub(crate) fn batch(intents: usize) {
    metrics::histogram!("kms_actors_batch_intents").record(u32::try_from(intents).map_or(f64::MAX, f64::from));
}

pub(crate) fn running(change: f64) {
    metrics::gauge!("kms_actors_releases_running").increment(change);
}

pub(crate) fn signature(root: RootTag, outcome: &'static str, took: Duration) {
    metrics::counter!("kms_actors_signatures_total", "root" => root.name(), "outcome" => outcome).increment(1);
    metrics::histogram!("kms_actors_signature_seconds", "root" => root.name()).record(took.as_secs_f64());
}

pub(crate) fn signing_attempt(root: RootTag, ok: bool) {
    let outcome = if ok { "ok" } else { "failed" };
    metrics::counter!("kms_actors_signing_attempts_total", "root" => root.name(), "outcome" => outcome).increment(1);
}

pub(crate) fn signing_run(root: RootTag, outcome: &'static str) {
    metrics::counter!("kms_actors_signing_runs_total", "root" => root.name(), "outcome" => outcome).increment(1);
}

pub(crate) fn pair_redone(root: RootTag, outcome: &'static str) {
    metrics::counter!("kms_actors_pairs_redone_total", "root" => root.name(), "outcome" => outcome).increment(1);
}

pub(crate) fn misbehaved(root: RootTag) {
    metrics::counter!("kms_actors_signers_misbehaved_total", "root" => root.name()).increment(1);
}
