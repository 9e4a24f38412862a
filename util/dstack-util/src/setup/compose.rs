//! app-compose.json as the boot reads it. Owns: its members, the rules between them. Never: its hash over anything but the bytes.
//! Source: util and deploy reference §7.

use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

/// Largest manifest version that is known.
pub const MANIFEST_VERSION_MAX: u32 = 3;
/// Init scripts at most.
pub const INIT_SCRIPTS_MAX: usize = 5;

/// Why app-compose.json is refused. Whoever wrote it is at fault: mend it (its hash changes) and register the new hash.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ComposeError {
    /// No object of the documented form.
    #[error("app-compose.json: {reason}")]
    Form {
        /// The parser's words.
        reason: String,
    },
    /// A member is out of its range.
    #[error("app-compose.json: {member} is {got}, expected {expected}")]
    Member {
        /// Its name.
        member: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        got: String,
    },
    /// A member that this version does not have.
    #[error("app-compose.json: {member} needs manifest_version \"3\", this file has {version}")]
    Version {
        /// Its name.
        member: &'static str,
        /// The file's version.
        version: u32,
    },
}

/// Where keys come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProviderKind {
    /// New ones each boot.
    None,
    /// A KMS.
    Kms,
    /// A key provider beside this machine.
    Local,
    /// This machine's TPM.
    Tpm,
}

impl ProviderKind {
    /// As event `key-provider` names it.
    #[must_use]
    pub const fn event_name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Kms => "kms",
            Self::Local => "local-sgx",
            Self::Tpm => "tpm",
        }
    }

    /// As app-compose.json and MrConfig name it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            other => other.event_name(),
        }
    }
}

/// A file system of the data disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StorageFs {
    /// ZFS.
    Zfs,
    /// ext4.
    Ext4,
}

impl StorageFs {
    /// As event `storage-fs` names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zfs => "zfs",
            Self::Ext4 => "ext4",
        }
    }
}

/// Conditions on the machine (manifest version 3).
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Requirements {
    /// Comparison with the image's version.
    pub os_version: Option<String>,
    /// Platforms that it may run on.
    pub platforms: Option<Vec<String>>,
    /// Whether ACPI tables have to be measured.
    pub tdx_measure_acpi_tables: Option<bool>,
    /// Hash of a token that the deployer must know.
    pub launch_token_hash: Option<String>,
    /// What GPUs have to prove.
    pub gpu_policy: Option<serde_json::Value>,
    /// Whether the agent shall answer for the health of containers: it always does, so nothing is judged by it.
    pub health_check: Option<serde_json::Value>,
}

/// The document.
#[derive(Debug, Clone, PartialEq)]
pub struct Compose {
    /// 1 to 3.
    pub manifest_version: u32,
    /// Of the app, for people.
    pub name: String,
    /// Where keys come from.
    pub key_provider: ProviderKind,
    /// The provider it must be, if pinned.
    pub key_provider_id: Vec<u8>,
    /// Environment variables that may come from outside.
    pub allowed_envs: Vec<String>,
    /// Whether all instances are one.
    pub no_instance_id: bool,
    /// Whether the clock is set right before anything is measured.
    pub secure_time: bool,
    /// File system of the data disk; the default is the machine's.
    pub storage_fs: Option<StorageFs>,
    /// Swap, bytes; 0 for none.
    pub swap_bytes: u64,
    /// 1 or 2.
    pub event_log_version: u8,
    /// Scripts that are measured one by one.
    pub init_scripts: Vec<String>,
    /// Conditions.
    pub requirements: Requirements,
    /// Canonical text of `requirements.gpu_policy`, `{}` without one.
    pub gpu_policy: Vec<u8>,
}

#[derive(Deserialize)]
struct Raw {
    manifest_version: ManifestVersion,
    #[serde(default)]
    name: String,
    #[serde(default)]
    runner: String,
    #[serde(default)]
    snapshotter: Option<String>,
    #[serde(default)]
    kms_enabled: bool,
    #[serde(default)]
    local_key_provider_enabled: bool,
    #[serde(default)]
    key_provider: Option<ProviderKind>,
    #[serde(default)]
    key_provider_id: Option<String>,
    #[serde(default)]
    allowed_envs: Option<Vec<String>>,
    #[serde(default)]
    no_instance_id: bool,
    #[serde(default = "yes")]
    secure_time: bool,
    #[serde(default)]
    storage_fs: Option<StorageFs>,
    #[serde(default)]
    swap_size: Option<Size>,
    #[serde(default)]
    event_log_version: Option<u8>,
    #[serde(default)]
    init_script: Option<Scripts>,
    #[serde(default)]
    requirements: Option<Requirements>,
}

const fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ManifestVersion {
    Number(u32),
    Text(String),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Scripts {
    One(String),
    Several(Vec<String>),
}

struct Size(u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Text {
            Number(u64),
            Text(String),
        }
        match Text::deserialize(deserializer)? {
            Text::Number(bytes) => Ok(Self(bytes)),
            Text::Text(text) => size_of(&text).map(Self).ok_or_else(|| D::Error::custom("a size is a number, or one with K, M, G or T")),
        }
    }
}

fn size_of(text: &str) -> Option<u64> {
    let text = text.trim().trim_end_matches(['b', 'B']).trim_end_matches('i');
    let (digits, shift) = match text.char_indices().last()? {
        (at, 'k' | 'K') => (text.get(..at)?, 10),
        (at, 'm' | 'M') => (text.get(..at)?, 20),
        (at, 'g' | 'G') => (text.get(..at)?, 30),
        (at, 't' | 'T') => (text.get(..at)?, 40),
        _ => (text, 0),
    };
    digits.trim().parse::<u64>().ok()?.checked_mul(1 << shift)
}

impl Compose {
    /// Reads the document. Unknown members at the top are allowed, as in dstack.
    ///
    /// # Errors
    /// [`ComposeError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ComposeError> {
        let raw: Raw = crate::files::json_object(bytes).map_err(|error| ComposeError::Form { reason: error.to_string() })?;
        let version = version_of(&raw.manifest_version)?;
        let needs_3 = |member: &'static str| if version >= 3 { Ok(()) } else { Err(ComposeError::Version { member, version }) };
        let requirements = match raw.requirements {
            None => Requirements::default(),
            Some(requirements) => {
                needs_3("requirements")?;
                requirements
            }
        };
        let init_scripts = match raw.init_script {
            None => Vec::new(),
            Some(Scripts::One(script)) => vec![script],
            Some(Scripts::Several(scripts)) => {
                needs_3("a list of init_script")?;
                if scripts.len() > INIT_SCRIPTS_MAX {
                    return Err(wrong("init_script", "at most 5 scripts", scripts.len()));
                }
                scripts
            }
        };
        match raw.runner.as_str() {
            "nerdctl-compose" => needs_3("runner nerdctl-compose")?,
            "" | "docker-compose" | "bash" => {}
            other => return Err(wrong("runner", "docker-compose, nerdctl-compose or bash", other)),
        }
        match raw.snapshotter.as_deref() {
            None | Some("overlayfs" | "stargz") if raw.snapshotter.is_none() || raw.runner == "nerdctl-compose" => {}
            Some(other) => return Err(wrong("snapshotter", "overlayfs or stargz, and with runner nerdctl-compose alone", other)),
            None => {}
        }
        let by_flags = match (raw.kms_enabled, raw.local_key_provider_enabled) {
            (true, _) => ProviderKind::Kms,
            (false, true) => ProviderKind::Local,
            (false, false) => ProviderKind::None,
        };
        let pin = raw.key_provider_id.unwrap_or_default();
        let key_provider_id = hex::decode(pin.trim_start_matches("0x"))
            .map_err(|_| wrong("key_provider_id", "hex", pin.chars().take(80).collect::<String>()))?;
        let event_log_version = raw.event_log_version.unwrap_or(1);
        if !(1..=2).contains(&event_log_version) {
            return Err(wrong("event_log_version", "1 or 2", event_log_version));
        }
        let policy = requirements.gpu_policy.clone().unwrap_or_else(|| serde_json::Value::Object(serde_json::Map::default()));
        let gpu_policy =
            serde_jcs::to_vec(&policy).map_err(|error| wrong("requirements.gpu_policy", "JSON with a canonical form", error))?;
        Ok(Self {
            manifest_version: version,
            name: raw.name,
            key_provider: raw.key_provider.unwrap_or(by_flags),
            key_provider_id,
            allowed_envs: raw.allowed_envs.unwrap_or_default(),
            no_instance_id: raw.no_instance_id,
            secure_time: raw.secure_time,
            storage_fs: raw.storage_fs,
            swap_bytes: raw.swap_size.map_or(0, |Size(bytes)| bytes),
            event_log_version,
            init_scripts,
            requirements,
            gpu_policy,
        })
    }
}

/// Integers up to 2, or canonical text; from 3 on text alone, so that older guests refuse the file.
fn version_of(version: &ManifestVersion) -> Result<u32, ComposeError> {
    let expected = "1 or 2 as a number, or \"1\" to \"3\" as text";
    let (number, got) = match version {
        ManifestVersion::Number(number @ 1..=2) => return Ok(*number),
        ManifestVersion::Number(number) => (None, number.to_string()),
        ManifestVersion::Text(text) => (text.parse::<u32>().ok().filter(|number| number.to_string() == *text), format!("{text:?}")),
    };
    number.filter(|number| (1..=MANIFEST_VERSION_MAX).contains(number)).ok_or_else(|| wrong("manifest_version", expected, got))
}

fn wrong(member: &'static str, expected: &'static str, got: impl ToString) -> ComposeError {
    ComposeError::Member { member, expected, got: got.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: &str) -> String {
        Compose::parse(json.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn defaults_and_derived_members() {
        let plain = Compose::parse(br#"{"manifest_version":2,"name":"a","an_unknown_member":[1],"dstack_kms":{}}"#).unwrap();
        assert_eq!((plain.key_provider, plain.secure_time, plain.event_log_version), (ProviderKind::None, true, 1));
        assert_eq!(plain.gpu_policy, b"{}");
        let kms = Compose::parse(br#"{"manifest_version":1,"kms_enabled":true,"local_key_provider_enabled":true}"#).unwrap();
        assert_eq!(kms.key_provider, ProviderKind::Kms);
        let named = Compose::parse(br#"{"manifest_version":"2","kms_enabled":true,"key_provider":"tpm","swap_size":"2G"}"#).unwrap();
        assert_eq!((named.key_provider, named.swap_bytes), (ProviderKind::Tpm, 2 << 30));
        let third = br#"{"manifest_version":"3","init_script":["a","b"],"requirements":{"gpu_policy":{"b":1,"a":2},"health_check":true}}"#;
        let third = Compose::parse(third).unwrap();
        assert_eq!((third.init_scripts.len(), third.gpu_policy.as_slice()), (2, &br#"{"a":2,"b":1}"#[..]));
    }

    #[test]
    fn rules_between_members() {
        assert!(refused(r#"{"manifest_version":3}"#).contains("manifest_version is 3"));
        assert!(refused(r#"{"manifest_version":"03"}"#).contains("manifest_version"));
        assert!(refused(r#"{"manifest_version":"4"}"#).contains("\"4\""));
        assert!(refused(r#"{"manifest_version":2,"requirements":{}}"#).contains("needs manifest_version \"3\""));
        assert!(refused(r#"{"manifest_version":"3","requirements":{"unknown":1}}"#).contains("unknown"));
        assert!(refused(r#"{"manifest_version":2,"runner":"nerdctl-compose"}"#).contains("nerdctl-compose"));
        assert!(refused(r#"{"manifest_version":"3","init_script":["","","","","",""]}"#).contains("at most 5"));
        assert!(refused(r#"{"manifest_version":2,"snapshotter":"stargz"}"#).contains("snapshotter"));
        assert!(refused(r#"{"manifest_version":2,"key_provider":"sgx"}"#).contains("sgx"));
        assert!(refused(r#"{"manifest_version":2,"key_provider":"kms","key_provider":"none"}"#).contains("duplicate"));
        assert!(refused(r#"{"name":"a"}"#).contains("manifest_version"));
        assert!(refused("[2]").contains("object"));
        let deep = "[".repeat(1_000_000);
        assert!(refused(&format!(r#"{{"manifest_version":2,"unknown":{deep}"#)).contains("EOF"), "and no stack is used up");
        assert!(refused(&format!(r#"{{"manifest_version":"3","requirements":{{"gpu_policy":{deep}"#)).contains("recursion"));
    }
}
