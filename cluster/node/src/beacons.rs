//! Beacons: the leader collects clock readings and proposes them; every voter reads its clock when asked.
//!
//! Owns: when a beacon is due. Never: sets log time (`apply` does). Source: threshold.md §2.6 "Beacons and log time".

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dstack_actors::ports::{Log, Now, Peers, read};
use dstack_protocol::codec::Reader;
use dstack_protocol::command::Command;
use dstack_protocol::limits::BEACON_EVERY_MS;
use dstack_protocol::log::{BeaconBody, Reading};
use dstack_protocol::rpc::{ClockAsk, PATH_PEER_CLOCK};
use dstack_protocol::{ClusterId, NodeIndex, Refusal, RefusalCode, Seat, Wire};
use dstack_raft::machine::view;
use dstack_threshold::message::{NodeKey, verify};
use tracing::{debug, warn};

const LOOK_EVERY: Duration = Duration::from_millis(200);
const READ_TIMEOUT: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(5);
/// While an action's timelock has ended by this node's clock, log time moves this often.
const HURRY: Duration = Duration::from_secs(1);

/// See the module text.
pub(crate) struct Beacons {
    /// Cluster.
    pub(crate) cluster_id: ClusterId,
    /// This node's seat.
    pub(crate) seat: Seat,
    /// This node's key.
    pub(crate) node_key: Arc<NodeKey>,
    /// The log.
    pub(crate) log: Arc<dyn Log>,
    /// Other nodes.
    pub(crate) peers: Arc<dyn Peers>,
    /// Their seats.
    pub(crate) others: Vec<Seat>,
    /// Own clock.
    pub(crate) now: Now,
}

struct Due {
    ask: ClockAsk,
    voters: BTreeMap<NodeIndex, [u8; 32]>,
    t: usize,
    hurry: bool,
}

impl Beacons {
    /// Reads this node's clock for the leader.
    ///
    /// # Errors
    /// [`RefusalCode::NotYet`] when this node has another latest beacon.
    pub(crate) fn reading(&self, ask: ClockAsk) -> Result<Reading, Refusal> {
        let (key, seat) = (self.node_key.public(), self.seat);
        let (latest, index) = read(&*self.log, |state| {
            let latest = view::latest_beacon(state).map_or((0, self.cluster_id.0), |(pos, row)| (pos, row.value));
            (latest, state.seats.get(&seat).filter(|row| row.node_key == key).map(|row| row.index))
        })?;
        if latest != (ask.prev_beacon_pos, ask.prev_beacon) {
            let expected = format!("beacon at {}", latest.0);
            return Err(Refusal::new(RefusalCode::NotYet, expected, format!("beacon at {}", ask.prev_beacon_pos)).retry_after(100));
        }
        let index = index.ok_or_else(|| Refusal::new(RefusalCode::NotAdmitted, "an admitted key", "this node is not admitted yet"))?;
        let mut rand = [0u8; 32];
        getrandom::fill(&mut rand).map_err(|error| Refusal::new(RefusalCode::Internal, "randomness", error.to_string()))?;
        let mut reading = Reading {
            prev_beacon_pos: ask.prev_beacon_pos,
            prev_beacon: ask.prev_beacon,
            index,
            unix_ms: (self.now)(),
            rand,
            sig: [0; 64],
        };
        reading.sig = self.node_key.sign(&reading.signed_bytes(&self.cluster_id));
        Ok(reading)
    }

    /// Proposes beacons while this node leads: on election, every 30 s.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut led = false;
        let mut last = Instant::now();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let leads = self.log.leads();
            let elected = leads && !led;
            led = leads;
            if !leads {
                continue;
            }
            let Ok(Some(due)) = read(&*self.log, |state| self.due(state)) else { continue };
            let every = if due.hurry { HURRY } else { Duration::from_millis(BEACON_EVERY_MS) };
            let first = due.ask.prev_beacon_pos == 0;
            if !elected && !first && last.elapsed() < every {
                continue;
            }
            match self.propose(&due).await {
                Ok(()) => last = Instant::now(),
                Err(refusal) if refusal.code.retryable() => {
                    debug!(code = %refusal.code, got = refusal.got, "beacon not made");
                    // Asked again soon, not at every look.
                    last = Instant::now().checked_sub(every.saturating_sub(Duration::from_secs(1))).unwrap_or(last);
                }
                Err(refusal) => warn!(code = %refusal.code, expected = refusal.expected, got = refusal.got, "beacon refused"),
            }
        }
    }

    fn due(&self, state: &dstack_protocol::state::State) -> Option<Due> {
        let voters = view::signers(state)?.keys;
        let (prev_beacon_pos, prev_beacon) = view::latest_beacon(state).map_or((0, self.cluster_id.0), |(pos, row)| (pos, row.value));
        let timelock_ms = state.governance.timelock_s.saturating_mul(1000);
        let now = (self.now)();
        let ended = |since| now.since(since) >= timelock_ms;
        let hurry = state.governance.pending.values().filter_map(|row| row.ready_since).any(ended) || state.attempt.is_some();
        Some(Due { ask: ClockAsk { prev_beacon_pos, prev_beacon }, voters, t: view::beacon_threshold(state), hurry })
    }

    /// Whether `apply` would count a reading: one that it refuses would take the whole beacon with it.
    fn counts(&self, due: &Due, reading: &Reading) -> bool {
        let current = (reading.prev_beacon_pos, reading.prev_beacon) == (due.ask.prev_beacon_pos, due.ask.prev_beacon);
        let key = due.voters.get(&reading.index);
        current && key.is_some_and(|key| verify(key, &reading.signed_bytes(&self.cluster_id), &reading.sig))
    }

    async fn propose(&self, due: &Due) -> Result<(), Refusal> {
        let own = self.reading(due.ask)?;
        let mut by_index = BTreeMap::from([(own.index, own)]);
        let asked = self.others.iter().map(|seat| self.peers.post(*seat, PATH_PEER_CLOCK, due.ask.encode(), READ_TIMEOUT));
        for answer in futures::future::join_all(asked).await.into_iter().flatten() {
            let mut reader = Reader::new(&answer);
            if let Ok((cluster_id, reading)) = Reading::read(&mut reader)
                && reader.finish().is_ok()
                && cluster_id == self.cluster_id
                && self.counts(due, &reading)
            {
                by_index.entry(reading.index).or_insert(reading);
            }
        }
        if by_index.len() < due.t {
            return Err(Refusal::new(RefusalCode::TooFewReadings, due.t.to_string(), by_index.len().to_string()).retry_after(500));
        }
        // The leader picks whose: the latest t, so that one slow clock does not hold time back.
        let mut readings: Vec<Reading> = by_index.into_values().collect();
        readings.sort_by_key(|reading| std::cmp::Reverse(reading.unix_ms));
        readings.truncate(due.t);
        readings.sort_by_key(|reading| reading.index);
        let command = Command::Beacon(BeaconBody { cluster_id: self.cluster_id, readings });
        let answer = self.log.propose(command, PATIENCE).await?;
        match answer.outcomes.first().and_then(|outcome| RefusalCode::from_number(outcome.code)) {
            None => Ok(()),
            Some(code) => Err(Refusal::new(code, "a beacon that the log accepts", "rejected")),
        }
    }
}

#[cfg(test)]
mod tests;
