//! The encrypted environment. Owns: opening it, what may be in it, the two files the app gets. Never: a name or value in a message that
//! was not allowed by the measured document.
//! Source: util and deploy reference §6.

use std::collections::BTreeMap;

use aes_gcm::aead::{AeadInOut as _, KeyInit as _};
use aes_gcm::{Aes256Gcm, Nonce, Tag};
use dstack_secret::SecretBytes;
use serde::Deserialize;
use x25519_dalek::x25519;
use zeroize::{Zeroize as _, Zeroizing};

/// Variables at most.
pub const ITEMS_MAX: usize = 1024;
/// Longest name, bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// Longest value, bytes.
pub const VALUE_BYTES_MAX: usize = 128 << 10;
/// Names and values together, bytes.
pub const TOTAL_BYTES_MAX: usize = 1 << 20;

const PUBLIC_BYTES: usize = 32;
const NONCE_BYTES: usize = 12;
const TAG_BYTES: usize = 16;

/// Why the environment is refused. Whoever encrypted it is at fault, or the host that swapped it.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvironmentError {
    /// There is an environment but no key: this key provider gives none.
    #[error("there is an encrypted environment, but the key provider gives no key for it: use `kms`, or remove .encrypted-env")]
    NoKey,
    /// The key is not of 32 bytes.
    #[error("the environment's key has {have_bytes} bytes, not 32")]
    Key {
        /// Its length.
        have_bytes: usize,
    },
    /// Shorter than its frame.
    #[error("the encrypted environment has {have_bytes} bytes, at least 60 are needed")]
    Short {
        /// Its length.
        have_bytes: usize,
    },
    /// The sender's key gives no secret (RFC 7748 §6.1).
    #[error("the encrypted environment's public key is of low order")]
    LowOrder,
    /// The tag does not fit: another key, or changed bytes.
    #[error("the encrypted environment does not open: it is encrypted to another app or key, or was changed")]
    Tag,
    /// Not of the documented form.
    #[error("the decrypted environment is not {{\"env\":[{{\"key\":…,\"value\":…}}]}}")]
    Form,
    /// A limit is exceeded.
    #[error("the environment has {what} of {have}, at most {limit}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How much there is.
        have: usize,
        /// The most there may be.
        limit: usize,
    },
    /// An allowed name that no shell takes.
    #[error("environment variable {name:?}: a name is letters, digits and underscores, and begins with no digit")]
    Name {
        /// The name.
        name: String,
    },
}

#[derive(Deserialize)]
struct Document {
    env: Vec<Pair>,
}

#[derive(Deserialize)]
struct Pair {
    key: String,
    value: WipedText,
}

/// Text that is wiped; the `zeroize` crate's own has no `Deserialize` here.
struct WipedText(Zeroizing<String>);

impl<'de> Deserialize<'de> for WipedText {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(Zeroizing::new(String::deserialize(deserializer)?)))
    }
}

/// Opens `eph_pk(32) ‖ iv(12) ‖ AES-256-GCM ‖ tag(16)`; the key is the X25519 secret itself.
///
/// # Errors
/// [`EnvironmentError`].
pub fn open(secret: &SecretBytes, sealed: &[u8]) -> Result<SecretBytes, EnvironmentError> {
    let short = || EnvironmentError::Short { have_bytes: sealed.len() };
    let (public, rest) = sealed.split_first_chunk::<PUBLIC_BYTES>().ok_or_else(short)?;
    let (nonce, rest) = rest.split_first_chunk::<NONCE_BYTES>().ok_or_else(short)?;
    let (text, tag) = rest.split_last_chunk::<TAG_BYTES>().ok_or_else(short)?;
    if secret.is_empty() {
        return Err(EnvironmentError::NoKey);
    }
    let shared = secret.expose(|key| {
        let key: &[u8; 32] = key.try_into().map_err(|_| EnvironmentError::Key { have_bytes: key.len() })?;
        let mut key = *key;
        let shared = Zeroizing::new(x25519(key, *public));
        key.zeroize();
        Ok(shared)
    })?;
    if shared.iter().fold(0, |sum, byte| sum | byte) == 0 {
        return Err(EnvironmentError::LowOrder);
    }
    let cipher = Aes256Gcm::new_from_slice(&shared[..]).map_err(|_| EnvironmentError::Key { have_bytes: shared.len() })?;
    let mut out = text.to_vec();
    let opened = cipher.decrypt_inout_detached(&Nonce::from(*nonce), b"", out.as_mut_slice().into(), &Tag::from(*tag));
    match opened {
        Ok(()) => Ok(SecretBytes::take(out)),
        Err(_) => {
            out.zeroize();
            Err(EnvironmentError::Tag)
        }
    }
}

/// The app's variables, by name.
pub struct Environment(BTreeMap<String, Zeroizing<String>>);

impl Environment {
    /// Reads the decrypted text. Variables that the measured document does not allow are left out.
    ///
    /// # Errors
    /// [`EnvironmentError`].
    pub fn parse(text: &SecretBytes, allowed: &[String]) -> Result<Self, EnvironmentError> {
        let document: Document = text.expose(|text| serde_json::from_slice(text)).map_err(|_| EnvironmentError::Form)?;
        limit("variables", document.env.len(), ITEMS_MAX)?;
        let (mut variables, mut total) = (BTreeMap::new(), 0usize);
        for Pair { key, value: WipedText(value) } in document.env {
            if !allowed.contains(&key) {
                tracing::warn!("a variable that app-compose.json does not allow is left out");
                continue;
            }
            limit("a name", key.len(), NAME_BYTES_MAX)?;
            limit("a value", value.len(), VALUE_BYTES_MAX)?;
            if !is_name(&key) {
                return Err(EnvironmentError::Name { name: key });
            }
            total = total.saturating_add(key.len()).saturating_add(value.len());
            limit("names and values", total, TOTAL_BYTES_MAX)?;
            variables.insert(key, value);
        }
        Ok(Self(variables))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `.decrypted-env`: for systemd's `EnvironmentFile=`, which has no newlines in values.
    #[must_use]
    pub fn lines(&self) -> SecretBytes {
        let capacity = self.0.iter().map(|(name, value)| name.len().saturating_add(value.len().saturating_mul(2)).saturating_add(4)).sum();
        let mut out = Vec::with_capacity(capacity);
        for (name, value) in &self.0 {
            let quoted = value.chars().any(|c| c.is_whitespace() || r#"|&;<>()$`\"'"#.contains(c));
            out.extend_from_slice(name.as_bytes());
            out.push(b'=');
            out.extend_from_slice(if quoted { b"\"" } else { b"" });
            for byte in value.bytes() {
                match byte {
                    b'\n' => out.extend_from_slice(b"\\n"),
                    b'\\' | b'"' | b'$' | b'`' => out.extend_from_slice(&[b'\\', byte]),
                    _ => out.push(byte),
                }
            }
            out.extend_from_slice(if quoted { b"\"\n" } else { b"\n" });
        }
        SecretBytes::take(out)
    }

    /// `.decrypted-env.json`: an object of text.
    ///
    /// # Panics
    /// Never: text has a JSON form.
    #[must_use]
    pub fn json(&self) -> SecretBytes {
        let texts: BTreeMap<&str, &str> = self.0.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        SecretBytes::take(serde_json::to_vec(&texts).expect("text has a JSON form"))
    }
}

fn is_name(text: &str) -> bool {
    let begins = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    begins && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

const fn limit(what: &'static str, have: usize, limit: usize) -> Result<(), EnvironmentError> {
    if have > limit { Err(EnvironmentError::Limit { what, have, limit }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Upstream's sample.
    const SECRET: &str = "7c282bf94b35dc47801dc953bfa0896fc2bd313381d3e8eca4e42f6536d2a96f";
    const SEALED: &str = "0bd18749612f4c8b9dd583c7d6a646b90abd34e3c731a7708d0caf9039095641e1f0948e775f0b7351788db7f246d51806954626dccc\
                          b6a60d64665ca3715c6bef75616cab476d27bba04080361200d6a58cec";

    fn secret() -> SecretBytes {
        SecretBytes::take(hex::decode(SECRET).unwrap())
    }

    #[test]
    fn upstreams_sample_opens() {
        let sealed = hex::decode(SEALED).unwrap();
        let opened = open(&secret(), &sealed).unwrap();
        opened.expose(|text| assert_eq!(text, br#"[{"key":"","value":""}]"#));
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            // the highest bit of the public key is not part of it; ours is the lowest
            assert_eq!(open(&secret(), &changed), Err(EnvironmentError::Tag), "byte {at}");
        }
        assert_eq!(open(&secret(), &sealed[..59]), Err(EnvironmentError::Short { have_bytes: 59 }));
        assert_eq!(open(&secret(), &[0; 60]), Err(EnvironmentError::LowOrder));
        assert_eq!(open(&SecretBytes::take(vec![]), &sealed), Err(EnvironmentError::NoKey));
        assert_eq!(open(&SecretBytes::take(vec![1; 31]), &sealed), Err(EnvironmentError::Key { have_bytes: 31 }));
    }

    fn parse(json: &str, allowed: &[&str]) -> Result<Environment, EnvironmentError> {
        let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
        Environment::parse(&SecretBytes::take(json.as_bytes().to_vec()), &allowed)
    }

    #[test]
    fn what_is_not_allowed_is_left_out_and_values_are_quoted() {
        let json = r#"{"env":[{"key":"B","value":"a b\n\"$x`\\"},{"key":"A","value":"plain"},{"key":"EVIL","value":"1"},{"key":"A","value":"last"}]}"#;
        let environment = parse(json, &["A", "B", "C"]).unwrap();
        environment.lines().expose(|text| assert_eq!(std::str::from_utf8(text).unwrap(), "A=last\nB=\"a b\\n\\\"\\$x\\`\\\\\"\n"));
        environment.json().expose(|text| assert_eq!(text, br#"{"A":"last","B":"a b\n\"$x`\\"}"#));
        assert_eq!(environment.len(), 2);
    }

    #[test]
    fn limits_and_names() {
        let of = |key: &str, value: &str| serde_json::json!({ "env": [{ "key": key, "value": value }] }).to_string();
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        assert!(matches!(parse(&of(&long, ""), &[&long]), Err(EnvironmentError::Limit { what: "a name", .. })));
        assert!(matches!(parse(&of("A", &"x".repeat(VALUE_BYTES_MAX + 1)), &["A"]), Err(EnvironmentError::Limit { what: "a value", .. })));
        assert!(matches!(parse(&of("1A", ""), &["1A"]), Err(EnvironmentError::Name { .. })));
        assert!(matches!(parse(&of("", ""), &[""]), Err(EnvironmentError::Name { .. })));
        let many: Vec<_> = (0..=ITEMS_MAX).map(|_| serde_json::json!({ "key": "A", "value": "" })).collect();
        assert!(matches!(
            parse(&serde_json::json!({ "env": many }).to_string(), &[]),
            Err(EnvironmentError::Limit { what: "variables", .. })
        ));
        let large: Vec<_> = (0..9).map(|i| serde_json::json!({ "key": format!("A{i}"), "value": "x".repeat(VALUE_BYTES_MAX) })).collect();
        let names: Vec<String> = (0..9).map(|i| format!("A{i}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let refused = parse(&serde_json::json!({ "env": large }).to_string(), &names);
        assert!(matches!(refused, Err(EnvironmentError::Limit { what: "names and values", .. })));
        for bad in ["[]", "{", r#"{"env":{}}"#, r#"{"env":[{"key":1,"value":""}]}"#] {
            assert!(matches!(parse(bad, &[]), Err(EnvironmentError::Form)), "{bad}");
        }
        assert!(matches!(parse(&format!("{{\"env\":{}", "[".repeat(100_000)), &[]), Err(EnvironmentError::Form)));
    }
}
