//! Records, heads, certificates, clock readings and beacons of the one log (threshold.md §2.6).

use crate::codec::{DecodeError, Reader, Wire, Writer, ascending, sha256};
use crate::ids::{ClusterId, Epoch, NodeIndex, UnixMillis};
use crate::limits::NODES_MAX;

/// What a leaf records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum RecordKind {
    /// The genesis document.
    Genesis = 1,
    /// A beacon.
    Beacon = 2,
    /// A release intent.
    Intent = 3,
    /// Admit or Vouch.
    Admission = 4,
    /// A ceremony message or step.
    Ceremony = 5,
    /// A governance entry.
    Governance = 6,
    /// Pinned collateral.
    Collateral = 7,
    /// Env attempt or key.
    Env = 8,
    /// A stored signature.
    Signature = 9,
    /// A chain view.
    ChainView = 10,
    /// A checkpoint.
    Checkpoint = 11,
    /// An app adopted under the delegation.
    Adoption = 12,
    /// A node's word that it combines the intents that follow.
    Coordinator = 13,
}

impl RecordKind {
    /// All kinds.
    pub const ALL: [Self; 13] = [
        Self::Genesis,
        Self::Beacon,
        Self::Intent,
        Self::Admission,
        Self::Ceremony,
        Self::Governance,
        Self::Collateral,
        Self::Env,
        Self::Signature,
        Self::ChainView,
        Self::Checkpoint,
        Self::Adoption,
        Self::Coordinator,
    ];

    /// Stable name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Genesis => "genesis",
            Self::Beacon => "beacon",
            Self::Intent => "intent",
            Self::Admission => "admission",
            Self::Ceremony => "ceremony",
            Self::Governance => "governance",
            Self::Collateral => "collateral",
            Self::Env => "env",
            Self::Signature => "signature",
            Self::ChainView => "chain-view",
            Self::Checkpoint => "checkpoint",
            Self::Adoption => "adoption",
            Self::Coordinator => "coordinator",
        }
    }

    /// The kind of that byte.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|k| *k as u8 == byte)
    }
}

/// One leaf's record, 71 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Leaf number, from 0.
    pub pos: u64,
    /// Log time after applying.
    pub log_time: UnixMillis,
    /// Epoch of the newest generation after applying.
    pub epoch: Epoch,
    /// What it records.
    pub kind: RecordKind,
    /// 0 applied, else the refusal code.
    pub outcome: u16,
    /// Hash of the body.
    pub body_hash: [u8; 32],
}

/// Encoded length of a [`Record`].
pub const RECORD_BYTES: usize = 71;

/// `body_hash = SHA-256("DKMS-V1-BODY" ‖ kind(1) ‖ body)`.
#[must_use]
pub fn body_hash(kind: RecordKind, body: &[u8]) -> [u8; 32] {
    sha256(&[b"DKMS-V1-BODY", &[kind as u8], body])
}

impl Record {
    /// `leaf = SHA-256(0x00 ‖ record)`.
    #[must_use]
    pub fn leaf(&self) -> [u8; 32] {
        sha256(&[&[0], &self.encode()])
    }
}

impl Wire for Record {
    const BYTES_MAX: usize = RECORD_BYTES;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-REC")
            .u64(self.pos)
            .u64(self.log_time.0)
            .u64(self.epoch.0)
            .u8(self.kind as u8)
            .u16(self.outcome)
            .raw(&self.body_hash);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-REC")?;
        Ok(Self {
            pos: r.u64("pos")?,
            log_time: UnixMillis::read("log_time", r)?,
            epoch: Epoch::read("epoch", r)?,
            kind: RecordKind::from_byte(r.u8("kind")?).ok_or(DecodeError::Field { field: "kind", reason: "reserved record kind" })?,
            outcome: r.u16("outcome")?,
            body_hash: r.array("body_hash")?,
        })
    }
}

/// `HEAD`: size and root of the log, signed after applying.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Head {
    /// Version of the signer list.
    pub members_version: u64,
    /// Leaves.
    pub size: u64,
    /// Merkle root.
    pub log_root: [u8; 32],
    /// State root at checkpoint positions, zero elsewhere.
    pub state_root: [u8; 32],
}

impl Head {
    /// The bytes that a node key signs.
    #[must_use]
    pub fn signed_bytes(&self, cluster_id: &ClusterId) -> Vec<u8> {
        let mut w = Writer::labelled("DKMS-V1-HEAD");
        w.raw(&cluster_id.0);
        self.write(&mut w);
        w.into_bytes()
    }
}

impl Wire for Head {
    const BYTES_MAX: usize = 80;
    fn write(&self, w: &mut Writer) {
        w.u64(self.members_version).u64(self.size).raw(&self.log_root).raw(&self.state_root);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            members_version: r.u64("members_version")?,
            size: r.u64("size")?,
            log_root: r.array("log_root")?,
            state_root: r.array("state_root")?,
        })
    }
}

/// One node's signature on a head, as pushed to all nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignedHead {
    /// The head.
    pub head: Head,
    /// Who signed.
    pub index: NodeIndex,
    /// Ed25519.
    pub sig: [u8; 64],
}

impl Wire for SignedHead {
    const BYTES_MAX: usize = 160;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-SHEAD").value(&self.head).u16(self.index.0).raw(&self.sig);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-SHEAD")?;
        Ok(Self { head: Head::read(r)?, index: NodeIndex::read("i", r)?, sig: r.array("sig")? })
    }
}

/// `HeadCert`: a head with signatures, ascending by index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadCert {
    /// The head.
    pub head: Head,
    /// Signatures.
    pub signatures: Vec<(NodeIndex, [u8; 64])>,
}

impl Wire for HeadCert {
    const BYTES_MAX: usize = 128 + 66 * NODES_MAX * 2;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-CERT").value(&self.head).count2(self.signatures.len());
        for (index, sig) in &self.signatures {
            w.u16(index.0).raw(sig);
        }
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-CERT")?;
        let head = Head::read(r)?;
        let count = usize::from(r.u16("signatures")?);
        let signatures = r.list("signatures", count, 66, |r| Ok((NodeIndex::read("i", r)?, r.array("sig")?)))?;
        ascending("signatures", signatures.iter().map(|(i, _)| *i))?;
        Ok(Self { head, signatures })
    }
}

/// `reading`: one voter's clock, signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Position of the latest beacon, 0 before the first.
    pub prev_beacon_pos: u64,
    /// Its value, the cluster id before the first.
    pub prev_beacon: [u8; 32],
    /// Who reads.
    pub index: NodeIndex,
    /// Its clock.
    pub unix_ms: UnixMillis,
    /// Makes the next beacon unpredictable.
    pub rand: [u8; 32],
    /// Ed25519 by the node key over what precedes it.
    pub sig: [u8; 64],
}

/// Encoded length of a [`Reading`] inside a [`BeaconBody`]. The cluster id is part of the encoding.
pub const READING_BYTES: usize = 13 + 32 + 8 + 32 + 2 + 8 + 32 + 64;

impl Reading {
    /// What the node key signs: everything before `sig`.
    #[must_use]
    pub fn signed_bytes(&self, cluster_id: &ClusterId) -> Vec<u8> {
        let mut w = Writer::labelled("DKMS-V1-CLOCK");
        w.raw(&cluster_id.0).u64(self.prev_beacon_pos).raw(&self.prev_beacon).u16(self.index.0).u64(self.unix_ms.0).raw(&self.rand);
        w.into_bytes()
    }

    /// The whole encoding.
    #[must_use]
    pub fn encode(&self, cluster_id: &ClusterId) -> Vec<u8> {
        let mut bytes = self.signed_bytes(cluster_id);
        bytes.extend_from_slice(&self.sig);
        bytes
    }

    /// Decodes one reading; the cluster id is returned beside it, for the caller to compare.
    ///
    /// # Errors
    /// [`DecodeError`] names the field.
    pub fn read(r: &mut Reader<'_>) -> Result<(ClusterId, Self), DecodeError> {
        r.label("DKMS-V1-CLOCK")?;
        let cluster_id = ClusterId::read("cluster_id", r)?;
        Ok((
            cluster_id,
            Self {
                prev_beacon_pos: r.u64("prev_beacon_pos")?,
                prev_beacon: r.array("prev_beacon")?,
                index: NodeIndex::read("i", r)?,
                unix_ms: UnixMillis::read("unix_ms", r)?,
                rand: r.array("rand")?,
                sig: r.array("sig")?,
            },
        ))
    }
}

/// Body of a beacon: readings by ascending index, all of one cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeaconBody {
    /// Cluster of every reading.
    pub cluster_id: ClusterId,
    /// The readings.
    pub readings: Vec<Reading>,
}

impl Wire for BeaconBody {
    const BYTES_MAX: usize = 2 + READING_BYTES * NODES_MAX;
    fn write(&self, w: &mut Writer) {
        w.count2(self.readings.len());
        for reading in &self.readings {
            w.raw(&reading.encode(&self.cluster_id));
        }
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = usize::from(r.u16("readings")?);
        let rows = r.list("readings", count, READING_BYTES, Reading::read)?;
        let Some((cluster_id, _)) = rows.first() else {
            return Err(DecodeError::Field { field: "readings", reason: "at least one reading" });
        };
        let cluster_id = *cluster_id;
        if rows.iter().any(|(id, _)| *id != cluster_id) {
            return Err(DecodeError::Field { field: "cluster_id", reason: "one cluster for all readings" });
        }
        let readings: Vec<Reading> = rows.into_iter().map(|(_, reading)| reading).collect();
        ascending("readings", readings.iter().map(|x| x.index))?;
        Ok(Self { cluster_id, readings })
    }
}

/// `state_root = SHA-256("DKMS-V1-STATE" ‖ version(1)=1 ‖ state)`.
#[must_use]
pub fn state_root(state: &[u8]) -> [u8; 32] {
    sha256(&[b"DKMS-V1-STATE", &[1], state])
}
