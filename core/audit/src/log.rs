//! The offline judge of a whole log: every record, every body at hand, every certificate beside it.
//! Owns: the rules that a log must keep by itself. Never: re-decides policy or evidence; what a refusal code means is not its business.
//! Source: threshold.md §2.6. It walks the log once and keeps the frontier, recent beacons and recent intents only.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use dstack_protocol::coordinated::CoordinatorWord;
use dstack_protocol::genesis::Genesis;
use dstack_protocol::limits::{BEACON_FRESH_MS_MAX, INTENT_ROW_MS_MAX};
use dstack_protocol::log::{BeaconBody, Head, HeadCert, Record, RecordKind, body_hash};
use dstack_protocol::release::{Intent, Mode};
use dstack_protocol::{ClusterId, Epoch, NodeIndex, UnixMillis, Wire};

use crate::error::AuditError;
use crate::fork::Fork;
use crate::frontier::Frontier;
use crate::members::SignerHistory;
use crate::signers::{CertifiedHead, SignerSet};
use crate::tree::{Hash, leaf_hash};

/// What a log that passed holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogReport {
    /// Leaves.
    pub size: u64,
    /// Root of all of them.
    pub log_root: Hash,
    /// Log time after the last.
    pub log_time: UnixMillis,
    /// Epoch after the last.
    pub epoch: Epoch,
    /// Version of the signer list in force; `None` before genesis is complete.
    pub members_version: Option<u64>,
    /// Records of each kind by name: applied, rejected.
    pub kinds: BTreeMap<&'static str, (u64, u64)>,
    /// Intents of each mode by name: applied, rejected; those whose body was at hand.
    pub intents: BTreeMap<&'static str, (u64, u64)>,
    /// Applied intents of modes L and E by the node that combined them, each under that node's own signature.
    pub combined: BTreeMap<NodeIndex, u64>,
    /// Records whose body was not at hand; their hash stands in the record, their content was not judged.
    pub bodies_missing: u64,
    /// Certificates that were verified.
    pub certificates: u64,
    /// Highest certified size: no minority can have altered anything below. What follows rests on this node alone.
    pub certified_size: u64,
}

/// Checks a log record by record.
#[derive(Debug)]
pub struct LogVerifier {
    cluster_id: ClusterId,
    certificates: BTreeMap<u64, Vec<HeadCert>>,
    frontier: Frontier,
    log_time: UnixMillis,
    epoch: Epoch,
    genesis: Option<(u16, SignerHistory)>,
    beacons: VecDeque<Beacon>,
    intents: BTreeMap<[u8; 32], UnixMillis>,
    intents_by_time: VecDeque<(UnixMillis, [u8; 32])>,
    kinds: BTreeMap<&'static str, (u64, u64)>,
    modes: BTreeMap<&'static str, (u64, u64)>,
    word: Word,
    combined: BTreeMap<NodeIndex, u64>,
    bodies_missing: u64,
    admissions_missing: bool,
    judged: u64,
    certified_size: u64,
}

/// Who speaks for the intents of modes L and E that follow.
#[derive(Debug)]
enum Word {
    Nobody,
    /// A node, whose word was compacted.
    Missing,
    Of(NodeIndex, BTreeSet<[u8; 32]>),
}

#[derive(Debug, Clone, Copy)]
struct Beacon {
    pos: u64,
    value: Hash,
    log_time: UnixMillis,
}

/// Judges the log of one node: `(record, body)` in order, with the certificates kept beside it. A body may be missing where it was
/// compacted; the genesis document may not.
///
/// # Errors
/// The first rule that the log breaks; [`AuditError::Fork`] carries both sides.
pub fn verify_log<R: AsRef<[u8]>, B: AsRef<[u8]>>(
    cluster_id: ClusterId,
    certificates: impl IntoIterator<Item = HeadCert>,
    records: impl IntoIterator<Item = (R, Option<B>)>,
) -> Result<LogReport, AuditError> {
    let mut verifier = LogVerifier::new(cluster_id, certificates);
    for (record, body) in records {
        verifier.push(record.as_ref(), body.as_ref().map(AsRef::as_ref))?;
    }
    verifier.finish()
}

impl LogVerifier {
    /// Before the first record.
    #[must_use]
    pub fn new(cluster_id: ClusterId, certificates: impl IntoIterator<Item = HeadCert>) -> Self {
        let mut by_size: BTreeMap<u64, Vec<HeadCert>> = BTreeMap::new();
        for certificate in certificates {
            by_size.entry(certificate.head.size).or_default().push(certificate);
        }
        Self {
            cluster_id,
            certificates: by_size,
            frontier: Frontier::new(),
            log_time: UnixMillis(0),
            epoch: Epoch(0),
            genesis: None,
            beacons: VecDeque::new(),
            intents: BTreeMap::new(),
            intents_by_time: VecDeque::new(),
            kinds: BTreeMap::new(),
            modes: BTreeMap::new(),
            word: Word::Nobody,
            combined: BTreeMap::new(),
            bodies_missing: 0,
            admissions_missing: false,
            judged: 0,
            certified_size: 0,
        }
    }

    /// Takes the next record and its body, if at hand.
    ///
    /// # Errors
    /// The rule that it breaks; then the verifier is of no further use.
    pub fn push(&mut self, record_bytes: &[u8], body: Option<&[u8]>) -> Result<(), AuditError> {
        let pos = self.frontier.size();
        let rule = |rule| AuditError::LogRule { pos, rule };
        let record = Record::decode(record_bytes).map_err(|source| AuditError::Undecodable { pos, source })?;
        if record.pos != pos {
            return Err(rule("positions count up from 0 without a gap"));
        }
        if (record.kind == RecordKind::Genesis) != (pos == 0) {
            return Err(rule("the genesis document is record 0 and no other"));
        }
        if body.is_some_and(|body| body_hash(record.kind, body) != record.body_hash) {
            return Err(rule("the body is not the one that was recorded"));
        }
        let applied = record.outcome == 0;
        let log_time = match (record.kind, body) {
            (RecordKind::Beacon, Some(body)) if applied => self.beacon_time(pos, body)?,
            (RecordKind::Beacon, None) if applied => self.log_time.max(record.log_time),
            _ => self.log_time,
        };
        if record.log_time != log_time {
            return Err(rule("log time moves by beacons only, to the least of their readings, and never back"));
        }
        if record.epoch != self.epoch && !(applied && matches!(record.kind, RecordKind::Ceremony | RecordKind::Governance)) {
            return Err(rule("the epoch changes by ceremonies and new generations only"));
        }
        self.log_time = log_time;
        self.epoch = record.epoch;
        if record.kind != RecordKind::Intent {
            self.word = Word::Nobody;
        }
        match (record.kind, body) {
            (RecordKind::Genesis, body) => self.genesis(pos, applied, body)?,
            (RecordKind::Admission, Some(body)) if applied => self.history(pos)?.admission(pos, body)?,
            (RecordKind::Admission, None) => self.admissions_missing |= applied,
            (RecordKind::Intent, Some(body)) if applied => self.intent(pos, body)?,
            (RecordKind::Intent, Some(body)) => self.refused_intent(body),
            (RecordKind::Coordinator, body) => self.coordinator(pos, body)?,
            _ => {}
        }
        self.bodies_missing += u64::from(body.is_none());
        count(&mut self.kinds, record.kind.name(), applied);

        self.frontier.append(leaf_hash(record_bytes))?;
        if record.kind == RecordKind::Beacon && applied {
            self.beacons.push_back(Beacon { pos, value: self.frontier.root(), log_time });
        }
        self.forget();
        self.judge_certificates()
    }

    /// Ends the log.
    ///
    /// # Errors
    /// [`AuditError::LogTooShort`] if a certificate covers more; [`AuditError::LogRule`] for an empty log.
    pub fn finish(self) -> Result<LogReport, AuditError> {
        let have = self.frontier.size();
        if let Some(need) = self.certificates.last_key_value().map(|(size, _)| *size) {
            // Only a head of size 0 can be left below the end: nobody signs one.
            let nobody = AuditError::UnknownMembers { members_version: 0, size: need };
            return Err(if need > have { AuditError::LogTooShort { need, have } } else { nobody });
        }
        let Some((_, history)) = self.genesis else {
            return Err(AuditError::LogRule { pos: 0, rule: "a log begins with its genesis document" });
        };
        Ok(LogReport {
            size: have,
            log_root: self.frontier.root(),
            log_time: self.log_time,
            epoch: self.epoch,
            members_version: history.current().map(SignerSet::members_version),
            kinds: self.kinds,
            intents: self.modes,
            combined: self.combined,
            bodies_missing: self.bodies_missing,
            certificates: self.judged,
            certified_size: self.certified_size,
        })
    }

    fn history(&mut self, pos: u64) -> Result<&mut SignerHistory, AuditError> {
        let missing = AuditError::LogRule { pos, rule: "a log begins with its genesis document" };
        self.genesis.as_mut().map(|(_, history)| history).ok_or(missing)
    }

    fn genesis(&mut self, pos: u64, applied: bool, body: Option<&[u8]>) -> Result<(), AuditError> {
        let rule = |rule| AuditError::LogRule { pos, rule };
        if !applied {
            return Err(rule("the genesis document is applied"));
        }
        let body = body.ok_or_else(|| rule("the genesis document is at hand"))?;
        let genesis = Genesis::decode(body).map_err(|source| AuditError::Undecodable { pos, source })?;
        if genesis.cluster_id() != self.cluster_id {
            return Err(rule("the genesis document is that of this cluster"));
        }
        self.genesis = Some((genesis.t, SignerHistory::new(&genesis)));
        Ok(())
    }

    /// threshold.md §2.6: at least `t` readings, all naming the latest beacon; log time is the least of them, and never goes back.
    fn beacon_time(&mut self, pos: u64, body: &[u8]) -> Result<UnixMillis, AuditError> {
        let rule = |rule| AuditError::LogRule { pos, rule };
        let beacon = BeaconBody::decode(body).map_err(|source| AuditError::Undecodable { pos, source })?;
        if beacon.cluster_id != self.cluster_id {
            return Err(rule("clock readings are of this cluster"));
        }
        let latest = self.beacons.back().map_or((0, self.cluster_id.0), |latest| (latest.pos, latest.value));
        let Some((threshold, history)) = &self.genesis else {
            return Err(rule("a log begins with its genesis document"));
        };
        if beacon.readings.len() < usize::from(*threshold) {
            return Err(rule("a beacon has readings of at least t voters"));
        }
        for reading in &beacon.readings {
            if (reading.prev_beacon_pos, reading.prev_beacon) != latest {
                return Err(rule("clock readings name the latest beacon"));
            }
            if !self.admissions_missing {
                history.verify(reading.index, &reading.signed_bytes(&self.cluster_id), &reading.sig)?;
            }
        }
        let least = beacon.readings.iter().map(|reading| reading.unix_ms).min();
        Ok(self.log_time.max(least.unwrap_or_default()))
    }

    /// threshold.md §2.2: an applied intent names a beacon of at most 120 s, and none is recorded twice.
    fn intent(&mut self, pos: u64, body: &[u8]) -> Result<(), AuditError> {
        let rule = |rule| AuditError::LogRule { pos, rule };
        let intent = Intent::decode(body).map_err(|source| AuditError::Undecodable { pos, source })?;
        count(&mut self.modes, intent.mode.name(), true);
        let beacon = self.beacons.iter().rev().find(|beacon| beacon.pos == intent.beacon_pos);
        let beacon = beacon.ok_or_else(|| rule("an applied intent names a recent beacon"))?;
        if self.log_time.since(beacon.log_time) > BEACON_FRESH_MS_MAX {
            return Err(rule("an applied intent names a beacon of at most 120 s of log time"));
        }
        let id = intent.id();
        self.spoken_for(pos, &intent, &id)?;
        if self.intents.insert(id, self.log_time).is_some() {
            return Err(rule("an intent is recorded once"));
        }
        self.intents_by_time.push_back((self.log_time, id));
        Ok(())
    }

    /// ADR 0032: a node signs that it combines the intents of modes L and E that follow in the same entry.
    fn coordinator(&mut self, pos: u64, body: Option<&[u8]>) -> Result<(), AuditError> {
        let Some(body) = body else {
            self.word = Word::Missing;
            return Ok(());
        };
        let word = CoordinatorWord::decode(body).map_err(|source| AuditError::Undecodable { pos, source })?;
        if !self.admissions_missing {
            let signed = word.signed_bytes(&self.cluster_id);
            self.history(pos)?.verify(word.coordinator, &signed, &word.sig)?;
        }
        self.word = Word::Of(word.coordinator, word.named.into_iter().map(|named| named.intent_id).collect());
        Ok(())
    }

    fn spoken_for(&mut self, pos: u64, intent: &Intent, id: &[u8; 32]) -> Result<(), AuditError> {
        let by_itself = match &self.word {
            _ if intent.mode == Mode::Client => return Ok(()),
            Word::Nobody => false,
            Word::Missing => true,
            Word::Of(index, ids) => *index == intent.coordinator && ids.contains(id),
        };
        if !by_itself {
            return Err(AuditError::LogRule { pos, rule: "an applied intent of modes L and E stands behind its coordinator's signature" });
        }
        *self.combined.entry(intent.coordinator).or_default() += 1;
        Ok(())
    }

    /// No rule holds for the body of a refused intent: it is counted where it can be read.
    fn refused_intent(&mut self, body: &[u8]) {
        if let Ok(intent) = Intent::decode(body) {
            count(&mut self.modes, intent.mode.name(), false);
        }
    }

    /// Drops beacons that no intent may name any more, except the latest, and intents whose copy would be refused for its beacon.
    fn forget(&mut self) {
        while self.beacons.len() > 1 && self.beacons.front().is_some_and(|old| self.log_time.since(old.log_time) > BEACON_FRESH_MS_MAX) {
            self.beacons.pop_front();
        }
        while let Some((_, id)) = self.intents_by_time.pop_front_if(|(at, _)| self.log_time.since(*at) > INTENT_ROW_MS_MAX) {
            self.intents.remove(&id);
        }
    }

    /// Judges the certificates of the size just reached.
    fn judge_certificates(&mut self) -> Result<(), AuditError> {
        let size = self.frontier.size();
        let Some(certificates) = self.certificates.remove(&size) else {
            return Ok(());
        };
        let log_root = self.frontier.root();
        let mut first: Option<CertifiedHead> = None;
        for certificate in certificates {
            let version = certificate.head.members_version;
            let signers = self.genesis.as_ref().and_then(|(_, history)| history.at(version, size));
            // Where an admission's body is missing the signers are not known; such a certificate is left uncounted.
            let Some(signers) = signers else {
                if self.admissions_missing {
                    continue;
                }
                return Err(AuditError::UnknownMembers { members_version: version, size });
            };
            let certified = signers.certify(&self.cluster_id, &certificate)?;
            let own = Head { log_root, ..certificate.head };
            let fork = first.as_ref().and_then(|first| Fork::between(first, &certified));
            if let Some(fork) = fork.or_else(|| Fork::with_own_log(&own, &[], &certified)) {
                return Err(AuditError::Fork(Box::new(fork)));
            }
            first = Some(certified);
            self.judged += 1;
            self.certified_size = size;
        }
        Ok(())
    }
}

fn count(table: &mut BTreeMap<&'static str, (u64, u64)>, name: &'static str, applied: bool) {
    let (yes, no) = table.entry(name).or_default();
    *(if applied { yes } else { no }) += 1;
}
