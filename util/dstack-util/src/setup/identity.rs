//! Who this instance is. Owns: app id, instance id, `.instance_info`. Never: measures them.
//! Source: util and deploy reference §3 (identity values), §8 (`.instance_info`).

use dstack_protocol::codec::sha256;
use serde::{Deserialize, Serialize};

/// Bytes of a seed that we make.
pub const SEED_BYTES: usize = 20;
/// Longest seed that is taken from a file.
const SEED_BYTES_MAX: usize = 64;

/// Why there is no identity. Whoever wrote `.instance_info` is at fault.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not of the documented form.
    #[error(".instance_info: {reason}; expected {{\"instance_id_seed\": hex, \"instance_id\": hex, \"app_id\": hex}}")]
    Form {
        /// The parser's words.
        reason: String,
    },
    /// A member is not hex, or of another length.
    #[error(".instance_info: {member} is {got}, expected {expected}")]
    Member {
        /// Its name.
        member: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        got: String,
    },
}

/// `.instance_info`: what makes this instance the one it was before. Public.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct InstanceInfo {
    /// From which the instance id comes.
    #[serde(with = "hex::serde")]
    pub instance_id_seed: Vec<u8>,
    /// 20 bytes or none.
    #[serde(with = "hex::serde")]
    pub instance_id: Vec<u8>,
    /// 20 bytes.
    #[serde(with = "hex::serde")]
    pub app_id: Vec<u8>,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    instance_id_seed: Option<String>,
    #[serde(default)]
    instance_id: Option<String>,
    #[serde(default)]
    app_id: Option<String>,
}

impl InstanceInfo {
    /// Reads the file. Absent and empty members are empty.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, IdentityError> {
        let raw: Raw = crate::files::json_object(bytes).map_err(|error| IdentityError::Form { reason: error.to_string() })?;
        let member = |member: &'static str, text: Option<String>, expected: &'static str, fits: &dyn Fn(usize) -> bool| {
            let text = text.unwrap_or_default();
            let bytes = hex::decode(text.trim_start_matches("0x")).ok().filter(|bytes| fits(bytes.len()));
            bytes.ok_or_else(|| IdentityError::Member { member, expected, got: format!("{:?}", text.chars().take(80).collect::<String>()) })
        };
        let id = |length: usize| length == 0 || length == 20;
        Ok(Self {
            instance_id_seed: member("instance_id_seed", raw.instance_id_seed, "hex of at most 64 bytes", &|length| {
                length <= SEED_BYTES_MAX
            })?,
            instance_id: member("instance_id", raw.instance_id, "40 hex digits or nothing", &id)?,
            app_id: member("app_id", raw.app_id, "40 hex digits or nothing", &id)?,
        })
    }
}

/// What is measured of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// 20 bytes.
    pub app_id: [u8; 20],
    /// 20 bytes, or none.
    pub instance_id: Vec<u8>,
    /// From which the instance id came.
    pub seed: Vec<u8>,
}

/// What the identity is made of.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    /// SHA-256 of app-compose.json.
    pub compose_hash: &'a [u8; 32],
    /// What was known before.
    pub known: &'a InstanceInfo,
    /// A fresh seed, used where none is known.
    pub fresh_seed: [u8; SEED_BYTES],
    /// Whether a known seed must not be used: provider `none` makes an instance for one boot.
    pub always_fresh: bool,
    /// `no_instance_id` of app-compose.json.
    pub without_instance_id: bool,
    /// What binds the id to a machine (GCP: hash of the attestation key), if anything does.
    pub binding: Option<&'a [u8; 32]>,
}

impl Identity {
    /// `app_id`: the known one, else the first 20 bytes of the compose hash. `instance_id`: `SHA-256(seed ‖ app_id [‖ binding])[..20]`.
    #[must_use]
    pub fn of(origin: Origin<'_>) -> Self {
        let app_id = origin.known.app_id.as_slice().try_into().unwrap_or_else(|_| first_20(origin.compose_hash));
        let is_known = !origin.always_fresh && !origin.known.instance_id_seed.is_empty();
        let seed = if is_known { origin.known.instance_id_seed.clone() } else { origin.fresh_seed.to_vec() };
        let instance_id = match origin.without_instance_id {
            true => Vec::new(),
            false => first_20(&sha256(&[&seed, &app_id, origin.binding.map_or(&[][..], |binding| &binding[..])])).to_vec(),
        };
        Self { app_id, instance_id, seed }
    }

    /// As `.instance_info` keeps it.
    #[must_use]
    pub fn info(&self) -> InstanceInfo {
        InstanceInfo { instance_id_seed: self.seed.clone(), instance_id: self.instance_id.clone(), app_id: self.app_id.to_vec() }
    }
}

fn first_20(digest: &[u8; 32]) -> [u8; 20] {
    std::array::from_fn(|at| digest.get(at).copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin<'a>(known: &'a InstanceInfo, compose_hash: &'a [u8; 32]) -> Origin<'a> {
        Origin { compose_hash, known, fresh_seed: [7; 20], always_fresh: false, without_instance_id: false, binding: None }
    }

    #[test]
    fn golden_identities() {
        let hash = [0x44; 32];
        let nothing = InstanceInfo::default();
        let fresh = Identity::of(origin(&nothing, &hash));
        assert_eq!((fresh.app_id, fresh.seed.as_slice()), ([0x44; 20], &[7; 20][..]));
        // sha256sum of 20×07 ‖ 20×44, and of the same with 32×55, by another implementation
        assert_eq!(hex::encode(&fresh.instance_id), "ff586d2df6385dda5aa622bd383b416ab06e6a7b");
        let bound = Identity::of(Origin { binding: Some(&[0x55; 32]), ..origin(&nothing, &hash) });
        assert_eq!(hex::encode(&bound.instance_id), "06c5bd70917864c40ce553a7262649a91a0226e7");

        let known = InstanceInfo { instance_id_seed: vec![1; 32], instance_id: Vec::new(), app_id: vec![0x11; 20] };
        let again = Identity::of(origin(&known, &hash));
        assert_eq!((again.app_id, again.seed.clone()), ([0x11; 20], vec![1; 32]));
        assert_eq!(again.instance_id, sha256(&[&[1; 32], &[0x11; 20]])[..20]);
        assert_eq!(Identity::of(Origin { always_fresh: true, ..origin(&known, &hash) }).seed, [7; 20]);
        assert!(Identity::of(Origin { without_instance_id: true, ..origin(&known, &hash) }).instance_id.is_empty());
        assert_eq!(InstanceInfo::parse(&serde_json::to_vec(&again.info()).unwrap()).unwrap(), again.info());
    }

    #[test]
    fn other_files_are_named() {
        let empty = InstanceInfo::parse(b"{}").unwrap();
        assert_eq!(empty, InstanceInfo::default());
        assert!(matches!(InstanceInfo::parse(b"[]"), Err(IdentityError::Form { .. })));
        assert!(matches!(InstanceInfo::parse(br#"{"app_id":"11"}"#), Err(IdentityError::Member { member: "app_id", .. })));
        assert!(matches!(
            InstanceInfo::parse(br#"{"instance_id_seed":"zz"}"#),
            Err(IdentityError::Member { member: "instance_id_seed", .. })
        ));
        assert!(matches!(InstanceInfo::parse("[".repeat(100_000).as_bytes()), Err(IdentityError::Form { .. })));
    }
}
