//! The typed objects that the roots sign, and nothing else is signed (threshold.md §5.1, §5.2).
//!
//! Owns: their layout, their keys, the digests of root `id`. Never: a certificate (`dstack-certificates` builds it from these fields).

use sha3::Digest as _;

use crate::codec::{DecodeError, Reader, Wire, Writer, ascending, sha256};
use crate::ids::{AppId, Generation, NodeIndex, RootTag};
use crate::limits::{HOST_BYTES_MAX, ISSUING_HOSTS_MAX};

/// Something that a root signs. Public keys of P-256 and secp256k1 are SEC1 compressed.
///
/// `"DKMS-V1-SIGNOBJ" ‖ version(1)=1 ‖ kind(1) ‖ generation(4) ‖ fields` in the order below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignObject {
    /// 0x01: the root's own certificate.
    RootCa {
        /// Generation of the root.
        generation: Generation,
    },
    /// 0x02: an app's CA.
    AppCa {
        /// Generation of the root.
        generation: Generation,
        /// The app.
        app_id: AppId,
        /// Its CA key (class 0x05), P-256.
        public_key: [u8; 33],
    },
    /// 0x03: a node's issuing CA.
    IssuingCa {
        /// Generation of the root.
        generation: Generation,
        /// The node.
        index: NodeIndex,
        /// Key made in the node, P-256.
        public_key: [u8; 33],
        /// The node's host names and IP addresses, ascending, 1 to 8; see [`host_is_well_formed`].
        hosts: Vec<String>,
    },
    /// 0x04: the statement that a later generation's `PK_prf` is this (threshold.md §1.6).
    Generation {
        /// The generation stated.
        generation: Generation,
        /// Its `PK_prf`.
        pk_prf: [u8; 32],
    },
    /// 0x05: an app's secp256k1 key.
    AppKey {
        /// Generation of the root.
        generation: Generation,
        /// The app.
        app_id: AppId,
        /// Its key (class 0x03), secp256k1.
        app_pk: [u8; 33],
    },
    /// 0x06: an app's env key, dstack's form without a date.
    EnvKey {
        /// Generation of the root.
        generation: Generation,
        /// The app.
        app_id: AppId,
        /// Its env public key, X25519.
        envpub: [u8; 32],
    },
    /// 0x07: an app's env key with a date.
    EnvKeyAt {
        /// Generation of the root.
        generation: Generation,
        /// The app.
        app_id: AppId,
        /// Its env public key, X25519.
        envpub: [u8; 32],
        /// Unix seconds: log time of the ask.
        timestamp_s: u64,
    },
}

/// What an object is pinned by: one key, one object (or the latest, for those that are asked for again).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SignKey {
    /// The root's certificate.
    RootCa(Generation),
    /// An app's CA.
    AppCa(Generation, AppId),
    /// A node's issuing CA.
    IssuingCa(Generation, NodeIndex),
    /// A generation's statement.
    Generation(Generation),
    /// An app's key.
    AppKey(Generation, AppId),
    /// An app's env key.
    EnvKey(Generation, AppId),
    /// An app's env key with a date.
    EnvKeyAt(Generation, AppId),
}

impl SignObject {
    /// Generation of the root that signs.
    #[must_use]
    pub fn generation(&self) -> Generation {
        match self {
            Self::RootCa { generation }
            | Self::AppCa { generation, .. }
            | Self::IssuingCa { generation, .. }
            | Self::Generation { generation, .. }
            | Self::AppKey { generation, .. }
            | Self::EnvKey { generation, .. }
            | Self::EnvKeyAt { generation, .. } => *generation,
        }
    }

    /// The root that signs it.
    #[must_use]
    pub fn root(&self) -> RootTag {
        match self {
            Self::RootCa { .. } | Self::AppCa { .. } | Self::IssuingCa { .. } | Self::Generation { .. } => RootTag::Ca,
            Self::AppKey { .. } | Self::EnvKey { .. } | Self::EnvKeyAt { .. } => RootTag::Id,
        }
    }

    /// What it is pinned by.
    #[must_use]
    pub fn key(&self) -> SignKey {
        match self {
            Self::RootCa { generation } => SignKey::RootCa(*generation),
            Self::AppCa { generation, app_id, .. } => SignKey::AppCa(*generation, *app_id),
            Self::IssuingCa { generation, index, .. } => SignKey::IssuingCa(*generation, *index),
            Self::Generation { generation, .. } => SignKey::Generation(*generation),
            Self::AppKey { generation, app_id, .. } => SignKey::AppKey(*generation, *app_id),
            Self::EnvKey { generation, app_id, .. } => SignKey::EnvKey(*generation, *app_id),
            Self::EnvKeyAt { generation, app_id, .. } => SignKey::EnvKeyAt(*generation, *app_id),
        }
    }

    /// The app it is about, if any.
    #[must_use]
    pub fn app_id(&self) -> Option<&AppId> {
        match self {
            Self::AppCa { app_id, .. } | Self::AppKey { app_id, .. } | Self::EnvKey { app_id, .. } | Self::EnvKeyAt { app_id, .. } => {
                Some(app_id)
            }
            Self::RootCa { .. } | Self::IssuingCa { .. } | Self::Generation { .. } => None,
        }
    }

    /// The Keccak-256 digest that root `id` signs (KMS API reference §6); `None` for objects of root `ca`.
    #[must_use]
    pub fn identity_digest(&self) -> Option<[u8; 32]> {
        match self {
            Self::AppKey { app_id, app_pk, .. } => Some(keccak256(&[b"dstack-kms-issued", b":", &app_id.0, app_pk])),
            Self::EnvKey { app_id, envpub, .. } => Some(keccak256(&[b"dstack-env-encrypt-pubkey", b":", &app_id.0, envpub])),
            Self::EnvKeyAt { app_id, envpub, timestamp_s, .. } => {
                Some(keccak256(&[b"dstack-env-encrypt-pubkey", b":", &app_id.0, &timestamp_s.to_be_bytes(), envpub]))
            }
            Self::RootCa { .. } | Self::AppCa { .. } | Self::IssuingCa { .. } | Self::Generation { .. } => None,
        }
    }

    /// SHA-256 of the encoding.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        sha256(&[&self.encode()])
    }
}

/// Keccak-256 of the parts one after the other.
pub(crate) fn keccak256(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = sha3::Keccak256::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// Whether a host is an IP address in its one spelling, or a DNS name: lower-case letters, digits and dashes in labels of 1 to 63
/// bytes that neither begin nor end with a dash, 253 bytes together.
#[must_use]
pub fn host_is_well_formed(host: &str) -> bool {
    if let Ok(address) = host.parse::<std::net::IpAddr>() {
        return address.to_string() == host;
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // A last label of digits would read as an address elsewhere.
    let named = host.rsplit('.').next().is_some_and(|last| last.bytes().any(|byte| !byte.is_ascii_digit()));
    host.len() <= HOST_BYTES_MAX && named && host.split('.').all(label)
}

/// A compressed point by its first byte; whether it is on the curve is for who uses it.
pub(super) fn point(field: &'static str, r: &mut Reader<'_>) -> Result<[u8; 33], DecodeError> {
    let bytes: [u8; 33] = r.array(field)?;
    if matches!(bytes.first(), Some(2 | 3)) { Ok(bytes) } else { Err(DecodeError::Field { field, reason: "not a compressed point" }) }
}

/// An index that a node may have.
fn node(r: &mut Reader<'_>) -> Result<NodeIndex, DecodeError> {
    let index = NodeIndex::read("i", r)?;
    if (1..0x8000).contains(&index.0) { Ok(index) } else { Err(DecodeError::Field { field: "i", reason: "not the index of a node" }) }
}

fn hosts(r: &mut Reader<'_>) -> Result<Vec<String>, DecodeError> {
    let count = usize::from(r.u8("hosts")?);
    if count == 0 || count > ISSUING_HOSTS_MAX {
        return Err(DecodeError::Field { field: "hosts", reason: "1 to 8 hosts" });
    }
    let hosts = r.list("hosts", count, 3, |r| {
        let host = crate::genesis::text("host", r.lp("host", HOST_BYTES_MAX)?)?;
        if host_is_well_formed(&host) { Ok(host) } else { Err(DecodeError::Field { field: "host", reason: "not a host name or address" }) }
    })?;
    ascending("hosts", hosts.iter())?;
    Ok(hosts)
}

impl Wire for SignObject {
    const BYTES_MAX: usize = 128 + (2 + HOST_BYTES_MAX) * ISSUING_HOSTS_MAX;

    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-SIGNOBJ");
        match self {
            Self::RootCa { generation } => w.u8(1).u32(generation.0),
            Self::AppCa { generation, app_id, public_key } => w.u8(2).u32(generation.0).raw(&app_id.0).raw(public_key),
            Self::IssuingCa { generation, index, public_key, hosts } => {
                w.u8(3).u32(generation.0).u16(index.0).raw(public_key).count1(hosts.len());
                for host in hosts {
                    w.lp(host.as_bytes());
                }
                w
            }
            Self::Generation { generation, pk_prf } => w.u8(4).u32(generation.0).raw(pk_prf),
            Self::AppKey { generation, app_id, app_pk } => w.u8(5).u32(generation.0).raw(&app_id.0).raw(app_pk),
            Self::EnvKey { generation, app_id, envpub } => w.u8(6).u32(generation.0).raw(&app_id.0).raw(envpub),
            Self::EnvKeyAt { generation, app_id, envpub, timestamp_s } => {
                w.u8(7).u32(generation.0).raw(&app_id.0).raw(envpub).u64(*timestamp_s)
            }
        };
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-SIGNOBJ")?;
        let kind = r.u8("object")?;
        let generation = Generation::read("generation", r)?;
        match kind {
            1 => Ok(Self::RootCa { generation }),
            2 => Ok(Self::AppCa { generation, app_id: AppId::read("app_id", r)?, public_key: point("public_key", r)? }),
            3 => Ok(Self::IssuingCa { generation, index: node(r)?, public_key: point("public_key", r)?, hosts: hosts(r)? }),
            4 => Ok(Self::Generation { generation, pk_prf: r.array("pk_prf")? }),
            5 => Ok(Self::AppKey { generation, app_id: AppId::read("app_id", r)?, app_pk: point("app_pk", r)? }),
            6 => Ok(Self::EnvKey { generation, app_id: AppId::read("app_id", r)?, envpub: r.array("envpub")? }),
            7 => Ok(Self::EnvKeyAt {
                generation,
                app_id: AppId::read("app_id", r)?,
                envpub: r.array("envpub")?,
                timestamp_s: r.u64("timestamp_s")?,
            }),
            _ => Err(DecodeError::Field { field: "object", reason: "unknown object" }),
        }
    }
}

impl SignKey {
    /// The root that signs what it pins.
    #[must_use]
    pub fn root(&self) -> RootTag {
        match self {
            Self::RootCa(_) | Self::AppCa(..) | Self::IssuingCa(..) | Self::Generation(_) => RootTag::Ca,
            Self::AppKey(..) | Self::EnvKey(..) | Self::EnvKeyAt(..) => RootTag::Id,
        }
    }

    /// The app it is about, if any.
    #[must_use]
    pub fn app_id(&self) -> Option<&AppId> {
        match self {
            Self::AppCa(_, app_id) | Self::AppKey(_, app_id) | Self::EnvKey(_, app_id) | Self::EnvKeyAt(_, app_id) => Some(app_id),
            Self::RootCa(_) | Self::IssuingCa(..) | Self::Generation(_) => None,
        }
    }

    /// `kind(1) ‖ generation(4) ‖ app_id(20), i(2) or nothing`.
    pub fn write(&self, w: &mut Writer) {
        match self {
            Self::RootCa(generation) => w.u8(1).u32(generation.0),
            Self::AppCa(generation, app_id) => w.u8(2).u32(generation.0).raw(&app_id.0),
            Self::IssuingCa(generation, index) => w.u8(3).u32(generation.0).u16(index.0),
            Self::Generation(generation) => w.u8(4).u32(generation.0),
            Self::AppKey(generation, app_id) => w.u8(5).u32(generation.0).raw(&app_id.0),
            Self::EnvKey(generation, app_id) => w.u8(6).u32(generation.0).raw(&app_id.0),
            Self::EnvKeyAt(generation, app_id) => w.u8(7).u32(generation.0).raw(&app_id.0),
        };
    }

    /// Reads a key.
    ///
    /// # Errors
    /// [`DecodeError`] names the field.
    pub fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let kind = r.u8("object")?;
        let generation = Generation::read("generation", r)?;
        match kind {
            1 => Ok(Self::RootCa(generation)),
            2 => AppId::read("app_id", r).map(|app_id| Self::AppCa(generation, app_id)),
            3 => node(r).map(|index| Self::IssuingCa(generation, index)),
            4 => Ok(Self::Generation(generation)),
            5 => AppId::read("app_id", r).map(|app_id| Self::AppKey(generation, app_id)),
            6 => AppId::read("app_id", r).map(|app_id| Self::EnvKey(generation, app_id)),
            7 => AppId::read("app_id", r).map(|app_id| Self::EnvKeyAt(generation, app_id)),
            _ => Err(DecodeError::Field { field: "object", reason: "unknown object" }),
        }
    }
}
