//! Bodies of the native API: client to node, and node to node beside Raft.
//!
//! Owns: layouts and paths. A refusal travels as [`crate::Refusal`] under its HTTP status, content type
//! `application/x-dkms`.

use crate::codec::{DecodeError, Reader, Wire, Writer, ascending};
use crate::genesis::Genesis;
use crate::ids::{ClusterId, Generation, NodeIndex, Seat, UnixMillis};
use crate::limits::{FRAME_BYTES_MAX, GENESIS_BYTES_MAX, NODES_MAX, RELREQ_BYTES_MAX};
use crate::receipt::Receipt;
use crate::release::{Out, RelReq};

/// Media type of every binary body.
pub const MEDIA_TYPE: &str = "application/x-dkms";
/// Request id header, from the agent to the audit record.
pub const REQUEST_ID_HEADER: &str = "x-dkms-request-id";

/// Client: latest certified beacon. GET, anonymous. Answer [`BeaconAnswer`].
pub const PATH_BEACON: &str = "/v1/beacon";
/// Client: the cluster's nodes. GET, anonymous. Answer [`NodesAnswer`].
pub const PATH_NODES: &str = "/v1/nodes";
/// Client: release. POST [`ReleaseAsk`], session certificate. Answer [`ReleaseAnswer`].
pub const PATH_RELEASE: &str = "/v1/release";
/// Client: an app's claim to its secp256k1 key. POST [`crate::sign::AppPkClaim`]; the claim decides. Answer: `r(32) ‖ s(32) ‖ recid(1)` by
/// the cluster's identity.
pub const PATH_APP_KEY: &str = "/v1/app-key";
/// Client: certificate of root `ca`, DER. GET, anonymous. It is public, and what it is of is pinned.
pub const PATH_ROOT_CA: &str = "/v1/root-ca";
/// Largest answer of [`PATH_ROOT_CA`].
pub const ROOT_CA_BYTES_MAX: usize = 8 * 1024;
/// Client: genesis certificate of root `prf`. GET. Answer [`crate::genesis::GenesisCertificate`].
pub const PATH_GENESIS_CERTIFICATE: &str = "/v1/genesis-certificate";
/// Client: governance entry. POST [`crate::governance::Entry`]. Answer [`crate::command::CommandAnswer`].
pub const PATH_GOVERNANCE: &str = "/v1/governance";
/// Client: collateral from an operator. POST [`crate::collateral::PinRequest`]. Answer [`crate::command::CommandAnswer`].
pub const PATH_COLLATERAL: &str = "/v1/collateral";
/// Client: pending action by hex id: `/v1/action/{id}`. Answer [`crate::governance::Action`].
pub const PATH_ACTION: &str = "/v1/action";
/// Client: policy of an app by hex id: `/v1/policy/{app_id}`. Answer JSON.
pub const PATH_POLICY: &str = "/v1/policy";
/// Client: what the log has of an app's env key: `/v1/env-key/{app_id}`. GET. Answer JSON.
pub const PATH_ENV_KEY: &str = "/v1/env-key";
/// Client: an attempt to compute an app's env key, signed by an operator. POST [`crate::env::EnvAttempt`]. Answer
/// [`crate::command::CommandAnswer`].
pub const PATH_ENV_ATTEMPT: &str = "/v1/env-attempt";
/// Client: status. GET. Answer JSON.
pub const PATH_STATUS: &str = "/v1/status";

/// Node: Raft RPC, kind in the last segment.
pub const PATH_PEER_RAFT: &str = "/peer/raft";
/// Node: hand a request to a holder. POST [`crate::release::Ask`]. Answer: empty.
pub const PATH_PEER_ASK: &str = "/peer/ask";
/// Node: the intent is committed. POST [`crate::release::Go`]. Answer [`crate::release::Out`].
pub const PATH_PEER_GO: &str = "/peer/go";
/// Node: propose at the leader. POST [`crate::command::Command`]. Answer [`crate::command::CommandAnswer`].
pub const PATH_PEER_PROPOSE: &str = "/peer/propose";
/// Node: a signed head. POST [`crate::log::SignedHead`]. Answer: empty.
pub const PATH_PEER_HEAD: &str = "/peer/head";
/// Node: a certificate. GET `/peer/certificate/{size}`. Answer [`crate::log::HeadCert`].
pub const PATH_PEER_CERTIFICATE: &str = "/peer/certificate";
/// Node: clock reading. POST [`ClockAsk`]. Answer: one reading's encoding.
pub const PATH_PEER_CLOCK: &str = "/peer/clock";
/// Node: monotonic reading for an action. POST action id (16 bytes). Answer [`crate::governance::Mono`] as `i ‖ elapsed_ms ‖ sig`.
pub const PATH_PEER_MONO: &str = "/peer/mono";
/// What evidence needed at a node and the pinned collateral lacks, told to the leader.
pub const PATH_PEER_WANTS: &str = "/peer/wants";
/// A node hands another its message of the pairwise setup of an ECDSA root.
pub const PATH_PEER_SIGN_SETUP: &str = "/peer/sign/setup";
/// A node that has no secrets of a pair, or other ones than the peer, asks for a setup between the two.
pub const PATH_PEER_SIGN_PAIR: &str = "/peer/sign/pair";
/// It asks whether the other one has taken what came out into use.
pub const PATH_PEER_SIGN_PAIR_DONE: &str = "/peer/sign/pair/done";
/// A coordinator asks a signer for its FROST commitments.
pub const PATH_PEER_SIGN_COMMIT: &str = "/peer/sign/commit";
/// A coordinator asks a signer for its FROST signature share.
pub const PATH_PEER_SIGN_SHARE: &str = "/peer/sign/share";
/// A coordinator asks a signer to take part in an ECDSA run; the answer is the signature.
pub const PATH_PEER_SIGN_RUN: &str = "/peer/sign/run";
/// A signer hands another its message of an ECDSA run.
pub const PATH_PEER_SIGN_ROUND: &str = "/peer/sign/round";

/// Latest certified beacon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BeaconAnswer {
    /// Cluster.
    pub cluster_id: ClusterId,
    /// Newest generation in use.
    pub generation: Generation,
    /// Position.
    pub beacon_pos: u64,
    /// Value.
    pub beacon: [u8; 32],
    /// Log time of the beacon.
    pub log_time: UnixMillis,
}

impl Wire for BeaconAnswer {
    const BYTES_MAX: usize = 128;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-BEACON")
            .raw(&self.cluster_id.0)
            .u32(self.generation.0)
            .u64(self.beacon_pos)
            .raw(&self.beacon)
            .u64(self.log_time.0);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-BEACON")?;
        Ok(Self {
            cluster_id: ClusterId::read("cluster_id", r)?,
            generation: Generation::read("generation", r)?,
            beacon_pos: r.u64("beacon_pos")?,
            beacon: r.array("beacon")?,
            log_time: UnixMillis::read("log_time", r)?,
        })
    }
}

/// The cluster's nodes, as one of them sees them.
///
/// The document proves its addresses to whoever knows the cluster id, which is its hash. The seats are the answering node's word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodesAnswer {
    /// Whose addresses are meant, by seat.
    pub genesis: Genesis,
    /// The seat of the node that answers.
    pub own: Seat,
    /// Seats that are filled and not revoked, ascending; each one of the document.
    pub seats: Vec<Seat>,
}

impl Wire for NodesAnswer {
    const BYTES_MAX: usize = GENESIS_BYTES_MAX + 2 * NODES_MAX + 64;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-NODES").lp4(&self.genesis.encode()).u16(self.own.0).count1(self.seats.len());
        for seat in &self.seats {
            w.u16(seat.0);
        }
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-NODES")?;
        let genesis = Genesis::decode(r.lp4("genesis", GENESIS_BYTES_MAX)?)?;
        let own = Seat::read("own", r)?;
        let count = usize::from(r.u8("seats")?);
        if count > NODES_MAX {
            return Err(DecodeError::TooLong { field: "seats", max: NODES_MAX, got: count });
        }
        let seats = r.list("seats", count, 2, |r| Seat::read("seat", r))?;
        ascending("seats", seats.iter())?;
        let of_the_document = 1..=genesis.n;
        for (field, seat) in seats.iter().map(|seat| ("seats", seat)).chain([("own", &own)]) {
            if !of_the_document.contains(&seat.0) {
                return Err(DecodeError::Field { field, reason: "no seat of the genesis document" });
            }
        }
        Ok(Self { genesis, own, seats })
    }
}

const _: () = assert!(NodesAnswer::BYTES_MAX <= FRAME_BYTES_MAX);

/// A client's release request. SPKI, evidence and session position come from its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseAsk {
    /// The request.
    pub request: RelReq,
    /// `r ‖ s` by the session key over `req_hash`.
    pub sig: [u8; 64],
    /// Holders whose partials the client found bad: others are asked.
    pub exclude: Vec<NodeIndex>,
}

impl Wire for ReleaseAsk {
    const BYTES_MAX: usize = RELREQ_BYTES_MAX + 256 + 2 * NODES_MAX;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-RELASK").lp(&self.request.encode()).raw(&self.sig).count1(self.exclude.len());
        for i in &self.exclude {
            w.u16(i.0);
        }
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-RELASK")?;
        Ok(Self {
            request: RelReq::decode(r.lp("request", RELREQ_BYTES_MAX)?)?,
            sig: r.array("sig")?,
            exclude: {
                let count = usize::from(r.u8("exclude")?);
                if count > NODES_MAX {
                    return Err(DecodeError::TooLong { field: "exclude", max: NODES_MAX, got: count });
                }
                r.list("exclude", count, 2, |r| NodeIndex::read("i", r))?
            },
        })
    }
}

/// Answer to a release: receipt and sealed partials, one per holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseAnswer {
    /// Proof that the intent is in the log.
    pub receipt: Receipt,
    /// Sealed partials.
    pub outs: Vec<Out>,
}

impl Wire for ReleaseAnswer {
    const BYTES_MAX: usize = Receipt::BYTES_MAX + NODES_MAX * (Out::BYTES_MAX + 2) + 64;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-RELANS").lp(&self.receipt.encode()).count1(self.outs.len());
        for out in &self.outs {
            w.lp(&out.encode());
        }
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-RELANS")?;
        Ok(Self {
            receipt: Receipt::decode(r.lp("receipt", Receipt::BYTES_MAX)?)?,
            outs: {
                let count = usize::from(r.u8("outs")?);
                if count > NODES_MAX {
                    return Err(DecodeError::TooLong { field: "outs", max: NODES_MAX, got: count });
                }
                r.list("outs", count, 2, |r| Out::decode(r.lp("out", Out::BYTES_MAX)?))?
            },
        })
    }
}

/// The leader asks a voter for its clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockAsk {
    /// Latest beacon's position, 0 before the first.
    pub prev_beacon_pos: u64,
    /// Its value, the cluster id before the first.
    pub prev_beacon: [u8; 32],
}

impl Wire for ClockAsk {
    const BYTES_MAX: usize = 64;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-CLKASK").u64(self.prev_beacon_pos).raw(&self.prev_beacon);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-CLKASK")?;
        Ok(Self { prev_beacon_pos: r.u64("prev_beacon_pos")?, prev_beacon: r.array("prev_beacon")? })
    }
}
