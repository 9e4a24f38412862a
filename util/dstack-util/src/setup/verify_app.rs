//! What hardware and the measured document say of this app, against what it is. Owns: ConfigId, MrConfig, the pinned provider.
//! Never: takes an unset ConfigId for a wrong one (dstack accepts it).
//! Source: attestation reference §9; util and deploy reference §3 step 7.

use dstack_protocol::codec::sha256;
use serde::Deserialize;
use sha3::{Digest as _, Keccak256};

use super::compose::ProviderKind;

/// ConfigId's bytes in a TD report.
pub const CONFIG_ID_BYTES: usize = 48;

/// Why this app must not run here.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyAppError {
    /// The host set another ConfigId than this app's. The host's fault, or a changed file: refuse.
    #[error("the machine was made for another app: its ConfigId (form {form}) is {got}, this app's is {expected}")]
    ConfigId {
        /// 1 to 3.
        form: u8,
        /// Of the hardware.
        got: String,
        /// Of the app.
        expected: String,
    },
    /// A form that is not known.
    #[error("the machine's ConfigId begins with {form}: forms 1 to 3 are known, and none at all")]
    Form {
        /// Its first byte.
        form: u8,
    },
    /// The document behind a ConfigId of form 3 is not of the documented form, or names something else.
    #[error("mr_config: {reason}")]
    Document {
        /// What is wrong.
        reason: String,
    },
    /// The keys come from another provider than the measured document pins. Refuse.
    #[error("the keys come from provider {got}, app-compose.json pins key_provider_id {pinned}: another KMS or provider answered")]
    Pinned {
        /// Who it was.
        got: String,
        /// Who it must be.
        pinned: String,
    },
}

/// What this app is.
#[derive(Debug, Clone, Copy)]
pub struct App<'a> {
    /// SHA-256 of app-compose.json.
    pub compose_hash: &'a [u8; 32],
    /// Its id.
    pub app_id: &'a [u8; 20],
    /// The instance's id, 20 bytes or none.
    pub instance_id: &'a [u8],
    /// Where its keys come from.
    pub provider: ProviderKind,
    /// Who that is.
    pub provider_id: &'a [u8],
    /// Hash of the GPU policy.
    pub gpu_policy_hash: &'a [u8; 32],
    /// Hashes of the init scripts.
    pub init_script_hashes: &'a [[u8; 32]],
}

/// Refuses other keys than the pinned provider's. Nothing pinned: any.
///
/// # Errors
/// [`VerifyAppError::Pinned`].
pub fn require_pinned(pinned: &[u8], got: &[u8]) -> Result<(), VerifyAppError> {
    if pinned.is_empty() || pinned == got {
        return Ok(());
    }
    let shown = |bytes: &[u8]| if bytes.is_empty() { "without an id".to_owned() } else { hex::encode(bytes) };
    Err(VerifyAppError::Pinned { got: shown(got), pinned: hex::encode(pinned) })
}

/// Refuses a machine whose ConfigId is another app's. `mr_config`: the document of form 3, from the host; its hash is in the ConfigId.
///
/// # Errors
/// [`VerifyAppError`].
pub fn require_config_id(id: &[u8; CONFIG_ID_BYTES], app: App<'_>, mr_config: &str) -> Result<(), VerifyAppError> {
    let [form, value @ ..] = id;
    let (hash, filler) = value.split_at_checked(32).unwrap_or_default();
    if id.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    let expected: [u8; 32] = match form {
        1 => *app.compose_hash,
        2 => second_form(app),
        3 => sha256(&[b"dstack-mr-config-v3:", &[0], mr_config.as_bytes()]),
        _ => return Err(VerifyAppError::Form { form: *form }),
    };
    if hash != expected || filler.iter().any(|byte| *byte != 0) {
        return Err(VerifyAppError::ConfigId { form: *form, got: hex::encode(value), expected: hex::encode(expected) });
    }
    if *form == 3 { document(mr_config, app) } else { Ok(()) }
}

fn second_form(app: App<'_>) -> [u8; 32] {
    let kind = match app.provider {
        ProviderKind::None => 0,
        ProviderKind::Local => 1,
        ProviderKind::Kms => 2,
        ProviderKind::Tpm => 3,
    };
    Keccak256::new()
        .chain_update(app.compose_hash)
        .chain_update(app.app_id)
        .chain_update([kind])
        .chain_update(app.provider_id)
        .finalize()
        .into()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    app_id: Option<String>,
    compose_hash: Option<String>,
    gpu_policy_hash: Option<String>,
    key_provider: Option<String>,
    key_provider_id: Option<String>,
    instance_id: Option<String>,
    init_script_hashes: Option<Vec<String>>,
}

fn document(text: &str, app: App<'_>) -> Result<(), VerifyAppError> {
    let wrong = |reason: String| VerifyAppError::Document { reason };
    let document: Document = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
    if document.version != 3 {
        return Err(wrong(format!("version is {}, expected 3", document.version)));
    }
    let scripts: Vec<String> = app.init_script_hashes.iter().map(hex::encode).collect();
    for (name, named, own) in [
        ("app_id", document.app_id, hex::encode(app.app_id)),
        ("compose_hash", document.compose_hash, hex::encode(app.compose_hash)),
        ("gpu_policy_hash", document.gpu_policy_hash, hex::encode(app.gpu_policy_hash)),
        ("key_provider", document.key_provider, app.provider.name().to_owned()),
        ("key_provider_id", document.key_provider_id, hex::encode(app.provider_id)),
        ("instance_id", document.instance_id, hex::encode(app.instance_id)),
        ("init_script_hashes", document.init_script_hashes.map(|hashes| hashes.join(",")), scripts.join(",")),
    ] {
        if let Some(named) = named.filter(|named| !named.eq_ignore_ascii_case(&own)) {
            return Err(wrong(format!("{name} is {:?}, this app's is {own:?}", named.chars().take(200).collect::<String>())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT_SPKI: &str = "3059301306072a8648ce3d020106082a8648ce3d0301070342000491f50522407ce29dce3ed7d31a15d80c1c42f13a23552d2b33a0ce09ee11e47b\
                             ce95936f3e7f80d195f879e28e1b144ef37ac9ab8e36a690cbf930b775897b27";

    fn with_app<T>(work: impl FnOnce(App<'_>) -> T) -> T {
        let spki = hex::decode(ROOT_SPKI).unwrap();
        work(App {
            compose_hash: &[0x44; 32],
            app_id: &[0x11; 20],
            instance_id: &[0x22; 20],
            provider: ProviderKind::Kms,
            provider_id: &spki,
            gpu_policy_hash: &[0; 32],
            init_script_hashes: &[],
        })
    }

    fn id(text: &str) -> [u8; 48] {
        let mut id = [0; 48];
        let bytes = hex::decode(text).unwrap();
        id[..bytes.len()].copy_from_slice(&bytes);
        id
    }

    #[test]
    fn all_forms_of_the_reference() {
        with_app(|app| {
            assert_eq!(require_config_id(&[0; 48], app, ""), Ok(()));
            assert_eq!(require_config_id(&id(&format!("01{}", "44".repeat(32))), app, ""), Ok(()));
            let second = "0220c1126867f7a9daac1ad8bd2c24c9ee0fbbe0fb704d989f226eb9f2c468bd7b";
            assert_eq!(require_config_id(&id(second), app, ""), Ok(()));
            let other = App { provider: ProviderKind::Tpm, ..app };
            assert!(matches!(require_config_id(&id(second), other, ""), Err(VerifyAppError::ConfigId { form: 2, .. })));
            let document = format!(
                r#"{{"app_id":"{}","compose_hash":"{}","instance_id":"{}","key_provider":"kms","key_provider_id":"{ROOT_SPKI}","version":3}}"#,
                "11".repeat(20),
                "44".repeat(32),
                "22".repeat(20)
            );
            let third = id("03d2fb0d0c3164b3493ac3b11226b8702c13acfa7cf52b53197d9c6edbae7f8205");
            assert_eq!(require_config_id(&third, app, &document), Ok(()));
            assert!(matches!(require_config_id(&third, app, "{}"), Err(VerifyAppError::ConfigId { form: 3, .. })));
            let moved = App { instance_id: &[], ..app };
            assert!(require_config_id(&third, moved, &document).unwrap_err().to_string().contains("instance_id"));
            assert_eq!(require_config_id(&id("04"), app, ""), Err(VerifyAppError::Form { form: 4 }));
            let mut filled = id(second);
            filled[47] = 1;
            assert!(require_config_id(&filled, app, "").is_err());
        });
    }

    #[test]
    fn a_pin_is_exact() {
        assert_eq!(require_pinned(&[], b"any"), Ok(()));
        assert_eq!(require_pinned(b"one", b"one"), Ok(()));
        assert!(matches!(require_pinned(b"one", b"on"), Err(VerifyAppError::Pinned { .. })));
        assert!(require_pinned(b"one", b"").unwrap_err().to_string().contains("without an id"));
    }
}
