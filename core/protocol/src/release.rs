//! Request, intent, ask, go, partial and answer of a key release (threshold.md §1.1, §2.2, §2.3).

use zeroize::Zeroizing;

use crate::codec::{DecodeError, Reader, Wire, Writer, sha256};
use crate::ids::{AppId, ClusterId, Epoch, Generation, NodeIndex};
use crate::limits::{EVIDENCE_BYTES_MAX, PATH_BYTES_MAX, RELREQ_BYTES_MAX, SPKI_BYTES_MAX, WISHES_MAX};

/// Kind of key (threshold.md §1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum KeyClass {
    /// Disk key of an instance.
    Disk = 1,
    /// X25519 key of the encrypted environment.
    Env = 2,
    /// secp256k1 app key.
    K256 = 3,
    /// Secret of the application's own, by path.
    Custom = 4,
    /// P-256 key of the app CA.
    P256 = 5,
}

impl KeyClass {
    /// All classes.
    pub const ALL: [Self; 5] = [Self::Disk, Self::Env, Self::K256, Self::Custom, Self::P256];

    /// The byte that names the class.
    #[must_use]
    pub fn byte(self) -> u8 {
        self as u8
    }

    /// Stable name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Env => "env",
            Self::K256 => "k256",
            Self::Custom => "custom",
            Self::P256 => "p256",
        }
    }

    /// The class of that byte.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.byte() == byte)
    }

    /// The class of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.name() == name)
    }

    pub(crate) fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::from_byte(r.u8("class")?).ok_or(DecodeError::Field { field: "class", reason: "reserved key class" })
    }
}

/// One wanted key: class and context. The app is that of the request.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wish {
    /// Kind of key.
    pub class: KeyClass,
    /// Instance id (disk), path (custom), else empty.
    pub ctx: Vec<u8>,
}

impl Wish {
    /// A wish whose context fits its class.
    ///
    /// # Errors
    /// [`DecodeError::Field`] when it does not: disk takes 0 or 20 bytes, custom 1..=1024 bytes of UTF-8, others none.
    pub fn new(class: KeyClass, ctx: Vec<u8>) -> Result<Self, DecodeError> {
        let right = match class {
            KeyClass::Disk => ctx.is_empty() || ctx.len() == 20,
            KeyClass::Custom => !ctx.is_empty() && ctx.len() <= PATH_BYTES_MAX && std::str::from_utf8(&ctx).is_ok(),
            KeyClass::Env | KeyClass::K256 | KeyClass::P256 => ctx.is_empty(),
        };
        if right { Ok(Self { class, ctx }) } else { Err(DecodeError::Field { field: "ctx", reason: "does not fit the key class" }) }
    }

    /// `ctx_hash = SHA-256("DKMS-V1-CTX" ‖ lp(ctx))`.
    #[must_use]
    pub fn ctx_hash(&self) -> [u8; 32] {
        let mut w = Writer::labelled("DKMS-V1-CTX");
        w.lp(&self.ctx);
        sha256(&[&w.into_bytes()])
    }

    /// PRF input `x` (threshold.md §1.1).
    #[must_use]
    pub fn prf_input(&self, cluster_id: &ClusterId, app_id: &AppId) -> Vec<u8> {
        let mut w = Writer::labelled("DKMS-V1-TPRF");
        w.raw(&cluster_id.0).u8(self.class.byte()).lp(&app_id.0).lp(&self.ctx);
        w.into_bytes()
    }
}

/// Who combines the partials.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Mode {
    /// The guest agent.
    Client = 0x43,
    /// The node that terminates the guest's TLS.
    Legacy = 0x4c,
    /// The node named by an env attempt.
    Env = 0x45,
}

impl Mode {
    /// Name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Legacy => "legacy",
            Self::Env => "env",
        }
    }

    pub(crate) fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match r.u8("mode")? {
            0x43 => Ok(Self::Client),
            0x4c => Ok(Self::Legacy),
            0x45 => Ok(Self::Env),
            _ => Err(DecodeError::Field { field: "mode", reason: "unknown mode" }),
        }
    }
}

/// Whether an X25519 key has low order (RFC 7748 §6.1): every shared secret with it is zero, so what is sealed to it is sealed to nobody.
pub(crate) fn is_low_order(mut u: [u8; 32]) -> bool {
    // Orders 1, 2, 4, and both of order 8; then p − 1 (order 4 of the twist), p and p + 1: not canonical forms of 0 and 1.
    const LOW: [[u8; 32]; 7] = [
        [0; 32],
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [
            0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c,
            0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
        ],
        [
            0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58,
            0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
        ],
        near_p(0xec),
        near_p(0xed),
        near_p(0xee),
    ];
    // X25519 ignores the top bit.
    u[31] &= 0x7f;
    LOW.contains(&u)
}

/// `2^255 − 256 + first`, little-endian: `p` is `near_p(0xed)`.
const fn near_p(first: u8) -> [u8; 32] {
    let mut bytes = [0xff; 32];
    bytes[0] = first;
    bytes[31] = 0x7f;
    bytes
}

/// `RelReq`: what a client asks for. All wishes name one app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelReq {
    /// Cluster asked.
    pub cluster_id: ClusterId,
    /// Generation of the root.
    pub generation: Generation,
    /// Fresh beacon's position.
    pub beacon_pos: u64,
    /// Its value.
    pub beacon: [u8; 32],
    /// Who combines.
    pub mode: Mode,
    /// Names the evidence.
    pub evidence_hash: [u8; 32],
    /// One-time X25519 key that partials are sealed to.
    pub epk: [u8; 32],
    /// Makes each request new.
    pub nonce: [u8; 32],
    /// The app of every wish.
    pub app_id: AppId,
    /// 1 to 16 wishes, no duplicates.
    pub wishes: Vec<Wish>,
}

impl RelReq {
    /// `req_hash = SHA-256(RelReq)`.
    #[must_use]
    pub fn req_hash(&self) -> [u8; 32] {
        sha256(&[&self.encode()])
    }

    /// The intent that this request leads to. `coordinator` is 0 in mode C.
    #[must_use]
    pub fn intent(&self, coordinator: NodeIndex) -> Intent {
        Intent {
            req_hash: self.req_hash(),
            evidence_hash: self.evidence_hash,
            generation: self.generation,
            mode: self.mode,
            coordinator,
            beacon_pos: self.beacon_pos,
            app_id: self.app_id,
            wishes: self.wishes.iter().map(|wish| (wish.class, wish.ctx_hash())).collect(),
        }
    }
}

impl Wire for RelReq {
    const BYTES_MAX: usize = RELREQ_BYTES_MAX;

    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-RELREQ")
            .raw(&self.cluster_id.0)
            .u32(self.generation.0)
            .u64(self.beacon_pos)
            .raw(&self.beacon)
            .u8(self.mode as u8)
            .raw(&self.evidence_hash)
            .raw(&self.epk)
            .raw(&self.nonce)
            .count1(self.wishes.len());
        for wish in &self.wishes {
            w.u8(wish.class.byte()).lp(&self.app_id.0).lp(&wish.ctx);
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-RELREQ")?;
        let cluster_id = ClusterId::read("cluster_id", r)?;
        let generation = Generation::read("generation", r)?;
        let beacon_pos = r.u64("beacon_pos")?;
        let beacon = r.array("beacon")?;
        let mode = Mode::read(r)?;
        let evidence_hash = r.array("evidence_hash")?;
        let epk: [u8; 32] = r.array("epk")?;
        if is_low_order(epk) {
            return Err(DecodeError::Field { field: "epk", reason: "zero or low order" });
        }
        let nonce = r.array("nonce")?;
        let count = usize::from(r.u8("wishes")?);
        if count == 0 || count > WISHES_MAX {
            return Err(DecodeError::Field { field: "wishes", reason: "1 to 16 wishes" });
        }
        let rows = r.list("wishes", count, 25, |r| {
            let class = KeyClass::read(r)?;
            let app: [u8; 20] = r.lp("app_id", 20)?.try_into().map_err(|_| DecodeError::Field { field: "app_id", reason: "20 bytes" })?;
            let ctx = r.lp("ctx", PATH_BYTES_MAX)?.to_vec();
            Ok((AppId(app), Wish::new(class, ctx)?))
        })?;
        let Some((app_id, _)) = rows.first() else {
            return Err(DecodeError::Field { field: "wishes", reason: "1 to 16 wishes" });
        };
        let app_id = *app_id;
        if rows.iter().any(|(app, _)| *app != app_id) {
            return Err(DecodeError::Field { field: "app_id", reason: "one app for all wishes" });
        }
        let wishes: Vec<Wish> = rows.into_iter().map(|(_, wish)| wish).collect();
        let mut sorted: Vec<&Wish> = wishes.iter().collect();
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair.first() == pair.last()) {
            return Err(DecodeError::Field { field: "wishes", reason: "duplicate wish" });
        }
        Ok(Self { cluster_id, generation, beacon_pos, beacon, mode, evidence_hash, epk, nonce, app_id, wishes })
    }
}

/// `Intent`: the record that a release is about to happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    /// Names the request.
    pub req_hash: [u8; 32],
    /// Names the evidence.
    pub evidence_hash: [u8; 32],
    /// Generation of the root.
    pub generation: Generation,
    /// Who combines.
    pub mode: Mode,
    /// 0 in mode C, else the combining node.
    pub coordinator: NodeIndex,
    /// Beacon of the request.
    pub beacon_pos: u64,
    /// The app.
    pub app_id: AppId,
    /// Class and context hash of each wish, in the request's order.
    pub wishes: Vec<(KeyClass, [u8; 32])>,
}

impl Intent {
    /// `intent_id = SHA-256(Intent)`.
    #[must_use]
    pub fn id(&self) -> [u8; 32] {
        sha256(&[&self.encode()])
    }
}

impl Wire for Intent {
    const BYTES_MAX: usize = 1024;

    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-INTENT")
            .raw(&self.req_hash)
            .raw(&self.evidence_hash)
            .u32(self.generation.0)
            .u8(self.mode as u8)
            .u16(self.coordinator.0)
            .u64(self.beacon_pos)
            .raw(&self.app_id.0)
            .count1(self.wishes.len());
        for (class, ctx_hash) in &self.wishes {
            w.u8(class.byte()).raw(ctx_hash);
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-INTENT")?;
        let intent = Self {
            req_hash: r.array("req_hash")?,
            evidence_hash: r.array("evidence_hash")?,
            generation: Generation::read("generation", r)?,
            mode: Mode::read(r)?,
            coordinator: NodeIndex::read("coordinator", r)?,
            beacon_pos: r.u64("beacon_pos")?,
            app_id: AppId::read("app_id", r)?,
            wishes: {
                let count = usize::from(r.u8("wishes")?);
                if count == 0 || count > WISHES_MAX {
                    return Err(DecodeError::Field { field: "wishes", reason: "1 to 16 wishes" });
                }
                r.list("wishes", count, 33, |r| Ok((KeyClass::read(r)?, r.array("ctx_hash")?)))?
            },
        };
        if (intent.mode == Mode::Client) != (intent.coordinator.0 == 0) {
            return Err(DecodeError::Field { field: "coordinator", reason: "0 in mode C, a node otherwise" });
        }
        Ok(intent)
    }
}

/// `ask`: a request handed to a holder, early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// The request.
    pub request: RelReq,
    /// `r ‖ s` by the session key over `req_hash`.
    pub sig: [u8; 64],
    /// Beacon position of the session.
    pub session_pos: u64,
    /// DER of the session key's SPKI.
    pub spki: Vec<u8>,
    /// Evidence, or empty where the holder has judged its hash.
    pub evidence: Vec<u8>,
}

impl Wire for Ask {
    const BYTES_MAX: usize = EVIDENCE_BYTES_MAX + RELREQ_BYTES_MAX + SPKI_BYTES_MAX + 128;

    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-ASK").lp(&self.request.encode()).raw(&self.sig).u64(self.session_pos).lp(&self.spki).lp4(&self.evidence);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-ASK")?;
        Ok(Self {
            request: RelReq::decode(r.lp("request", RELREQ_BYTES_MAX)?)?,
            sig: r.array("sig")?,
            session_pos: r.u64("session_pos")?,
            spki: r.lp("spki", SPKI_BYTES_MAX)?.to_vec(),
            evidence: r.lp4("evidence", EVIDENCE_BYTES_MAX)?.to_vec(),
        })
    }
}

/// `go`: the intent is committed at `pos`; answer now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Go {
    /// Names the intent.
    pub intent_id: [u8; 32],
    /// Its leaf number.
    pub pos: u64,
}

impl Wire for Go {
    const BYTES_MAX: usize = 64;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-GO").raw(&self.intent_id).u64(self.pos);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-GO")?;
        Ok(Self { intent_id: r.array("intent_id")?, pos: r.u64("pos")? })
    }
}

/// `pt`: a holder's partial evaluations before sealing. Elements are canonical encodings, checked by `threshold`.
///
/// It holds partial secrets: keep it no longer than needed. The elements are wiped on drop; no `Clone`, no `Debug`. Whoever encodes it
/// wipes the encoding, which is written in one piece and leaves no copies behind.
#[derive(PartialEq, Eq)]
pub struct PartialPlain {
    /// Holder.
    pub index: NodeIndex,
    /// Generation of the root.
    pub generation: Generation,
    /// Epoch of the share.
    pub epoch: Epoch,
    /// Leaf number of the intent.
    pub pos: u64,
    /// Log size at the end of the intent's entry.
    pub size: u64,
    /// Log root at that size.
    pub log_root: [u8; 32],
    /// Verification key of the share.
    pub vk: [u8; 32],
    /// `Y_ij` in the order of the request.
    pub elements: Zeroizing<Vec<[u8; 32]>>,
    /// Challenge of the batch proof.
    pub c: [u8; 32],
    /// Response of the batch proof.
    pub s: [u8; 32],
}

impl Wire for PartialPlain {
    const BYTES_MAX: usize = 1024;
    fn write(&self, w: &mut Writer) {
        // Room for all of it: growing would leave copies of the elements in freed memory.
        w.reserve(Self::BYTES_MAX);
        w.raw(b"DKMS-V1-PARTIAL")
            .u16(self.index.0)
            .u32(self.generation.0)
            .u64(self.epoch.0)
            .u64(self.pos)
            .u64(self.size)
            .raw(&self.log_root)
            .raw(&self.vk)
            .count1(self.elements.len());
        for element in self.elements.iter() {
            w.raw(element);
        }
        w.raw(&self.c).raw(&self.s);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label("DKMS-V1-PARTIAL")?;
        Ok(Self {
            index: NodeIndex::read("i", r)?,
            generation: Generation::read("generation", r)?,
            epoch: Epoch::read("epoch", r)?,
            pos: r.u64("pos")?,
            size: r.u64("size")?,
            log_root: r.array("log_root")?,
            vk: r.array("vk")?,
            elements: {
                let count = usize::from(r.u8("elements")?);
                if count == 0 || count > WISHES_MAX {
                    return Err(DecodeError::Field { field: "elements", reason: "1 to 16 elements" });
                }
                let mut elements = Zeroizing::new(Vec::with_capacity(count));
                for _ in 0..count {
                    elements.push(r.array("element")?);
                }
                elements
            },
            c: r.array("c")?,
            s: r.array("s")?,
        })
    }
}

/// `out`: a sealed partial. Travels through any node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Out {
    /// Holder.
    pub index: NodeIndex,
    /// Epoch of the share.
    pub epoch: Epoch,
    /// HPKE's encapsulated key.
    pub kem: [u8; 32],
    /// Ciphertext of a [`PartialPlain`].
    pub ct: Vec<u8>,
}

/// Largest ciphertext of an [`Out`]: a partial and the AEAD tag.
pub const OUT_CT_BYTES_MAX: usize = PartialPlain::BYTES_MAX + 16;

impl Wire for Out {
    const BYTES_MAX: usize = OUT_CT_BYTES_MAX + 128;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-OUT").u16(self.index.0).u64(self.epoch.0).raw(&self.kem).lp(&self.ct);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-OUT")?;
        Ok(Self {
            index: NodeIndex::read("i", r)?,
            epoch: Epoch::read("epoch", r)?,
            kem: r.array("kem")?,
            ct: r.lp("ct", OUT_CT_BYTES_MAX)?.to_vec(),
        })
    }
}

/// HPKE `info` of a sealed partial (threshold.md §2.3).
#[must_use]
pub fn hpke_info(cluster_id: &ClusterId, generation: Generation, req_hash: &[u8; 32]) -> Vec<u8> {
    let mut w = Writer::labelled("DKMS-V1-HPKE");
    w.raw(&cluster_id.0).u32(generation.0).raw(req_hash);
    w.into_bytes()
}

/// HPKE `aad` of a sealed partial: `i(2) ‖ epoch(8)`.
#[must_use]
pub fn hpke_aad(index: NodeIndex, epoch: Epoch) -> [u8; 10] {
    let mut out = [0u8; 10];
    let (a, b) = out.split_at_mut(2);
    a.copy_from_slice(&index.0.to_be_bytes());
    b.copy_from_slice(&epoch.0.to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_low_order_are_known_in_every_form() {
        // 2^255 − 19 + k for k = −1, 0, 1, and small ones, with and without the bit that X25519 ignores.
        for (first, fill, last) in [(0, 0, 0), (1, 0, 0), (0xec, 0xff, 0x7f), (0xed, 0xff, 0x7f), (0xee, 0xff, 0x7f)] {
            let mut u = [fill; 32];
            (u[0], u[31]) = (first, last);
            assert!(is_low_order(u), "{u:?}");
            u[31] |= 0x80;
            assert!(is_low_order(u), "{u:?}");
        }
        let mut base = [0; 32];
        base[0] = 9;
        assert!(!is_low_order(base));
        assert!(!is_low_order([0xff; 32]));
    }
}
