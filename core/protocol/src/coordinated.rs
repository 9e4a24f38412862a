//! Intents that a node combines itself (modes L and E), in that node's own word (ADR 0032).
//!
//! Owns: the layouts. Never: verifies the signature (`apply` does). Source: threshold.md §2.2, §2.4, §2.5; ADR 0033 (statements).

use crate::codec::{DecodeError, Reader, Wire, Writer};
use crate::ids::{ClusterId, NodeIndex};
use crate::limits::{COMMAND_BYTES_MAX, INTENT_BATCH_MAX};
use crate::release::{Intent, Mode};

/// A batch of intents of which some are of modes L and E: one signature for all of these.
///
/// `"DKMS-V1-COORDINATED" ‖ version(1)=1 ‖ i(2) ‖ sig(64) ‖ count(2) ‖ { lp(Intent) }* ‖ { statement_id(32) }*`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coordinated {
    /// Who combines, and signs.
    pub coordinator: NodeIndex,
    /// Ed25519 by its node key over [`CoordinatorWord::signed_bytes`].
    pub sig: [u8; 64],
    /// The batch; those of mode C stand for themselves.
    pub intents: Vec<Intent>,
    /// One for each intent of modes L and E, in their order: [`binding::statement_id`](crate::binding::statement_id) of the evidence; 32
    /// zero bytes in mode E, which has none.
    pub statements: Vec<[u8; 32]>,
}

impl Coordinated {
    /// What is signed of it, as the log keeps it.
    #[must_use]
    pub fn word(&self) -> CoordinatorWord {
        let named = self.named().map(|(intent, statement_id)| Named { intent_id: intent.id(), statement_id });
        CoordinatorWord { coordinator: self.coordinator, named: named.collect(), sig: self.sig }
    }

    /// Intents of modes L and E, each with its statement.
    fn named(&self) -> impl Iterator<Item = (&Intent, [u8; 32])> {
        let statements = self.statements.iter().copied().chain(std::iter::repeat([0; 32]));
        self.intents.iter().filter(|intent| is_named(intent)).zip(statements)
    }
}

/// Whether an intent is one that its coordinator speaks for.
fn is_named(intent: &Intent) -> bool {
    intent.mode != Mode::Client
}

/// Writes `count(2) ‖ { lp(Intent) }*`.
pub(crate) fn write_intents(w: &mut Writer, intents: &[Intent]) {
    w.count2(intents.len());
    for intent in intents {
        w.lp(&intent.encode());
    }
}

/// Reads `count(2) ‖ { lp(Intent) }*`, 1 to 256 of them.
pub(crate) fn read_intents(r: &mut Reader<'_>) -> Result<Vec<Intent>, DecodeError> {
    let count = counted("intents", r)?;
    r.list("intents", count, 2, |r| Intent::decode(r.lp("intent", Intent::BYTES_MAX)?))
}

fn counted(field: &'static str, r: &mut Reader<'_>) -> Result<usize, DecodeError> {
    let count = usize::from(r.u16(field)?);
    if count == 0 || count > INTENT_BATCH_MAX {
        return Err(DecodeError::TooLong { field, max: INTENT_BATCH_MAX, got: count });
    }
    Ok(count)
}

impl Wire for Coordinated {
    const BYTES_MAX: usize = COMMAND_BYTES_MAX;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-COORDINATED").u16(self.coordinator.0).raw(&self.sig);
        write_intents(w, &self.intents);
        for (_, statement_id) in self.named() {
            w.raw(&statement_id);
        }
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-COORDINATED")?;
        let (coordinator, sig, intents) = (NodeIndex::read("i", r)?, r.array("sig")?, read_intents(r)?);
        let count = intents.iter().filter(|intent| is_named(intent)).count();
        let statements = r.list("statements", count, 32, |r| r.array("statement_id"))?;
        Ok(Self { coordinator, sig, intents, statements })
    }
}

/// A node's word that it combines these intents: body of the record before theirs.
///
/// `"DKMS-V1-COORD" ‖ version(1)=1 ‖ i(2) ‖ count(2) ‖ { intent_id(32) ‖ statement_id(32) }* ‖ sig(64)`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CoordinatorWord {
    /// Who combines.
    pub coordinator: NodeIndex,
    /// Its intents of modes L and E in that entry, refused ones and repetitions too.
    pub named: Vec<Named>,
    /// Ed25519 by its node key.
    pub sig: [u8; 64],
}

/// An intent of mode L or E, as its coordinator names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named {
    /// Which intent.
    pub intent_id: [u8; 32],
    /// Which evidence, whatever its encoding: the log notes when it first saw it (threshold.md §2.4).
    pub statement_id: [u8; 32],
}

impl CoordinatorWord {
    /// `"DKMS-V1-COORDMSG" ‖ cluster_id(32) ‖ i(2) ‖ count(2) ‖ { intent_id(32) ‖ statement_id(32) }*`.
    #[must_use]
    pub fn signed_bytes(&self, cluster_id: &ClusterId) -> Vec<u8> {
        let mut w = Writer::labelled("DKMS-V1-COORDMSG");
        w.raw(&cluster_id.0);
        self.write_named(&mut w);
        w.into_bytes()
    }

    fn write_named(&self, w: &mut Writer) {
        w.u16(self.coordinator.0).count2(self.named.len());
        for named in &self.named {
            w.raw(&named.intent_id).raw(&named.statement_id);
        }
    }
}

impl Wire for CoordinatorWord {
    const BYTES_MAX: usize = 128 + 64 * INTENT_BATCH_MAX;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-COORD");
        self.write_named(w);
        w.raw(&self.sig);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-COORD")?;
        let coordinator = NodeIndex::read("i", r)?;
        let count = counted("named", r)?;
        let one = |r: &mut Reader<'_>| Ok(Named { intent_id: r.array("intent_id")?, statement_id: r.array("statement_id")? });
        let named = r.list("named", count, 64, one)?;
        Ok(Self { coordinator, named, sig: r.array("sig")? })
    }
}
