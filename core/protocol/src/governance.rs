//! Actions, approvals and entries of the operator quorum (architecture.md §9).

use crate::codec::{DecodeError, Reader, Wire, Writer, sha256};
use crate::ids::{AppId, ClusterId, Generation, NodeIndex, Platform, Seat, UnixMillis};
use crate::limits::{ACTION_BYTES_MAX, APPROVALS_MAX, MEASUREMENT_BYTES_MAX, NODES_MAX, POLICY_BYTES_MAX};

/// What an action does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum ActionKind {
    /// Set an app's policy; the first registers the app.
    SetAppPolicy = 0x01,
    /// Revoke at once.
    Revoke = 0x02,
    /// Undo a revocation.
    Unrevoke = 0x03,
    /// Set operators, k, r.
    SetOperators = 0x04,
    /// Grant a seat, set a standing rule.
    GrantSeat = 0x05,
    /// Set n, t, f, timelock, quotas.
    SetSettings = 0x06,
    /// Allow a node measurement.
    AllowNodeMeasurement = 0x07,
    /// Begin a new generation.
    NewGeneration = 0x08,
    /// Destroy a generation.
    DestroyGeneration = 0x09,
    /// Resume after a full stop.
    Resume = 0x0a,
    /// Set the policy of apps that only the authority knows (ADR 0024).
    SetDelegation = 0x0b,
}

impl ActionKind {
    /// The kind of that byte.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::SetAppPolicy,
            Self::Revoke,
            Self::Unrevoke,
            Self::SetOperators,
            Self::GrantSeat,
            Self::SetSettings,
            Self::AllowNodeMeasurement,
            Self::NewGeneration,
            Self::DestroyGeneration,
            Self::Resume,
            Self::SetDelegation,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }

    /// Whether the action waits for the timelock.
    #[must_use]
    pub fn has_timelock(self) -> bool {
        !matches!(self, Self::Revoke | Self::Resume)
    }
}

/// What an action is about: type and canonical id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Object {
    /// An app.
    App(AppId),
    /// A measurement: of a node, or an app's compose hash or image hash.
    Measurement(Vec<u8>),
    /// A platform.
    Platform(Platform),
    /// A seat.
    Seat(Seat),
    /// The operators.
    Operators,
    /// The settings.
    Settings,
    /// A generation.
    Generation(Generation),
    /// The delegation of apps to the authority.
    Delegation,
}

impl Object {
    fn type_byte(&self) -> u8 {
        match self {
            Self::App(_) => 1,
            Self::Measurement(_) => 2,
            Self::Platform(_) => 3,
            Self::Seat(_) => 4,
            Self::Operators => 5,
            Self::Settings => 6,
            Self::Generation(_) => 7,
            Self::Delegation => 8,
        }
    }

    /// `object_id` bytes.
    #[must_use]
    pub fn id(&self) -> Vec<u8> {
        match self {
            Self::App(app) => app.0.to_vec(),
            Self::Measurement(bytes) => bytes.clone(),
            Self::Platform(platform) => vec![platform.byte()],
            Self::Seat(seat) => seat.0.to_be_bytes().to_vec(),
            Self::Operators | Self::Settings | Self::Delegation => Vec::new(),
            Self::Generation(generation) => generation.0.to_be_bytes().to_vec(),
        }
    }

    /// Appends `object_type ‖ lp(object_id)`.
    pub fn write(&self, w: &mut Writer) {
        w.u8(self.type_byte()).lp(&self.id());
    }

    /// Reads `object_type ‖ lp(object_id)`.
    ///
    /// # Errors
    /// [`DecodeError::Field`] when the id does not fit the type.
    pub fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let bad = DecodeError::Field { field: "object_id", reason: "does not fit the object type" };
        let kind = r.u8("object_type")?;
        let id = r.lp("object_id", MEASUREMENT_BYTES_MAX)?;
        match kind {
            1 => id.try_into().map(|b| Self::App(AppId(b))).map_err(|_| bad),
            2 if !id.is_empty() => Ok(Self::Measurement(id.to_vec())),
            3 => match id {
                [byte] => Platform::from_byte(*byte).map(Self::Platform).ok_or(bad),
                _ => Err(bad),
            },
            4 => id.try_into().map(|b| Self::Seat(Seat(u16::from_be_bytes(b)))).map_err(|_| bad),
            5 if id.is_empty() => Ok(Self::Operators),
            6 if id.is_empty() => Ok(Self::Settings),
            7 => id.try_into().map(|b| Self::Generation(Generation(u32::from_be_bytes(b)))).map_err(|_| bad),
            8 if id.is_empty() => Ok(Self::Delegation),
            _ => Err(bad),
        }
    }
}

/// `Action`: what operators sign.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Action {
    /// Cluster.
    pub cluster_id: ClusterId,
    /// Random, never reused.
    pub action_id: [u8; 16],
    /// What it does.
    pub kind: ActionKind,
    /// To what.
    pub object: Object,
    /// Version of the object that the action builds on.
    pub base_version: u64,
    /// Body of the kind.
    pub body: Vec<u8>,
    /// Void after this log time.
    pub not_after: UnixMillis,
}

impl Wire for Action {
    const BYTES_MAX: usize = ACTION_BYTES_MAX;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-GOV").raw(&self.cluster_id.0).raw(&self.action_id).u8(self.kind as u8);
        self.object.write(w);
        w.u64(self.base_version).lp(&self.body).u64(self.not_after.0);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-GOV")?;
        let action = Self {
            cluster_id: ClusterId::read("cluster_id", r)?,
            action_id: r.array("action_id")?,
            kind: ActionKind::from_byte(r.u8("kind")?).ok_or(DecodeError::Field { field: "kind", reason: "unknown action" })?,
            object: Object::read(r)?,
            base_version: r.u64("base_version")?,
            body: r.lp("body", POLICY_BYTES_MAX)?.to_vec(),
            not_after: UnixMillis::read("not_after", r)?,
        };
        let fits = match action.kind {
            ActionKind::SetAppPolicy => matches!(action.object, Object::App(_)),
            ActionKind::Revoke | ActionKind::Unrevoke => {
                !matches!(action.object, Object::Operators | Object::Settings) && action.body.is_empty()
            }
            ActionKind::SetOperators => matches!(action.object, Object::Operators),
            ActionKind::GrantSeat => matches!(action.object, Object::Seat(_)),
            ActionKind::SetSettings | ActionKind::Resume => {
                matches!(action.object, Object::Settings)
            }
            ActionKind::AllowNodeMeasurement => matches!(action.object, Object::Measurement(_)),
            ActionKind::NewGeneration | ActionKind::DestroyGeneration => {
                matches!(action.object, Object::Generation(_))
            }
            ActionKind::SetDelegation => matches!(action.object, Object::Delegation),
        };
        if fits { Ok(action) } else { Err(DecodeError::Field { field: "object", reason: "does not fit the action" }) }
    }
}

/// `approval = operator_pk(32) ‖ Sign(operator, Action)(64)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Approval {
    /// Operator.
    pub operator: [u8; 32],
    /// Ed25519 over the action's encoding.
    pub sig: [u8; 64],
}

/// `mono`: a holder's word on how long ago, by its monotonic clock, it applied the proposal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mono {
    /// Holder.
    pub index: NodeIndex,
    /// Elapsed, ms.
    pub elapsed_ms: u64,
    /// Ed25519 over [`Mono::signed_bytes`].
    pub sig: [u8; 64],
}

impl Mono {
    /// `"DKMS-V1-MONO" ‖ cluster_id ‖ action_id ‖ i ‖ elapsed_ms`.
    #[must_use]
    pub fn signed_bytes(&self, cluster_id: &ClusterId, action_id: &[u8; 16]) -> Vec<u8> {
        let mut w = Writer::labelled("DKMS-V1-MONO");
        w.raw(&cluster_id.0).raw(action_id).u16(self.index.0).u64(self.elapsed_ms);
        w.into_bytes()
    }
}

/// A governance entry of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// Brings an action, with its first approvals.
    Propose {
        /// The action.
        action: Action,
        /// Approvals.
        approvals: Vec<Approval>,
    },
    /// Brings more approvals.
    Approve {
        /// The action.
        action_id: [u8; 16],
        /// Approvals.
        approvals: Vec<Approval>,
    },
    /// Ends the timelock.
    Activate {
        /// The action.
        action_id: [u8; 16],
        /// Monotonic readings.
        monos: Vec<Mono>,
    },
}

fn write_approvals(w: &mut Writer, approvals: &[Approval]) {
    w.count1(approvals.len());
    for approval in approvals {
        w.raw(&approval.operator).raw(&approval.sig);
    }
}

fn read_approvals(r: &mut Reader<'_>) -> Result<Vec<Approval>, DecodeError> {
    let count = usize::from(r.u8("approvals")?);
    if count > APPROVALS_MAX {
        return Err(DecodeError::TooLong { field: "approvals", max: APPROVALS_MAX, got: count });
    }
    r.list("approvals", count, 96, |r| Ok(Approval { operator: r.array("operator")?, sig: r.array("sig")? }))
}

impl Wire for Entry {
    const BYTES_MAX: usize = ACTION_BYTES_MAX + 96 * APPROVALS_MAX + 74 * NODES_MAX + 64;
    fn write(&self, w: &mut Writer) {
        match self {
            Self::Propose { action, approvals } => {
                w.u8(1).lp4(&action.encode());
                write_approvals(w, approvals);
            }
            Self::Approve { action_id, approvals } => {
                w.u8(2).raw(action_id);
                write_approvals(w, approvals);
            }
            Self::Activate { action_id, monos } => {
                w.u8(3).raw(action_id).count2(monos.len());
                for mono in monos {
                    w.u16(mono.index.0).u64(mono.elapsed_ms).raw(&mono.sig);
                }
            }
        }
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match r.u8("entry")? {
            1 => Ok(Self::Propose { action: Action::decode(r.lp4("action", ACTION_BYTES_MAX)?)?, approvals: read_approvals(r)? }),
            2 => Ok(Self::Approve { action_id: r.array("action_id")?, approvals: read_approvals(r)? }),
            3 => Ok(Self::Activate {
                action_id: r.array("action_id")?,
                monos: {
                    let count = usize::from(r.u16("monos")?);
                    if count > NODES_MAX {
                        return Err(DecodeError::TooLong { field: "monos", max: NODES_MAX, got: count });
                    }
                    r.list("monos", count, 74, |r| {
                        Ok(Mono { index: NodeIndex::read("i", r)?, elapsed_ms: r.u64("elapsed_ms")?, sig: r.array("sig")? })
                    })?
                },
            }),
            _ => Err(DecodeError::Field { field: "entry", reason: "unknown governance entry" }),
        }
    }
}

/// Body of [`ActionKind::SetOperators`]: `k ‖ r ‖ count ‖ { operator_pk }* ascending`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperatorsBody {
    /// Approvals that an action needs.
    pub k: u8,
    /// Approvals that a revocation needs.
    pub r: u8,
    /// Keys, ascending.
    pub operators: Vec<[u8; 32]>,
}

impl Wire for OperatorsBody {
    const BYTES_MAX: usize = 3 + 32 * APPROVALS_MAX;
    fn write(&self, w: &mut Writer) {
        w.u8(self.k).u8(self.r).count1(self.operators.len());
        for key in &self.operators {
            w.raw(key);
        }
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (k, r_quorum) = (r.u8("k")?, r.u8("r")?);
        let count = usize::from(r.u8("operators")?);
        let operators: Vec<[u8; 32]> = r.list("operators", count, 32, |r| r.array("operator_pk"))?;
        crate::codec::ascending("operators", operators.iter())?;
        if k == 0 || usize::from(k) > operators.len() || r_quorum == 0 || r_quorum > k {
            return Err(DecodeError::Field { field: "k", reason: "1 <= r <= k <= operators" });
        }
        Ok(Self { k, r: r_quorum, operators })
    }
}

/// `policy_hash = SHA-256("DKMS-V1-POLICY" ‖ body)`.
#[must_use]
pub fn policy_hash(body: &[u8]) -> [u8; 32] {
    sha256(&[b"DKMS-V1-POLICY", body])
}
