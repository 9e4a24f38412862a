//! The pin `{cluster_id, PK_prf}`: the only thing that a guest trusts of the cluster. Owns: reading it out of app-compose.json.
//! Never: takes a pin from the network.
//! Source: threshold.md §1.6. The compose file is measured byte for byte, so its extra member `dstack_kms` is, too:
//!
//! ```json
//! { "manifest_version": 2, "name": "…", "dstack_kms": { "cluster_id": "<64 hex digits>", "pk_prf": "<64 hex digits>" } }
//! ```
//!
//! dstack allows unknown members at the top level and hashes them with the rest.

use dstack_certificates::PublicKey;
use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::{ClusterId, Generation};
use dstack_threshold::group::{Group as _, Ristretto255};
use serde::Deserialize;

/// Largest app-compose.json that is read, bytes; dstack's own limit.
pub const COMPOSE_BYTES_MAX: usize = 50 * 1024 * 1024;
/// Name of the member.
pub const MEMBER: &str = "dstack_kms";

/// A cluster and the public key of its root `prf`, as the measured configuration pins them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    /// The cluster.
    pub cluster_id: ClusterId,
    /// Public key of root `prf`.
    pub pk_prf: [u8; 32],
    /// Generation that the key belongs to.
    pub generation: Generation,
    /// Public key of root `ca`, where it is pinned: what a root certificate must be of.
    pub ca_pub: Option<CaPub>,
    /// Public key of root `id`, SEC1 compressed, where it is pinned: who signs app keys.
    pub id_pub: Option<[u8; 33]>,
}

/// Public key of root `ca`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CaPub {
    /// 32 bytes.
    Ed25519([u8; 32]),
    /// SEC1 compressed.
    P256([u8; 33]),
}

impl CaPub {
    /// SubjectPublicKeyInfo, DER; `None` where the bytes are no public key.
    #[must_use]
    pub fn spki(&self) -> Option<Vec<u8>> {
        let key = match self {
            Self::Ed25519(bytes) => PublicKey::root(CaAlgorithm::Ed25519, bytes),
            Self::P256(bytes) => PublicKey::root(CaAlgorithm::P256, bytes),
        };
        key.ok().map(|key| key.spki())
    }
}

/// Why there is no pin. Whoever wrote the compose file is at fault: mend it (its hash changes) and register the new hash.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// The file is larger than dstack takes.
    #[error("compose file has {have_bytes} bytes, at most {COMPOSE_BYTES_MAX} are read")]
    TooLarge {
        /// Its size.
        have_bytes: usize,
    },
    /// The file is no JSON object, or the member is not of the documented form.
    #[error("compose file: {reason}")]
    Json {
        /// The parser's reason.
        reason: String,
    },
    /// The file has no member `dstack_kms`.
    #[error("compose file has no member `{MEMBER}`: add {{\"cluster_id\": …, \"pk_prf\": …}} as printed by `dstack cluster init`")]
    Missing,
    /// A field is not 32 bytes of hex, or 33 where it is a point of another curve.
    #[error("{MEMBER}.{field}: expected 64 hex digits (66 for id_pub and a P-256 ca_pub), got {got:?}")]
    Hex {
        /// The field.
        field: &'static str,
        /// Its text, cut.
        got: String,
    },
    /// The key is no ristretto255 element.
    #[error("{MEMBER}.pk_prf is no public key of a root")]
    PublicKey,
}

#[derive(Deserialize)]
struct Compose {
    dstack_kms: Option<RawPin>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPin {
    cluster_id: String,
    pk_prf: String,
    #[serde(default)]
    generation: u32,
    #[serde(default)]
    ca_pub: String,
    #[serde(default)]
    id_pub: String,
}

impl Pin {
    /// Reads the pin out of the bytes of app-compose.json. `generation` may be left out: it is 0.
    ///
    /// # Errors
    /// [`PinError`].
    pub fn of_compose(compose: &[u8]) -> Result<Self, PinError> {
        if compose.len() > COMPOSE_BYTES_MAX {
            return Err(PinError::TooLarge { have_bytes: compose.len() });
        }
        let compose: Compose = serde_json::from_slice(compose).map_err(|error| PinError::Json { reason: error.to_string() })?;
        let raw = compose.dstack_kms.ok_or(PinError::Missing)?;
        let cluster_id = ClusterId(bytes("cluster_id", &raw.cluster_id)?);
        let pk_prf = bytes("pk_prf", &raw.pk_prf)?;
        Ristretto255::decode(&pk_prf).ok_or(PinError::PublicKey)?;
        let ca_pub = match raw.ca_pub.trim_start_matches("0x") {
            "" => None,
            text if text.len() == 64 => Some(CaPub::Ed25519(bytes("ca_pub", text)?)),
            text => Some(CaPub::P256(bytes("ca_pub", text)?)),
        };
        let id_pub = if raw.id_pub.is_empty() { None } else { Some(bytes("id_pub", &raw.id_pub)?) };
        Ok(Self { cluster_id, pk_prf, generation: Generation(raw.generation), ca_pub, id_pub })
    }
}

fn bytes<const N: usize>(field: &'static str, text: &str) -> Result<[u8; N], PinError> {
    let mut bytes = [0; N];
    let digits = text.strip_prefix("0x").unwrap_or(text);
    match hex::decode_to_slice(digits, &mut bytes) {
        Ok(()) => Ok(bytes),
        Err(_) => Err(PinError::Hex { field, got: text.chars().take(80).collect() }),
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Add as _;

    use proptest::prelude::*;

    use super::*;

    const PK: &str = "c803e2cc6b05fc15064549b5920659ca4a77b2cca6f04f6b357009335476ad4e";

    fn compose(member: &str) -> Vec<u8> {
        format!(r#"{{"manifest_version":2,"name":"app",{member}"runner":"docker-compose"}}"#).into_bytes()
    }

    #[test]
    fn reads_the_member_and_ignores_the_rest() {
        let member = format!(r#""dstack_kms":{{"cluster_id":"0x{}","pk_prf":"{PK}"}},"#, "1A".repeat(32));
        let pin = Pin::of_compose(&compose(&member)).unwrap();
        assert_eq!(pin.cluster_id, ClusterId([0x1a; 32]));
        assert_eq!(hex::encode(pin.pk_prf), PK);
        assert_eq!((pin.generation, pin.ca_pub, pin.id_pub), (Generation(0), None, None));
        let all = format!(
            r#"{}"ca_pub":"{}","id_pub":"{}"}},"#,
            &member[..member.len() - 2].to_owned().add(","),
            "07".repeat(32),
            "02".repeat(33)
        );
        let pin = Pin::of_compose(&compose(&all)).unwrap();
        assert_eq!((pin.ca_pub, pin.id_pub), (Some(CaPub::Ed25519([7; 32])), Some([2; 33])));
        let all = all.replace(&"07".repeat(32), &"03".repeat(33));
        assert_eq!(Pin::of_compose(&compose(&all)).unwrap().ca_pub, Some(CaPub::P256([3; 33])));
    }

    #[test]
    fn names_what_is_wrong() {
        assert_eq!(Pin::of_compose(&compose("")), Err(PinError::Missing));
        let with = |id: &str, pk: &str| Pin::of_compose(&compose(&format!(r#""dstack_kms":{{"cluster_id":"{id}","pk_prf":"{pk}"}},"#)));
        let id = "11".repeat(32);
        assert_eq!(with("11", PK), Err(PinError::Hex { field: "cluster_id", got: "11".to_owned() }));
        assert_eq!(with(&id, &PK[2..]), Err(PinError::Hex { field: "pk_prf", got: PK[2..].to_owned() }));
        assert_eq!(with(&id, &"00".repeat(32)), Err(PinError::PublicKey), "the identity");
        assert_eq!(with(&id, &"ff".repeat(32)), Err(PinError::PublicKey));
        assert!(with(&id, PK).is_ok());
        for member in [r#""dstack_kms":{},"#, r#""dstack_kms":[],"#, r#""dstack_kms":{"cluster_id":"","pk_prf":"","x":1},"#] {
            assert!(matches!(Pin::of_compose(&compose(member)), Err(PinError::Json { .. })), "{member}");
        }
        // A second member could hide another pin from a reader that takes the first.
        let twice = format!(r#""dstack_kms":{{"cluster_id":"{id}","pk_prf":"{PK}"}},"#).repeat(2);
        assert!(matches!(Pin::of_compose(&compose(&twice)), Err(PinError::Json { .. })));
        assert!(matches!(Pin::of_compose(b"services: {}"), Err(PinError::Json { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Pin::of_compose(&bytes);
        }
    }
}
