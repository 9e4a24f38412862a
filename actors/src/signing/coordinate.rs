//! A coordinator's side: picks `t` holders, drives a run, turns to others when one is late, silent or wrong.
//!
//! Owns: who is asked, when the next attempt begins. Never: a share; it sees commitments, signature shares, signatures.
//! Source: threshold.md §5.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dstack_protocol::limits::SIGN_RUN_MS_MAX;
use dstack_protocol::rpc::{PATH_PEER_SIGN_COMMIT, PATH_PEER_SIGN_RUN, PATH_PEER_SIGN_SHARE};
use dstack_protocol::{NodeIndex, Refusal, RefusalCode, Seat, Wire};
use dstack_threshold::group::Edwards25519;
use dstack_threshold::sign::Holders;
use dstack_threshold::sign::frost::{self, FrostError};
use futures::StreamExt as _;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use tracing::{debug, warn};

use super::Signing;
use super::signer::Signer;
use super::subject::{Algorithm, Subject};
use super::wire::{RunAsk, ShareAsk};
use crate::metrics;

/// How long a signature is tried for.
const TRY_FOR: Duration = Duration::from_secs(30);
/// Attempts at once: a second one with other signers begins when the first is late.
const AT_ONCE: usize = 2;
const HEDGE_FROST: Duration = Duration::from_millis(700);
const HEDGE_ECDSA: Duration = Duration::from_millis(2500);
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(150);

/// Why an attempt gave nothing.
struct Failure {
    signers: Vec<NodeIndex>,
    /// Who is to be left out: provably wrong, or did not answer.
    avoid: Vec<NodeIndex>,
    refusal: Refusal,
}

/// What speaks against a holder: the higher, the later it is picked.
type Marks = BTreeMap<NodeIndex, u32>;

impl Signing {
    /// Runs attempts until one gives what the log stores.
    pub(super) async fn sign_now(&self, subject: &Subject, claim: &[u8]) -> Result<Vec<u8>, Refusal> {
        let hedge = if subject.algorithm() == Algorithm::Frost { HEDGE_FROST } else { HEDGE_ECDSA };
        let until = tokio::time::Instant::now() + TRY_FOR;
        let mut marks = Marks::new();
        let mut running = FuturesUnordered::new();
        let mut sets: Vec<Vec<NodeIndex>> = Vec::new();
        let mut last = Refusal::new(RefusalCode::NotEnoughPartials, format!("{} signers", subject.threshold), "none answered");
        let mut begin = true;
        loop {
            if begin && running.len() < AT_ONCE {
                let signers = self.choose(subject, &marks)?;
                sets.push(signers.clone());
                running.push(self.attempt(subject, claim, signers));
            }
            tokio::select! {
                biased;
                ended = running.next(), if !running.is_empty() => match ended {
                    Some(Ok(bytes)) => return Ok(bytes),
                    Some(Err(failure)) => {
                        debug!(signers = ?failure.signers, avoid = ?failure.avoid, code = %failure.refusal.code, got = failure.refusal.got, "signing attempt failed");
                        sets.retain(|set| *set != failure.signers);
                        for index in failure.signers.iter().chain(failure.avoid.iter().flat_map(|index| [index; 4])) {
                            *marks.entry(*index).or_default() += 1;
                        }
                        last = failure.refusal;
                        begin = true;
                        tokio::time::sleep(PAUSE).await;
                    }
                    None => begin = true,
                },
                () = tokio::time::sleep(hedge) => {
                    // Whoever is in an attempt that is late is picked last.
                    for index in sets.iter().flatten() {
                        *marks.entry(*index).or_default() += 1;
                    }
                    begin = true;
                }
                () = tokio::time::sleep_until(until) => return Err(last.retry_after(500)),
            }
            if tokio::time::Instant::now() >= until {
                return Err(last.retry_after(500));
            }
        }
    }

    /// `t` holders: those with the fewest marks, this node before others, the nearest first.
    fn choose(&self, subject: &Subject, marks: &Marks) -> Result<Vec<NodeIndex>, Refusal> {
        let parts = self.signer.parts();
        let distance = |seat: Seat| {
            if seat == parts.seat { Some(Duration::ZERO) } else { parts.peers.latency(seat) }
        };
        let root = subject.under.root;
        let own_signs = self.can_sign(root);
        // With these this node can make no run: what it knows of itself needs no try.
        let apart = if own_signs { [parts.shares.expelled(root), self.pairs_missing(root)].concat() } else { Vec::new() };
        let mut holders: Vec<(bool, u32, bool, Option<Duration>, NodeIndex)> = subject
            .seats
            .iter()
            .map(|(index, seat)| {
                let lost = *seat == parts.seat && !own_signs || apart.contains(index);
                let distance = distance(*seat);
                (lost, marks.get(index).copied().unwrap_or(0), distance.is_none(), distance, *index)
            })
            .collect();
        holders.sort_unstable();
        let mut signers: Vec<NodeIndex> = holders.into_iter().take(usize::from(subject.threshold)).map(|(.., index)| index).collect();
        signers.sort_unstable();
        if signers.len() < usize::from(subject.threshold) {
            let expected = format!("{} holders with a seat", subject.threshold);
            return Err(Refusal::new(RefusalCode::NotEnoughPartials, expected, signers.len().to_string()).retry_after(1000));
        }
        Ok(signers)
    }

    async fn attempt(&self, subject: &Subject, claim: &[u8], signers: Vec<NodeIndex>) -> Result<Vec<u8>, Failure> {
        let failed = |avoid: Vec<NodeIndex>, refusal: Refusal| Failure { signers: signers.clone(), avoid, refusal };
        let attempt = self.next_attempt().map_err(|refusal| failed(Vec::new(), refusal))?;
        let ask = RunAsk {
            key: subject.ask.object.key(),
            ask_pos: subject.ask.pos,
            epoch: subject.under.epoch,
            attempt,
            signers: signers.clone(),
            claim: claim.to_vec(),
        };
        let outcome = match subject.algorithm() {
            Algorithm::Frost => self.frost(subject, &ask).await,
            Algorithm::Ecdsa => self.ecdsa(subject, &ask).await,
        };
        let stored = outcome.and_then(|signature| subject.stored(&signature).map_err(|refusal| (Vec::new(), refusal)));
        let checked = stored.and_then(|bytes| subject.check_stored(&bytes).map(|()| bytes).map_err(|refusal| (Vec::new(), refusal)));
        metrics::signing_attempt(subject.under.root, checked.is_ok());
        checked.map_err(|(avoid, refusal)| failed(avoid, refusal))
    }

    /// Two rounds: commitments of all signers, then their shares.
    async fn frost(&self, subject: &Subject, ask: &RunAsk) -> Result<Vec<u8>, (Vec<NodeIndex>, Refusal)> {
        let run = subject.run(ask.epoch, ask.attempt, &ask.signers).map_err(|refusal| (Vec::new(), refusal))?;
        let holders = Holders::<Edwards25519>::new(subject.threshold, &subject.public_key, &subject.verification_keys)
            .map_err(|error| (Vec::new(), Refusal::new(RefusalCode::Internal, "a root's public side", error.to_string())))?;
        let commitments = self.of_all(subject, &ask.signers, PATH_PEER_SIGN_COMMIT, ask.encode()).await?;
        let of_frost = |error: &FrostError| {
            let culprit: Vec<NodeIndex> = error.culprit().into_iter().collect();
            for index in &culprit {
                metrics::misbehaved(subject.under.root);
                warn!(root = subject.under.root.name(), peer_id = index.0, %error, "signer named");
            }
            (culprit, Refusal::new(RefusalCode::SignRun, "a FROST run to its end", error.to_string()))
        };
        let package = frost::package(&run, &commitments).map_err(|error| of_frost(&error))?;
        let share = ShareAsk { sign_id: run.id(), package: package.clone() };
        let shares = self.of_all(subject, &ask.signers, PATH_PEER_SIGN_SHARE, share.encode()).await?;
        let message = subject.message();
        let signature = tokio::task::spawn_blocking(move || frost::aggregate(&holders, &run, &message, &package, &shares)).await;
        let internal = |what: String| (Vec::new(), Refusal::new(RefusalCode::Internal, "a combined signature", what));
        signature.map_err(|error| internal(error.to_string()))?.map(|bytes| bytes.to_vec()).map_err(|error| of_frost(&error))
    }

    /// The answers of all signers, or who did not give one.
    async fn of_all(
        &self,
        subject: &Subject,
        signers: &[NodeIndex],
        path: &'static str,
        body: Vec<u8>,
    ) -> Result<Vec<(NodeIndex, Vec<u8>)>, (Vec<NodeIndex>, Refusal)> {
        let asked = signers.iter().map(|index| {
            let body = body.clone();
            async move { (*index, self.call(subject, *index, path, body, STEP_TIMEOUT).await) }
        });
        let mut answers = Vec::new();
        let (mut silent, mut why) = (Vec::new(), None);
        for (index, answer) in join_all(asked).await {
            match answer {
                Ok(bytes) => answers.push((index, bytes)),
                Err(refusal) => {
                    silent.push(index);
                    why = Some(refusal);
                }
            }
        }
        match why {
            None => Ok(answers),
            Some(refusal) => Err((silent, refusal)),
        }
    }

    /// Every signer is asked to take part; the first that has the signature gives it.
    async fn ecdsa(&self, subject: &Subject, ask: &RunAsk) -> Result<Vec<u8>, (Vec<NodeIndex>, Refusal)> {
        let body = ask.encode();
        let mut asked: FuturesUnordered<_> = ask
            .signers
            .iter()
            .map(|index| {
                let body = body.clone();
                async move { (*index, self.call(subject, *index, PATH_PEER_SIGN_RUN, body, Duration::from_millis(SIGN_RUN_MS_MAX)).await) }
            })
            .collect();
        // A run needs all its signers: the first that fails ends the wait, and those that still run are not to blame.
        let none = || (Vec::new(), Refusal::new(RefusalCode::SignRun, "signers", "none"));
        let (index, answer) = asked.next().await.ok_or_else(none)?;
        match answer {
            Ok(signature) if subject.stored(&signature).and_then(|bytes| subject.check_stored(&bytes)).is_ok() => Ok(signature),
            Ok(_) => {
                metrics::misbehaved(subject.under.root);
                warn!(root = subject.under.root.name(), peer_id = index.0, "signer gives a signature that does not verify");
                Err((vec![index], Refusal::new(RefusalCode::SignatureInvalid, "a signature", "one that does not verify")))
            }
            Err(refusal) => {
                // Refused at once, or not reached: that node. Ended in the middle: any of them.
                let alone = matches!(
                    refusal.code,
                    RefusalCode::NotReady | RefusalCode::Overloaded | RefusalCode::ShareLost | RefusalCode::NotYet | RefusalCode::ClockSkew
                );
                Err((if alone { vec![index] } else { Vec::new() }, refusal))
            }
        }
    }

    async fn call(
        &self,
        subject: &Subject,
        index: NodeIndex,
        path: &'static str,
        body: Vec<u8>,
        timeout: Duration,
    ) -> Result<Vec<u8>, Refusal> {
        let signer: &Arc<Signer> = &self.signer;
        let parts = signer.parts();
        let no_seat = || Refusal::new(RefusalCode::SignRun, "a signer with a seat", index.to_string());
        let seat = *subject.seats.get(&index).ok_or_else(no_seat)?;
        if seat != parts.seat {
            return parts.peers.post(seat, path, body, timeout).await;
        }
        self.answer(index, path, &body).await
    }
}
