//! What is said over the unix socket of a software TEE. Owns: the request and response types, their sizes and their
//! JSON form. Never: opens a socket, measures anything, holds a signing key.
//!
//! A frame is `length(u32 BE) ‖ JSON`; one request frame is answered by exactly one response frame, in order, on the
//! same connection. Enums are externally tagged (`{"evidence":{"report_data":"00…"}}`, `"describe"`), so that a
//! decoder never buffers a value (a key among them) in a generic tree. Byte strings are lowercase hex.
//!
//! The state made by [`Request::Boot`] belongs to its connection: a device remembers nothing after the close. Without
//! it the caller is a node, and its measurement is that of the executable on the other end of the socket, which the
//! server learns from the peer credentials and never from the request.

use crate::runtime_log::{NAME_BYTES_MAX, PAYLOAD_BYTES_MAX};
use dstack_protocol::Platform;
use serde::de::{Deserializer, Error as _, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use zeroize::Zeroizing;

/// Version of this protocol, carried by [`Description::version`].
pub const PROTOCOL_VERSION: u32 = 1;
/// Largest JSON text of one frame, in bytes.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// Largest app-compose document a boot takes, in bytes (its hex form must fit a frame).
pub const COMPOSE_BYTES_MAX: usize = 200 * 1024;
/// Longest `purpose` of a platform key, in bytes.
pub const PURPOSE_BYTES_MAX: usize = 256;

const _: () = assert!(2 * PAYLOAD_BYTES_MAX + 6 * NAME_BYTES_MAX + 4096 < FRAME_BYTES_MAX);
const _: () = assert!(2 * COMPOSE_BYTES_MAX + 4096 < FRAME_BYTES_MAX);

/// What a caller asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// What this device is. Answered by [`Response::Description`].
    Describe,
    /// Boots an emulated guest on this connection; once per connection. Answered by [`Response::Booted`].
    Boot(Boot),
    /// Starts an emulated guest of which nothing is measured yet, on TDX; once per connection, and not with a boot. Its events follow by
    /// [`Request::Measure`]. Answered by [`Response::Done`].
    Start,
    /// Measures one more event into the guest's RTMR3. Answered by [`Response::Done`].
    Measure(Measure),
    /// Evidence over `report_data` for what runs on this connection. Answered by [`Response::Evidence`].
    Evidence {
        /// The 64 bytes the evidence is bound to.
        report_data: HexArray<64>,
    },
    /// The key bound to the measurement of what runs on this connection. Answered by [`Response::PlatformKey`].
    PlatformKey {
        /// Separates keys of one measurement; at most [`PURPOSE_BYTES_MAX`] bytes.
        purpose: HexBytes,
    },
    /// The raw quote and its log, as dstack's guest API returns them. Answered by [`Response::Quote`].
    Quote {
        /// The 64 bytes the quote is bound to.
        report_data: HexArray<64>,
    },
}

/// An emulated guest boot. The events measured are, in this order: `system-preparing` (empty), `app-id` (20 bytes),
/// `compose-hash` (32), `instance-id` (20 or empty), `boot-mr-done` (empty), `key-provider` (JSON), `system-ready`
/// (empty).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// The exact bytes of app-compose.json; `compose_hash` = SHA-256 of them. At most [`COMPOSE_BYTES_MAX`].
    pub compose: HexBytes,
    /// Absent: the first 20 bytes of `compose_hash`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_id: Option<HexArray<20>>,
    /// `instance_id` = SHA-256(seed ‖ app_id)[..20]; absent: the instance id is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_seed: Option<HexBytes>,
    /// Absent: `{"name":"none","id":""}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_provider: Option<KeyProvider>,
}

/// A runtime event of version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measure {
    /// Its name, at most [`NAME_BYTES_MAX`] bytes.
    pub event: String,
    /// Its payload, at most [`PAYLOAD_BYTES_MAX`] bytes.
    pub payload: HexBytes,
}

/// Payload of the `key-provider` event: this struct's compact JSON, members in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyProvider {
    /// `kms`, `local-sgx`, `tpm` or `none`.
    pub name: String,
    /// Hex text that names the provider; empty for `none`.
    pub id: String,
}

/// What a device answers.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Response {
    /// To [`Request::Describe`].
    Description(Description),
    /// To [`Request::Boot`].
    Booted(Booted),
    /// To [`Request::Start`] and [`Request::Measure`].
    Done,
    /// To [`Request::Evidence`]: the versioned attestation, SCALE V0.
    Evidence {
        /// The bytes that go into X.509 extension `.8`.
        evidence: HexBytes,
    },
    /// To [`Request::PlatformKey`].
    PlatformKey {
        /// 32 bytes, the same for every call with the same measurement and purpose on the same device.
        key: KeyHex,
    },
    /// To [`Request::Quote`].
    Quote(Quote),
    /// To any request: refused. The connection stays usable unless the frame itself was bad.
    Refused(Refused),
}

/// What a device is. For people and for setting up a test cluster; never a reason to trust the root in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// [`PROTOCOL_VERSION`].
    pub version: u32,
    /// What the device emulates.
    pub platform: EmulatedPlatform,
    /// DER of the software root the evidence chains to.
    pub root_der: HexBytes,
    /// Canonical measurement of what runs on this connection (224 bytes for TDX, 144 for Nitro).
    pub measurement: HexBytes,
    /// PPID (16 bytes) or PCR4 (48 bytes) of the emulated machine.
    pub platform_identity: HexBytes,
    /// Collateral bundle JSON that the evidence is to be judged with; `None` where the platform has none (Nitro).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collateral: Option<String>,
}

/// Platforms a software TEE emulates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EmulatedPlatform {
    /// Intel TDX.
    Tdx,
    /// AWS Nitro Enclave.
    Nitro,
}

impl EmulatedPlatform {
    /// As evidence names it.
    #[must_use]
    pub const fn platform(self) -> Platform {
        match self {
            Self::Tdx => Platform::Tdx,
            Self::Nitro => Platform::Nitro,
        }
    }
}

/// The identity an emulated guest booted into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Booted {
    /// As measured in `app-id`.
    pub app_id: HexArray<20>,
    /// As measured in `compose-hash`.
    pub compose_hash: HexArray<32>,
    /// As measured in `instance-id`: 20 bytes or none.
    pub instance_id: HexBytes,
}

/// A raw quote and what is needed to replay it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quote {
    /// The DCAP quote (TDX) or the NSM document (Nitro).
    pub quote: HexBytes,
    /// JSON array of events; `[]` on Nitro.
    pub event_log: String,
    /// VmConfig JSON; may be empty.
    pub vm_config: String,
}

/// Why a device refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refused {
    /// For code.
    pub code: RefusedCode,
    /// For people: one line, without secrets.
    pub message: String,
}

/// Stable reasons of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusedCode {
    /// The frame is no request of this protocol, or a field is out of bounds. Caller's fault; the server closes.
    BadRequest,
    /// A second boot on one connection. Caller's fault: open another connection.
    AlreadyBooted,
    /// The executable at the other end could not be read or measured. Operator's to fix.
    UnknownCaller,
    /// This machine has no key bound to a measurement. Nobody's fault: nothing can be sealed there.
    NoPlatformKey,
    /// What runs on this connection has no register for events: a node, or an enclave. Nobody's fault.
    NoRegister,
    /// The device failed. Not the caller's fault: retry.
    Internal,
}

/// Bytes of any length as lowercase hex; upper case is accepted when read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HexBytes(pub Vec<u8>);

/// Exactly `N` bytes as lowercase hex; upper case is accepted when read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HexArray<const N: usize>(pub [u8; N]);

/// A 32-byte key as hex. Redacted when printed, wiped when dropped. Whoever holds the frame's bytes wipes those.
pub struct KeyHex(Zeroizing<[u8; 32]>);

impl KeyHex {
    /// Takes over a copy of `key`; the caller wipes its own.
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        Self(Zeroizing::new(*key))
    }

    /// Shows the key to `use_it`.
    pub fn expose<T>(&self, use_it: impl FnOnce(&[u8; 32]) -> T) -> T {
        use_it(&self.0)
    }
}

impl fmt::Debug for KeyHex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHex(redacted)")
    }
}

impl PartialEq for KeyHex {
    fn eq(&self, other: &Self) -> bool {
        let difference = self.0.iter().zip(other.0.iter()).fold(0u8, |sum, (a, b)| sum | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

impl Eq for KeyHex {}

impl Serialize for HexBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for HexBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Hex;
        impl Visitor<'_> for Hex {
            type Value = HexBytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a hex string")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<HexBytes, E> {
                hex::decode(text).map(HexBytes).map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Hex)
    }
}

impl<const N: usize> Serialize for HexArray<N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(self.0))
    }
}

impl<'de, const N: usize> Deserialize<'de> for HexArray<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = HexBytes::deserialize(deserializer)?.0;
        let have = bytes.len();
        let array = <[u8; N]>::try_from(bytes);
        array.map(HexArray).map_err(|_| D::Error::custom(format_args!("want {N} bytes, have {have}")))
    }
}

impl Serialize for KeyHex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = Zeroizing::new([0u8; 64]);
        hex::encode_to_slice(&self.0[..], &mut text[..]).map_err(serde::ser::Error::custom)?;
        serializer.serialize_str(std::str::from_utf8(&text[..]).map_err(serde::ser::Error::custom)?)
    }
}

impl<'de> Deserialize<'de> for KeyHex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Key;
        impl Visitor<'_> for Key {
            type Value = KeyHex;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("64 hex digits")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<KeyHex, E> {
                let mut key = Zeroizing::new([0u8; 32]);
                // the error of the hex library names a digit; ours names nothing of a key
                hex::decode_to_slice(text, &mut key[..]).map_err(|_| E::custom("not 64 hex digits"))?;
                Ok(KeyHex(key))
            }
        }
        deserializer.deserialize_str(Key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_forms_are_stable() {
        let check = |request: Request, json: &str| {
            assert_eq!(serde_json::to_string(&request).unwrap(), json);
            assert_eq!(serde_json::from_str::<Request>(json).unwrap(), request);
        };
        check(Request::Describe, "\"describe\"");
        check(
            Request::Evidence { report_data: HexArray([0xab; 64]) },
            &format!("{{\"evidence\":{{\"report_data\":\"{}\"}}}}", "ab".repeat(64)),
        );
        check(Request::PlatformKey { purpose: HexBytes(b"seal".to_vec()) }, "{\"platform_key\":{\"purpose\":\"7365616c\"}}");
        check(
            Request::Boot(Boot {
                compose: HexBytes(b"{}".to_vec()),
                app_id: None,
                instance_seed: Some(HexBytes(vec![1])),
                key_provider: Some(KeyProvider { name: "kms".into(), id: "00".into() }),
            }),
            "{\"boot\":{\"compose\":\"7b7d\",\"instance_seed\":\"01\",\"key_provider\":{\"name\":\"kms\",\"id\":\"00\"}}}",
        );
    }

    #[test]
    fn refuses_unknown_members_and_wrong_sizes() {
        for json in [
            "{\"boot\":{\"compose\":\"7b7d\",\"measurement\":\"00\"}}",
            "{\"evidence\":{\"report_data\":\"00\"}}",
            "{\"quote\":{\"report_data\":\"zz\"}}",
            "\"shutdown\"",
            "{}",
        ] {
            assert!(serde_json::from_str::<Request>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn a_key_survives_the_wire_and_is_never_printed() {
        let response = Response::PlatformKey { key: KeyHex::new(&[0x5a; 32]) };
        let json = serde_json::to_vec(&response).unwrap();
        assert_eq!(serde_json::from_slice::<Response>(&json).unwrap(), response);
        assert!(!format!("{response:?}").contains("5a"));
        let error = serde_json::from_str::<Response>("{\"platform_key\":{\"key\":\"5a5a\"}}").unwrap_err();
        assert!(!error.to_string().contains("5a"), "{error}");
    }
}
