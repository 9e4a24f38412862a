//! Configuration files of dstack's own agent: `/dstack/agent.json`. Owns: which of its keys mean what here. Never: a key of ours.
//! Source: guest API reference §1; util and deploy reference §8.
//!
//! Upstream's agent has its listeners built in; so has this one where it is given upstream's file. Keys that have no meaning here
//! (addresses of collateral) are ignored, as upstream ignores unknown ones.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use dstack_runtime::config::ConfigError;
use serde::Deserialize;
use serde_json::json;

/// Where the boot leaves its files.
const HOST_SHARED: &str = "/dstack/.host-shared";
/// Largest file, bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024;

#[derive(Debug, Deserialize)]
struct Profiles {
    default: Profile,
}

#[derive(Debug, Deserialize)]
struct Profile {
    #[serde(default)]
    core: Core,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Core {
    keys_file: Option<PathBuf>,
    compose_file: Option<PathBuf>,
    sys_config_file: Option<PathBuf>,
    data_disks: Option<Vec<PathBuf>>,
}

/// Our keys for a file of upstream's; `None` for a file that is not JSON.
///
/// # Errors
/// [`ConfigError`] for JSON of another form.
pub fn read(path: &Path) -> Result<Option<Vec<(String, String)>>, ConfigError> {
    let mut text = String::new();
    // What cannot be read is the loader's to say.
    let Ok(file) = File::open(path) else { return Ok(None) };
    if file.take(FILE_BYTES_MAX).read_to_string(&mut text).is_err() || !text.trim_start().starts_with('{') {
        return Ok(None);
    }
    let profiles: Profiles = serde_json::from_str(&text).map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        line: error.line(),
        message: format!("not a file of dstack's agent: {error}"),
    })?;
    Ok(Some(keys(profiles.default.core)))
}

fn keys(core: Core) -> Vec<(String, String)> {
    let shared = |name: &str| Path::new(HOST_SHARED).join(name);
    let quoted = |path: PathBuf| json!(path.to_string_lossy()).to_string();
    let mut keys = vec![
        ("device", json!(device()).to_string()),
        ("keys_file", quoted(core.keys_file.unwrap_or_else(|| shared(".appkeys.json")))),
        ("app_compose", quoted(core.compose_file.unwrap_or_else(|| shared("app-compose.json")))),
        ("sys_config", quoted(core.sys_config_file.unwrap_or_else(|| shared(".sys-config.json")))),
        ("api.socket", json!("/var/run/dstack/dstack.sock").to_string()),
        ("api.tappd_socket", json!("/var/run/dstack/tappd.sock").to_string()),
        ("api.external", json!("0.0.0.0:8090").to_string()),
    ];
    if Path::new("/dev/vsock").exists() {
        keys.push(("api.host", json!("vsock:8000").to_string()));
    }
    if let Some(disks) = core.data_disks {
        let disks: Vec<_> = disks.iter().map(|path| path.to_string_lossy()).collect();
        keys.push(("machine.data_disks", json!(disks).to_string()));
    }
    keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// The machine's device: an enclave by its module, Google's by its name, else a TD (attestation reference §10).
fn device() -> &'static str {
    if Path::new("/dev/nsm").exists() {
        return "nsm";
    }
    let product = std::fs::read_to_string("/sys/class/dmi/id/product_name").unwrap_or_default();
    if product.trim() == "Google Compute Engine" { "gcp" } else { "tdx" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, KeySource, load};

    fn config(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agent.json");
        std::fs::write(&file, text).unwrap();
        load(file)?.raw.try_into()
    }

    #[test]
    fn upstreams_file_means_what_it_means_there() {
        let text = r#"{"default":{"core":{"pccs_url":"https://p","data_disks":["/","/dstack/persistent"]}}}"#;
        let config = config(text).unwrap();
        assert_eq!(config.keys, KeySource::File { file: "/dstack/.host-shared/.appkeys.json".into(), dstack_urls: Vec::new() });
        assert_eq!(config.app_compose, Path::new("/dstack/.host-shared/app-compose.json"));
        assert_eq!(config.sys_config, Some("/dstack/.host-shared/.sys-config.json".into()));
        assert_eq!(config.surroundings.data_disks, [Path::new("/"), Path::new("/dstack/persistent")]);
        assert_eq!(config.socket, Path::new("/var/run/dstack/dstack.sock"));
        assert_eq!(config.tappd_socket, Some("/var/run/dstack/tappd.sock".into()));
        assert_eq!(config.external, Some("0.0.0.0:8090".parse().unwrap()));
    }

    #[test]
    fn its_own_paths_win() {
        let config = config(r#"{"default":{"core":{"keys_file":"/k","compose_file":"/c","sys_config_file":"/s"}}}"#).unwrap();
        assert_eq!(config.keys, KeySource::File { file: "/k".into(), dstack_urls: Vec::new() });
        assert_eq!((config.app_compose.as_path(), config.sys_config.as_deref()), (Path::new("/c"), Some(Path::new("/s"))));
    }

    #[test]
    fn other_json_is_refused_with_its_line() {
        for text in ["{}", "{\n\"default\": 7}", "{\"default\":{\"core\":{\"data_disks\":7}}}", "{"] {
            assert!(matches!(config(text), Err(ConfigError::Syntax { .. })), "{text}");
        }
    }
}
