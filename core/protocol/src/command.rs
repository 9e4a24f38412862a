//! Commands of the replicated log and what `apply` answers.
//!
//! Owns: the envelope of a Raft entry's payload. All of it is public data (architecture.md §7).

use crate::adopt::Adopt;
use crate::ceremony::{Message, Open, Step};
use crate::codec::{DecodeError, Reader, Wire, Writer};
use crate::collateral::Pin;
use crate::coordinated::{Coordinated, read_intents, write_intents};
use crate::env::EnvAttempt;
use crate::governance::Entry;
use crate::limits::{COLLATERAL_BYTES_MAX, COMMAND_BYTES_MAX, GENESIS_BYTES_MAX, INTENT_BATCH_MAX};
use crate::log::BeaconBody;
use crate::release::Intent;
use crate::sign::{SignAsk, Signed};

/// One command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Opens the log. The record's body is the genesis document alone; the bundle is named by it.
    Genesis {
        /// Encoded genesis document.
        genesis: Vec<u8>,
        /// Collateral bundle.
        collateral: Vec<u8>,
    },
    /// Moves log time.
    Beacon(BeaconBody),
    /// Release intents of mode C, one leaf each.
    Intents(Vec<Intent>),
    /// Admission or ceremony message.
    Ceremony(Message),
    /// Opens an attempt.
    Open(Open),
    /// Moves an attempt.
    Step(Step),
    /// Governance entry.
    Governance(Entry),
    /// Asks for a checkpoint position.
    Checkpoint,
    /// Replaces the collateral in force.
    Collateral(Pin),
    /// Asks for a root's signature.
    Sign(SignAsk),
    /// Stores one.
    Signed(Signed),
    /// Begins an attempt to compute an app's env public key.
    Env(EnvAttempt),
    /// Takes an app into the state that only the authority knows.
    Adopt(Adopt),
    /// Release intents, some of them combined by the node that proposes and signs them.
    Coordinated(Coordinated),
}

impl Wire for Command {
    const BYTES_MAX: usize = COMMAND_BYTES_MAX;

    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-CMD");
        match self {
            Self::Genesis { genesis, collateral } => w.u8(1).lp4(genesis).lp4(collateral),
            Self::Beacon(body) => w.u8(2).value(body),
            Self::Intents(intents) => {
                write_intents(w.u8(3), intents);
                w
            }
            Self::Ceremony(message) => w.u8(4).value(message),
            Self::Open(open) => w.u8(5).value(open),
            Self::Step(step) => w.u8(6).value(step),
            Self::Governance(entry) => w.u8(7).value(entry),
            Self::Checkpoint => w.u8(8),
            Self::Collateral(pin) => w.u8(9).value(pin),
            Self::Sign(ask) => w.u8(10).value(ask),
            Self::Signed(signed) => w.u8(11).value(signed),
            Self::Env(attempt) => w.u8(12).value(attempt),
            Self::Adopt(adopt) => w.u8(13).value(adopt),
            Self::Coordinated(batch) => w.u8(14).value(batch),
        };
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-CMD")?;
        match r.u8("command")? {
            1 => Ok(Self::Genesis {
                genesis: r.lp4("genesis", GENESIS_BYTES_MAX)?.to_vec(),
                collateral: r.lp4("collateral", COLLATERAL_BYTES_MAX)?.to_vec(),
            }),
            2 => BeaconBody::read(r).map(Self::Beacon),
            3 => read_intents(r).map(Self::Intents),
            4 => Message::read(r).map(Self::Ceremony),
            5 => Open::read(r).map(Self::Open),
            6 => Step::read(r).map(Self::Step),
            7 => Entry::read(r).map(Self::Governance),
            8 => Ok(Self::Checkpoint),
            9 => Pin::read(r).map(Self::Collateral),
            10 => SignAsk::read(r).map(Self::Sign),
            11 => Signed::read(r).map(Self::Signed),
            12 => EnvAttempt::read(r).map(Self::Env),
            13 => Adopt::read(r).map(Self::Adopt),
            14 => Coordinated::read(r).map(Self::Coordinated),
            _ => Err(DecodeError::Field { field: "command", reason: "unknown command" }),
        }
    }
}

/// What became of one leaf, or of one intent of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Leaf number; of a duplicate intent or of a repeated ask for a signature, the first copy's.
    pub pos: u64,
    /// 0 applied, else the refusal code.
    pub code: u16,
    /// Retry hint of a refusal, ms.
    pub retry_after_ms: u32,
}

/// Answer of `apply` to the proposer: one outcome per leaf asked for, and the log after the entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandAnswer {
    /// In the order of the command; one unless it is a batch of intents.
    pub outcomes: Vec<Outcome>,
    /// Leaves after the entry.
    pub size: u64,
    /// Log root after the entry.
    pub log_root: [u8; 32],
}

impl Wire for CommandAnswer {
    const BYTES_MAX: usize = 128 + 14 * INTENT_BATCH_MAX;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-CMDANS").count2(self.outcomes.len());
        for outcome in &self.outcomes {
            w.u64(outcome.pos).u16(outcome.code).u32(outcome.retry_after_ms);
        }
        w.u64(self.size).raw(&self.log_root);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-CMDANS")?;
        let count = usize::from(r.u16("outcomes")?);
        Ok(Self {
            outcomes: r.list("outcomes", count, 14, |r| {
                Ok(Outcome { pos: r.u64("pos")?, code: r.u16("code")?, retry_after_ms: r.u32("retry_after_ms")? })
            })?,
            size: r.u64("size")?,
            log_root: r.array("log_root")?,
        })
    }
}
