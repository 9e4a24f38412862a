//! Messages and steps of admission and key ceremonies (threshold.md §3).
//!
//! Owns: layouts and the hashes that name a ceremony. Never: verifies a proof or a signature.

use crate::codec::{DecodeError, Reader, Wire, Writer, ascending, sha256};
use crate::ids::{ClusterId, Epoch, Generation, NodeIndex, RootTag, Seat};
use crate::limits::{CEREMONY_BODY_BYTES_MAX, EVIDENCE_BYTES_MAX, NODES_MAX};

/// Kind of a ceremony message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum MessageKind {
    /// A node asks for its seat.
    Admit = 0x01,
    /// A holder-to-be brings its encryption keys.
    Join = 0x02,
    /// Hash of the deal to come.
    Commit = 0x03,
    /// Commitments and encrypted sub-shares.
    Deal = 0x04,
    /// Everything received is right.
    Ready = 0x05,
    /// A dealer's sub-share is wrong; opened with proof.
    Complain = 0x06,
    /// The share was lost after Ready.
    Unready = 0x07,
    /// The new share answers.
    Live = 0x08,
    /// The old share is erased.
    Erased = 0x09,
    /// A signer's word for an Admit.
    Vouch = 0x0a,
    /// Public key of an app's env key (threshold.md §2.5).
    EnvPub = 0x20,
}

impl MessageKind {
    /// The kind of that byte.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Admit,
            Self::Join,
            Self::Commit,
            Self::Deal,
            Self::Ready,
            Self::Complain,
            Self::Unready,
            Self::Live,
            Self::Erased,
            Self::Vouch,
            Self::EnvPub,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// `bd(b) = SHA-256("DKMS-V1-CBODY" ‖ b)`.
#[must_use]
pub fn body_digest(body: &[u8]) -> [u8; 32] {
    sha256(&[b"DKMS-V1-CBODY", body])
}

/// `key_hash = SHA-256("DKMS-V1-NODEKEY" ‖ node_key)`.
#[must_use]
pub fn key_hash(node_key: &[u8; 32]) -> [u8; 32] {
    sha256(&[b"DKMS-V1-NODEKEY", node_key])
}

/// A signed ceremony message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// What it is.
    pub kind: MessageKind,
    /// Author; 0 in an Admit.
    pub index: NodeIndex,
    /// Ceremony instance, `join_id` for a Join, zero for Admit and Vouch.
    pub inst: [u8; 32],
    /// Body of the kind.
    pub body: Vec<u8>,
    /// Ed25519 by the author's node key over [`Message::signed_bytes`].
    pub sig: [u8; 64],
}

impl Message {
    /// `"DKMS-V1-MSG" ‖ cluster_id ‖ kind ‖ i ‖ inst ‖ bd(body)`.
    #[must_use]
    pub fn signed_bytes(&self, cluster_id: &ClusterId) -> Vec<u8> {
        let mut w = Writer::labelled("DKMS-V1-MSG");
        w.raw(&cluster_id.0).u8(self.kind as u8).u16(self.index.0).raw(&self.inst).raw(&body_digest(&self.body));
        w.into_bytes()
    }
}

impl Wire for Message {
    const BYTES_MAX: usize = CEREMONY_BODY_BYTES_MAX + 256;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-CER").u8(self.kind as u8).u16(self.index.0).raw(&self.inst).lp4(&self.body).raw(&self.sig);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-CER")?;
        Ok(Self {
            kind: MessageKind::from_byte(r.u8("kind")?).ok_or(DecodeError::Field { field: "kind", reason: "unknown message kind" })?,
            index: NodeIndex::read("i", r)?,
            inst: r.array("inst")?,
            body: r.lp4("body", CEREMONY_BODY_BYTES_MAX)?.to_vec(),
            sig: r.array("sig")?,
        })
    }
}

/// Body of an Admit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdmitBody {
    /// Seat asked for.
    pub seat: Seat,
    /// Key it brings.
    pub node_key: [u8; 32],
    /// Greater than any before for that seat.
    pub incarnation: u64,
    /// 0 at genesis.
    pub beacon_pos: u64,
    /// `cluster_id` at genesis.
    pub beacon: [u8; 32],
    /// Evidence with report data [`crate::binding::admit`].
    pub evidence: Vec<u8>,
}

impl Wire for AdmitBody {
    const BYTES_MAX: usize = CEREMONY_BODY_BYTES_MAX;
    fn write(&self, w: &mut Writer) {
        w.u16(self.seat.0).raw(&self.node_key).u64(self.incarnation).u64(self.beacon_pos).raw(&self.beacon).lp4(&self.evidence);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            seat: Seat::read("seat", r)?,
            node_key: r.array("node_key")?,
            incarnation: r.u64("incarnation")?,
            beacon_pos: r.u64("beacon_pos")?,
            beacon: r.array("beacon")?,
            evidence: r.lp4("evidence", EVIDENCE_BYTES_MAX)?.to_vec(),
        })
    }
}

/// Body of a Join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinBody {
    /// Beacon at most 120 s old.
    pub beacon_pos: u64,
    /// Its value.
    pub beacon: [u8; 32],
    /// Encryption key (ristretto255) for each root, ascending.
    pub keys: Vec<(RootTag, [u8; 32])>,
    /// Evidence with report data [`crate::binding::join`].
    pub evidence: Vec<u8>,
}

impl Wire for JoinBody {
    const BYTES_MAX: usize = CEREMONY_BODY_BYTES_MAX;
    fn write(&self, w: &mut Writer) {
        w.u64(self.beacon_pos).raw(&self.beacon).count1(self.keys.len());
        for (root, key) in &self.keys {
            w.u8(root.byte()).raw(key);
        }
        w.lp4(&self.evidence);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let beacon_pos = r.u64("beacon_pos")?;
        let beacon = r.array("beacon")?;
        let count = usize::from(r.u8("keys")?);
        let keys = r.list("keys", count, 33, |r| Ok((RootTag::read(r)?, r.array("ek")?)))?;
        ascending("keys", keys.iter().map(|(root, _)| *root))?;
        Ok(Self { beacon_pos, beacon, keys, evidence: r.lp4("evidence", EVIDENCE_BYTES_MAX)?.to_vec() })
    }
}

/// One encrypted sub-share of a Deal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DealtShare {
    /// Recipient.
    pub to: NodeIndex,
    /// `E_ij`, ristretto255.
    pub ephemeral: [u8; 32],
    /// ChaCha20-Poly1305 of the sub-share.
    pub ct: [u8; 48],
}

/// Body of a Deal. Points have the length of the root's group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DealBody {
    /// `C_ik`, `t` of them.
    pub commitments: Vec<Vec<u8>>,
    /// `c ‖ z`, absent in a resharing.
    pub possession: Option<([u8; 32], [u8; 32])>,
    /// Sub-shares, ascending by recipient.
    pub shares: Vec<DealtShare>,
}

impl DealBody {
    /// The encoding.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        w.count2(self.commitments.len());
        for point in &self.commitments {
            w.raw(point);
        }
        if let Some((c, z)) = &self.possession {
            w.raw(c).raw(z);
        }
        w.count2(self.shares.len());
        for share in &self.shares {
            w.u16(share.to.0).raw(&share.ephemeral).raw(&share.ct);
        }
        w.into_bytes()
    }

    /// Decodes a Deal of a group whose points have `point_bytes` bytes.
    ///
    /// # Errors
    /// [`DecodeError`] names the field; trailing bytes are one.
    pub fn decode(bytes: &[u8], point_bytes: usize, with_possession: bool) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        let count = usize::from(r.u16("commitments")?);
        if count == 0 || count > NODES_MAX {
            return Err(DecodeError::Field { field: "commitments", reason: "1 to 64 commitments" });
        }
        let commitments = r.list("commitments", count, point_bytes, |r| r.take("commitment", point_bytes).map(<[u8]>::to_vec))?;
        let possession = if with_possession { Some((r.array("c")?, r.array("z")?)) } else { None };
        let count = usize::from(r.u16("shares")?);
        let shares = r.list("shares", count, 82, |r| {
            Ok(DealtShare { to: NodeIndex::read("j", r)?, ephemeral: r.array("ephemeral")?, ct: r.array("ct")? })
        })?;
        ascending("shares", shares.iter().map(|s| s.to))?;
        r.finish()?;
        Ok(Self { commitments, possession, shares })
    }
}

/// Body of a Ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadyBody {
    /// Transcript of the instance.
    pub transcript: [u8; 32],
    /// The holder's verification key.
    pub vk: Vec<u8>,
    /// Digest of the pairwise setup, zero where there is none.
    pub setup: [u8; 32],
}

impl Wire for ReadyBody {
    const BYTES_MAX: usize = 160;
    fn write(&self, w: &mut Writer) {
        w.raw(&self.transcript).lp(&self.vk).raw(&self.setup);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { transcript: r.array("transcript")?, vk: r.lp("vk", 64)?.to_vec(), setup: r.array("setup")? })
    }
}

/// Body of a Complain: the shared key with one dealer, opened, with proof.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ComplainBody {
    /// The accused.
    pub dealer: NodeIndex,
    /// `K = dk_j·E_ij`.
    pub shared: [u8; 32],
    /// Challenge of the proof.
    pub c: [u8; 32],
    /// Response of the proof.
    pub s: [u8; 32],
}

impl Wire for ComplainBody {
    const BYTES_MAX: usize = 98;
    fn write(&self, w: &mut Writer) {
        w.u16(self.dealer.0).raw(&self.shared).raw(&self.c).raw(&self.s);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { dealer: NodeIndex::read("dealer", r)?, shared: r.array("K")?, c: r.array("c")?, s: r.array("s")? })
    }
}

/// What a ceremony is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum What {
    /// Distributed key generation.
    Dkg = b'D',
    /// Resharing.
    Reshare = b'R',
    /// Backup to operators.
    Backup = b'B',
    /// Recovery from operators.
    Recovery = b'V',
}

impl What {
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match r.u8("what")? {
            b'D' => Ok(Self::Dkg),
            b'R' => Ok(Self::Reshare),
            b'B' => Ok(Self::Backup),
            b'V' => Ok(Self::Recovery),
            _ => Err(DecodeError::Field { field: "what", reason: "unknown ceremony" }),
        }
    }
}

/// `Open`: the entry that opens an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// Generation of the roots.
    pub generation: Generation,
    /// What the ceremony is for.
    pub what: What,
    /// Epoch it starts from; 0 in a DKG.
    pub old_epoch: Epoch,
    /// Epoch it leads to.
    pub new_epoch: Epoch,
    /// Attempt number, from 1.
    pub attempt: u32,
    /// Threshold of the new sharing.
    pub t: u16,
    /// Roots, ascending.
    pub roots: Vec<RootTag>,
    /// Dealers, ascending.
    pub dealers: Vec<NodeIndex>,
    /// Holders, ascending.
    pub holders: Vec<NodeIndex>,
}

impl Open {
    /// `join_id = SHA-256("DKMS-V1-JOINID" ‖ cluster_id ‖ Open)`.
    #[must_use]
    pub fn join_id(&self, cluster_id: &ClusterId) -> [u8; 32] {
        sha256(&[b"DKMS-V1-JOINID", &cluster_id.0, &self.encode()])
    }
}

fn indices(field: &'static str, r: &mut Reader<'_>) -> Result<Vec<NodeIndex>, DecodeError> {
    let count = usize::from(r.u16(field)?);
    if count == 0 || count > NODES_MAX {
        return Err(DecodeError::Field { field, reason: "1 to 64 nodes" });
    }
    let list = r.list(field, count, 2, |r| NodeIndex::read("i", r))?;
    if list.iter().any(|i| i.0 == 0 || i.0 >= 0x8000) {
        return Err(DecodeError::Field { field, reason: "node index is 1..0x8000" });
    }
    ascending(field, list.iter())?;
    Ok(list)
}

impl Wire for Open {
    const BYTES_MAX: usize = 64 + 4 * NODES_MAX + 8;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-STEP")
            .u8(0x01)
            .u32(self.generation.0)
            .u8(self.what as u8)
            .u64(self.old_epoch.0)
            .u64(self.new_epoch.0)
            .u32(self.attempt)
            .u16(self.t)
            .count1(self.roots.len());
        for root in &self.roots {
            w.u8(root.byte());
        }
        w.count2(self.dealers.len());
        for i in &self.dealers {
            w.u16(i.0);
        }
        w.count2(self.holders.len());
        for i in &self.holders {
            w.u16(i.0);
        }
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-STEP")?;
        if r.u8("step")? != 0x01 {
            return Err(DecodeError::Field { field: "step", reason: "not an Open" });
        }
        let generation = Generation::read("generation", r)?;
        let what = What::read(r)?;
        let (old_epoch, new_epoch) = (Epoch::read("old_epoch", r)?, Epoch::read("new_epoch", r)?);
        let (attempt, t) = (r.u32("attempt")?, r.u16("t")?);
        let count = usize::from(r.u8("roots")?);
        let roots = r.list("roots", count, 1, RootTag::read)?;
        ascending("roots", roots.iter())?;
        if roots.is_empty() {
            return Err(DecodeError::Field { field: "roots", reason: "at least one root" });
        }
        Ok(Self {
            generation,
            what,
            old_epoch,
            new_epoch,
            attempt,
            t,
            roots,
            dealers: indices("dealers", r)?,
            holders: indices("holders", r)?,
        })
    }
}

/// A step after `Open`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum StepKind {
    /// The new sharing is in force.
    Switched = 0x02,
    /// The old one is to be erased.
    Finalized = 0x03,
    /// The attempt ended without effect.
    Aborted = 0x04,
    /// The switch was undone.
    Reverted = 0x05,
}

/// `step`: names the attempt by its `join_id`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Which step.
    pub kind: StepKind,
    /// The attempt.
    pub join_id: [u8; 32],
}

impl Wire for Step {
    const BYTES_MAX: usize = 64;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-STEP").u8(self.kind as u8).raw(&self.join_id);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-STEP")?;
        let kind = match r.u8("step")? {
            2 => StepKind::Switched,
            3 => StepKind::Finalized,
            4 => StepKind::Aborted,
            5 => StepKind::Reverted,
            _ => {
                return Err(DecodeError::Field { field: "step", reason: "unknown step" });
            }
        };
        Ok(Self { kind, join_id: r.array("join_id")? })
    }
}

/// A holder in [`inst`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InstHolder {
    /// Its index.
    pub index: NodeIndex,
    /// [`key_hash`] of its node key.
    pub key_hash: [u8; 32],
    /// Its encryption key for this root.
    pub ek: [u8; 32],
}

/// `inst`: names one root's run of an attempt. Holders ascending.
#[must_use]
pub fn inst(cluster_id: &ClusterId, open: &Open, root: RootTag, holders: &[InstHolder]) -> [u8; 32] {
    let mut w = Writer::labelled("DKMS-V1-INST");
    w.raw(&cluster_id.0)
        .u32(open.generation.0)
        .u8(open.what as u8)
        .u8(root.byte())
        .u64(open.old_epoch.0)
        .u64(open.new_epoch.0)
        .u32(open.attempt)
        .u16(open.t)
        .count2(open.dealers.len());
    for i in &open.dealers {
        w.u16(i.0);
    }
    w.count2(holders.len());
    for holder in holders {
        w.u16(holder.index.0).raw(&holder.key_hash).raw(&holder.ek);
    }
    sha256(&[&w.into_bytes()])
}
