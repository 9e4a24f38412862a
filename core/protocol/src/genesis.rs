//! The genesis document, from which the cluster id comes (threshold.md §1.6).
//!
//! Owns: its layout and the consistency rules that every node checks before it takes part. Never: judges collateral.

use crate::codec::{DecodeError, Reader, Wire, Writer, ascending, sha256};
use crate::ids::{ClusterId, Generation, Platform, RootTag, Seat};
use crate::limits::{
    ADDRESS_BYTES_MAX, CHAIN_SETTINGS_BYTES_MAX, GENESIS_BYTES_MAX, MEASUREMENT_BYTES_MAX, MEASUREMENTS_MAX, NODES_MAX, OPERATORS_MAX,
    PLATFORM_IDENTITY_BYTES_MAX,
};

/// Signature algorithm of the cluster root CA; permanent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum CaAlgorithm {
    /// FROST(Ed25519, SHA-512).
    Ed25519 = 1,
    /// Threshold ECDSA over P-256.
    P256 = 2,
}

/// Where policy comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Authority {
    /// k-of-m Ed25519 operators.
    OperatorQuorum = 1,
    /// Contracts.
    OnChain = 2,
}

/// A measurement whose nodes may take part.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AllowedNode {
    /// Platform of the node.
    pub platform: Platform,
    /// Canonical measurement, as `attest` proves it.
    pub measurement: Vec<u8>,
}

/// A seat and whom it is granted to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeatGrant {
    /// `1..=n`, in order.
    pub seat: Seat,
    /// `host:port` of its RA-TLS listener.
    pub address: String,
    /// PPID, chip id, EK or NSM instance.
    pub platform_identity: Vec<u8>,
}

/// The genesis document. Its bytes never change; its hash names the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Genesis {
    /// Makes two clusters of the same settings differ.
    pub random: [u8; 32],
    /// Seats.
    pub n: u16,
    /// Threshold of every root.
    pub t: u16,
    /// Lying signers tolerated by head certificates.
    pub f: u16,
    /// Algorithm of root `ca`.
    pub ca_algorithm: CaAlgorithm,
    /// Who decides policy.
    pub authority: Authority,
    /// Empty unless on chain.
    pub chain_settings: Vec<u8>,
    /// Approvals that an action needs.
    pub k: u8,
    /// Approvals that a revocation needs.
    pub r: u8,
    /// Timelock of actions, seconds.
    pub timelock_s: u64,
    /// Ed25519 keys, ascending.
    pub operators: Vec<[u8; 32]>,
    /// Allowed nodes, ascending.
    pub allowed_nodes: Vec<AllowedNode>,
    /// SHA-256 of the SPKI of each trusted software root, ascending; empty in production.
    pub software_roots: Vec<[u8; 32]>,
    /// Seats 1..=n in order.
    pub seats: Vec<SeatGrant>,
    /// Hash of the collateral bundle that travels with the document.
    pub collateral_id: [u8; 32],
}

/// `SHA-256("DKMS-V1-COLLATERAL" ‖ bundle)`.
#[must_use]
pub fn collateral_id(bundle: &[u8]) -> [u8; 32] {
    sha256(&[b"DKMS-V1-COLLATERAL", bundle])
}

impl Genesis {
    /// `SHA-256("DKMS-V1-CLUSTER" ‖ genesis)`.
    #[must_use]
    pub fn cluster_id(&self) -> ClusterId {
        ClusterId(sha256(&[b"DKMS-V1-CLUSTER", &self.encode()]))
    }

    /// Threshold that the policy of threshold.md §0 gives for `n` nodes: `⌊n/2⌋+1`.
    #[must_use]
    pub fn threshold_for(n: u16) -> u16 {
        n / 2 + 1
    }

    /// Whether the cluster has roots: a single node runs Raft only.
    #[must_use]
    pub fn has_roots(&self) -> bool {
        self.n >= 3
    }

    /// Signatures that certify a head: `⌊(N+f)/2⌋+1` of `N` signers.
    #[must_use]
    pub fn certificate_quorum(signers: usize, f: u16) -> usize {
        (signers + usize::from(f)) / 2 + 1
    }

    fn check(&self) -> Result<(), DecodeError> {
        let field = |field, reason| Err(DecodeError::Field { field, reason });
        if self.n == 0 || usize::from(self.n) > NODES_MAX || self.n == 2 {
            return field("n", "a cluster has 1 node, or 3 to 64");
        }
        if self.t != Self::threshold_for(self.n) {
            return field("t", "threshold is floor(n/2)+1");
        }
        // threshold.md §2.6: f ≥ 1 needs N ≥ 3f+1.
        if self.f > 0 && u32::from(self.n) < 3 * u32::from(self.f) + 1 {
            return field("f", "needs n >= 3f+1");
        }
        if usize::from(self.n) != self.seats.len() {
            return field("seats", "one seat for each node");
        }
        if !(1..=self.n).zip(&self.seats).all(|(number, grant)| grant.seat.0 == number) {
            return field("seats", "seats are 1..=n in order");
        }
        let mut identities: Vec<&[u8]> = self.seats.iter().map(|s| s.platform_identity.as_slice()).collect();
        identities.sort_unstable();
        if identities.windows(2).any(|pair| pair.first() == pair.last()) {
            return field("seats", "one seat for each platform identity");
        }
        match self.authority {
            Authority::OperatorQuorum => {
                if !self.chain_settings.is_empty() {
                    return field("chain_settings", "empty unless governance is on chain");
                }
                if self.k == 0 || usize::from(self.k) > self.operators.len() {
                    return field("k", "between 1 and the number of operators");
                }
                if self.r == 0 || self.r > self.k {
                    return field("r", "between 1 and k");
                }
            }
            Authority::OnChain => {
                if self.chain_settings.is_empty() {
                    return field("chain_settings", "needed when governance is on chain");
                }
            }
        }
        ascending("operators", self.operators.iter())?;
        ascending("allowed_nodes", self.allowed_nodes.iter())?;
        ascending("software_roots", self.software_roots.iter())
    }
}

impl Wire for Genesis {
    const BYTES_MAX: usize = GENESIS_BYTES_MAX;

    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-GENDOC")
            .raw(&self.random)
            .u16(self.n)
            .u16(self.t)
            .u16(self.f)
            .u8(self.ca_algorithm as u8)
            .u8(self.authority as u8)
            .lp(&self.chain_settings)
            .u8(self.k)
            .u8(self.r)
            .u64(self.timelock_s)
            .count1(self.operators.len());
        for key in &self.operators {
            w.raw(key);
        }
        w.count2(self.allowed_nodes.len());
        for node in &self.allowed_nodes {
            w.u8(node.platform.byte()).lp(&node.measurement);
        }
        w.count1(self.software_roots.len());
        for root in &self.software_roots {
            w.raw(root);
        }
        w.count2(self.seats.len());
        for grant in &self.seats {
            w.u16(grant.seat.0).lp(grant.address.as_bytes()).lp(&grant.platform_identity);
        }
        w.raw(&self.collateral_id);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-GENDOC")?;
        let random = r.array("random")?;
        let (n, t, f) = (r.u16("n")?, r.u16("t")?, r.u16("f")?);
        let ca_algorithm = match r.u8("ca_alg")? {
            1 => CaAlgorithm::Ed25519,
            2 => CaAlgorithm::P256,
            _ => {
                return Err(DecodeError::Field { field: "ca_alg", reason: "unknown algorithm" });
            }
        };
        let authority = match r.u8("governance")? {
            1 => Authority::OperatorQuorum,
            2 => Authority::OnChain,
            _ => {
                return Err(DecodeError::Field { field: "governance", reason: "unknown authority" });
            }
        };
        let chain_settings = r.lp("chain_settings", CHAIN_SETTINGS_BYTES_MAX)?.to_vec();
        let (k, r_quorum, timelock_s) = (r.u8("k")?, r.u8("r")?, r.u64("timelock_s")?);
        let count = usize::from(r.u8("operators")?);
        if count > OPERATORS_MAX {
            return Err(DecodeError::TooLong { field: "operators", max: OPERATORS_MAX, got: count });
        }
        let operators = r.list("operators", count, 32, |r| r.array("operator_pk"))?;
        let count = usize::from(r.u16("allowed_nodes")?);
        if count > MEASUREMENTS_MAX {
            return Err(DecodeError::TooLong { field: "allowed_nodes", max: MEASUREMENTS_MAX, got: count });
        }
        let allowed_nodes = r.list("allowed_nodes", count, 3, |r| {
            Ok(AllowedNode { platform: Platform::read(r)?, measurement: r.lp("measurement", MEASUREMENT_BYTES_MAX)?.to_vec() })
        })?;
        let count = usize::from(r.u8("software_roots")?);
        let software_roots = r.list("software_roots", count, 32, |r| r.array("software_root"))?;
        let count = usize::from(r.u16("seats")?);
        let seats = r.list("seats", count, 6, |r| {
            Ok(SeatGrant {
                seat: Seat::read("seat", r)?,
                address: text("address", r.lp("address", ADDRESS_BYTES_MAX)?)?,
                platform_identity: r.lp("platform_identity", PLATFORM_IDENTITY_BYTES_MAX)?.to_vec(),
            })
        })?;
        let genesis = Self {
            random,
            n,
            t,
            f,
            ca_algorithm,
            authority,
            chain_settings,
            k,
            r: r_quorum,
            timelock_s,
            operators,
            allowed_nodes,
            software_roots,
            seats,
            collateral_id: r.array("collateral_id")?,
        };
        genesis.check()?;
        Ok(genesis)
    }
}

/// UTF-8 text of a field.
pub(crate) fn text(field: &'static str, bytes: &[u8]) -> Result<String, DecodeError> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| DecodeError::Field { field, reason: "not UTF-8" })
}

/// One node's proof that a root was born in attested nodes (threshold.md §1.6 "Genesis certificate").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenesisCertificate {
    /// Seat of the node that speaks.
    pub seat: Seat,
    /// Generation of the root.
    pub generation: Generation,
    /// Which root.
    pub root: RootTag,
    /// Its public key.
    pub public_key: Vec<u8>,
    /// Transcript of the ceremony.
    pub transcript: [u8; 32],
    /// Evidence whose report data is [`crate::binding::genesis_certificate`].
    pub evidence: Vec<u8>,
}

impl Wire for GenesisCertificate {
    const BYTES_MAX: usize = crate::limits::EVIDENCE_BYTES_MAX + 512;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-GENCERT")
            .u16(self.seat.0)
            .u32(self.generation.0)
            .u8(self.root.byte())
            .lp(&self.public_key)
            .raw(&self.transcript)
            .lp4(&self.evidence);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-GENCERT")?;
        Ok(Self {
            seat: Seat::read("seat", r)?,
            generation: Generation::read("generation", r)?,
            root: RootTag::read(r)?,
            public_key: r.lp("public_key", 64)?.to_vec(),
            transcript: r.array("transcript")?,
            evidence: r.lp4("evidence", crate::limits::EVIDENCE_BYTES_MAX)?.to_vec(),
        })
    }
}
