//! What later services read: the agent's configuration, the container engine's mirror. Owns: their JSON. Never: a secret in them.
//! Source: util and deploy reference §8 (agent.json), §3 step 11.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::files::{self, FileError};
use crate::setup::host_shared::SysConfig;

/// Largest configuration of a container engine that is read.
const ENGINE_BYTES_MAX: u64 = 1 << 20;

/// Why a configuration cannot be written.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    /// A file.
    #[error("{0}")]
    File(#[from] FileError),
    /// The engine's configuration is no JSON object. Operator's to fix.
    #[error("{file} is no JSON object")]
    Engine {
        /// The file.
        file: String,
    },
}

/// `agent.json`.
#[must_use]
pub fn agent_json(config: &SysConfig, mount_point: Option<&Path>) -> String {
    let mut disks = vec!["/".to_owned()];
    disks.extend(mount_point.map(|path| path.display().to_string()));
    let mut core = Map::new();
    core.extend(config.pccs().map(|url| ("pccs_url".to_owned(), Value::from(url))));
    core.insert("data_disks".to_owned(), Value::from(disks));
    json!({ "default": { "core": core } }).to_string()
}

/// Writes it.
///
/// # Errors
/// [`AgentError::File`].
pub fn write(work_dir: &Path, config: &SysConfig, mount_point: Option<&Path>) -> Result<(), AgentError> {
    Ok(files::write(&work_dir.join("agent.json"), agent_json(config, mount_point).as_bytes(), 0o644)?)
}

/// Adds the host's mirror to the engine's configuration; nothing where the host names none.
///
/// # Errors
/// [`AgentError`].
pub fn registry_mirror(file: &Path, mirror: &str) -> Result<(), AgentError> {
    if mirror.is_empty() {
        return Ok(());
    }
    let not_json = || AgentError::Engine { file: file.display().to_string() };
    let mut settings = match files::read_if_there(file, ENGINE_BYTES_MAX)? {
        None => Map::new(),
        Some(bytes) => serde_json::from_slice(&bytes).map_err(|_| not_json())?,
    };
    settings.insert("registry-mirrors".to_owned(), json!([mirror]));
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).map_err(|error| FileError::system("make", folder, &error))?;
    }
    Ok(files::write(file, Value::Object(settings).to_string().as_bytes(), 0o644)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_documents() {
        let config = SysConfig { pccs_url: "https://p".into(), ..SysConfig::default() };
        let expected = r#"{"default":{"core":{"pccs_url":"https://p","data_disks":["/","/data"]}}}"#;
        assert_eq!(agent_json(&config, Some(Path::new("/data"))), expected);
        assert_eq!(agent_json(&SysConfig::default(), None), r#"{"default":{"core":{"data_disks":["/"]}}}"#);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("docker/daemon.json");
        registry_mirror(&file, "").unwrap();
        assert!(!file.exists());
        registry_mirror(&file, "https://m").unwrap();
        std::fs::write(&file, r#"{"log-driver":"journald","registry-mirrors":["old"]}"#).unwrap();
        registry_mirror(&file, "https://m").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), r#"{"log-driver":"journald","registry-mirrors":["https://m"]}"#);
        std::fs::write(&file, "[]").unwrap();
        assert!(matches!(registry_mirror(&file, "https://m"), Err(AgentError::Engine { .. })));
    }
}
