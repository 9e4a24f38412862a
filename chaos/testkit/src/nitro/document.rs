//! The NSM attestation document and its COSE_Sign1 envelope, in the shape that published documents have: an untagged array
//! of four, an indefinite-length map, `null` for what is absent.
//! Source: AWS Nitro Enclaves NSM API, "attestation process"; RFC 9052 §4.2 and §4.4 (`Sig_structure`), algorithm ES384.

use std::collections::BTreeMap;

use ciborium::Value;

use crate::key::{Key as _, P384Key};

/// What a Nitro hypervisor says about one enclave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NsmDocument {
    /// `<instance id>-enc<id>`.
    pub module_id: String,
    /// Name of the hash of the registers: `SHA384`.
    pub digest: String,
    /// Milliseconds since 1970.
    pub timestamp_ms: u64,
    /// Registers 0 to 15.
    pub pcrs: BTreeMap<u8, Vec<u8>>,
    /// A key of the enclave's choice.
    pub public_key: Option<Vec<u8>>,
    /// dstack's report data.
    pub user_data: Option<Vec<u8>>,
    /// A challenge.
    pub nonce: Option<Vec<u8>>,
}

impl NsmDocument {
    /// Zero registers but for PCR4.
    pub fn new(module_id: String, timestamp_ms: u64, pcr4: [u8; 48]) -> Self {
        let mut pcrs: BTreeMap<u8, Vec<u8>> = (0..16).map(|index| (index, vec![0; 48])).collect();
        pcrs.insert(4, pcr4.to_vec());
        Self { module_id, digest: "SHA384".to_owned(), timestamp_ms, pcrs, public_key: None, user_data: None, nonce: None }
    }

    /// Sets PCR0, PCR1 and PCR2.
    pub fn measured(mut self, image: [[u8; 48]; 3]) -> Self {
        for (index, value) in (0u8..).zip(image) {
            self.pcrs.insert(index, value.to_vec());
        }
        self
    }

    /// Signs with the leaf's key; `bundle` is root first, without the leaf.
    pub(crate) fn cose_sign1(&self, leaf: &[u8], bundle: &[Vec<u8>], key: &P384Key) -> Vec<u8> {
        let payload = self.payload(leaf, bundle);
        let protected = cbor(&Value::Map(vec![(Value::Integer(1.into()), Value::Integer(ES384.into()))]));
        let to_sign = cbor(&Value::Array(vec![
            Value::Text("Signature1".to_owned()),
            Value::Bytes(protected.clone()),
            Value::Bytes(Vec::new()),
            Value::Bytes(payload.clone()),
        ]));
        cbor(&Value::Array(vec![
            Value::Bytes(protected),
            Value::Map(Vec::new()),
            Value::Bytes(payload),
            Value::Bytes(key.sign_raw(&to_sign)),
        ]))
    }

    fn payload(&self, leaf: &[u8], bundle: &[Vec<u8>]) -> Vec<u8> {
        let optional = |bytes: &Option<Vec<u8>>| bytes.clone().map_or(Value::Null, Value::Bytes);
        let pcrs = self.pcrs.iter().map(|(index, value)| (Value::Integer((*index).into()), Value::Bytes(value.clone())));
        let members = [
            ("module_id", Value::Text(self.module_id.clone())),
            ("digest", Value::Text(self.digest.clone())),
            ("timestamp", Value::Integer(self.timestamp_ms.into())),
            ("pcrs", Value::Map(pcrs.collect())),
            ("certificate", Value::Bytes(leaf.to_vec())),
            ("cabundle", Value::Array(bundle.iter().cloned().map(Value::Bytes).collect())),
            ("public_key", optional(&self.public_key)),
            ("user_data", optional(&self.user_data)),
            ("nonce", optional(&self.nonce)),
        ];
        let mut out = vec![INDEFINITE_MAP];
        for (name, value) in members {
            out.extend(cbor(&Value::Text(name.to_owned())));
            out.extend(cbor(&value));
        }
        out.push(BREAK);
        out
    }
}

fn cbor(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    ciborium::into_writer(value, &mut out).expect("writing to memory does not fail");
    out
}

/// COSE algorithm number.
const ES384: i64 = -35;
const INDEFINITE_MAP: u8 = 0xbf;
const BREAK: u8 = 0xff;
