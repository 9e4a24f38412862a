//! Configuration of the agent. Owns: its keys and their checks. Never: a default for whom to trust.
//! Source: style.md §8. Reference with an example: `docs/agent.md`.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use dstack_client::{NodeUrl, Route, Settings, Trust};
use dstack_protocol::release::KeyClass;
use dstack_runtime::config::{ConfigError, Loaded, Loader};
use dstack_runtime::telemetry::LogFormat;
use serde::Deserialize;

use crate::guest::Surroundings;

/// Prefix of environment variables: `DSTACK_AGENT__API__SOCKET` sets `api.socket`.
pub const ENVIRONMENT_PREFIX: &str = "DSTACK_AGENT";

/// The file as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawConfig {
    device: String,
    app_compose: PathBuf,
    #[serde(default)]
    kms_urls: Vec<String>,
    #[serde(default = "default_discover_s")]
    discover_s: u64,
    #[serde(default)]
    dstack_urls: Vec<String>,
    state_dir: Option<PathBuf>,
    keys_file: Option<PathBuf>,
    sys_config: Option<PathBuf>,
    #[serde(default = "default_proxy")]
    proxy: String,
    #[serde(default = "default_classes")]
    key_classes: Vec<String>,
    #[serde(default)]
    api: RawApi,
    #[serde(default)]
    admin: RawAdmin,
    #[serde(default)]
    machine: RawMachine,
    #[serde(default)]
    trust: Trust,
    #[serde(default)]
    boot: RawBoot,
    #[serde(default)]
    timeouts: RawTimeouts,
    #[serde(default)]
    log: RawLog,
    #[serde(default)]
    hardening: RawHardening,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawApi {
    socket: PathBuf,
    socket_mode: String,
    tappd_socket: Option<PathBuf>,
    external: Option<SocketAddr>,
    host: Option<String>,
    connections_max: usize,
}

impl Default for RawApi {
    fn default() -> Self {
        Self {
            socket: PathBuf::from("/var/run/dstack.sock"),
            socket_mode: "0777".to_owned(),
            tappd_socket: None,
            external: None,
            host: None,
            connections_max: 256,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawMachine {
    data_disks: Vec<PathBuf>,
    docker_socket: PathBuf,
    poweroff: Vec<String>,
}

impl Default for RawMachine {
    fn default() -> Self {
        Self {
            data_disks: vec![PathBuf::from("/")],
            docker_socket: PathBuf::from("/var/run/docker.sock"),
            poweroff: ["systemctl", "poweroff"].map(str::to_owned).to_vec(),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawAdmin {
    listen: Option<SocketAddr>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawBoot {
    app_id: Option<String>,
    instance_seed: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawTimeouts {
    connect_ms: u64,
    request_ms: u64,
    hedge_ms: u64,
    patience_ms: u64,
}

impl Default for RawTimeouts {
    fn default() -> Self {
        Self { connect_ms: 5_000, request_ms: 15_000, hedge_ms: 1_500, patience_ms: 60_000 }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLog {
    format: LogFormat,
    filter: String,
}

impl Default for RawLog {
    fn default() -> Self {
        Self { format: LogFormat::Json, filter: "info".to_owned() }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawHardening {
    lock_memory: bool,
}

fn default_discover_s() -> u64 {
    600
}

fn default_proxy() -> String {
    Route::Direct.to_string()
}

fn default_classes() -> Vec<String> {
    [KeyClass::Disk, KeyClass::Env, KeyClass::K256].map(|class| class.name().to_owned()).to_vec()
}

/// The checked configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// As `dstack_tee::open` reads it.
    pub device: String,
    /// app-compose.json, the measured file.
    pub app_compose: PathBuf,
    /// Where keys come from.
    pub keys: KeySource,
    /// The host's `.sys-config.json`, where there is one.
    pub sys_config: Option<PathBuf>,
    /// How nodes are reached.
    pub route: Route,
    /// Keys to fetch at start.
    pub key_classes: Vec<KeyClass>,
    /// Guest socket.
    pub socket: PathBuf,
    /// Its permissions.
    pub socket_mode: u32,
    /// Socket of the legacy API, where it is served.
    pub tappd_socket: Option<PathBuf>,
    /// External listener, where it is served.
    pub external: Option<SocketAddr>,
    /// Listener for the host, where it is served.
    pub host: Option<HostListener>,
    /// Connections to each listener.
    pub connections_max: usize,
    /// Machinery around the guest.
    pub surroundings: Surroundings,
    /// Health and metrics, where wanted.
    pub admin_listen: Option<SocketAddr>,
    /// What nodes are judged by.
    pub trust: Trust,
    /// App id of an emulated boot; else from the compose hash.
    pub app_id: Option<[u8; 20]>,
    /// Instance seed of an emulated boot; else made once and kept in `state_dir`.
    pub instance_seed: Option<Vec<u8>>,
    /// Of the client.
    pub settings: Settings,
    /// Of the log.
    pub log_format: LogFormat,
    /// Of the log.
    pub log_filter: String,
    /// Whether all memory is locked.
    pub lock_memory: bool,
}

/// Where keys come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// The cluster that the compose file pins, in mode C.
    Cluster {
        /// Nodes, in order of preference.
        kms_urls: Vec<NodeUrl>,
        /// Their dstack listeners, which certify keys.
        dstack_urls: Vec<NodeUrl>,
        /// Where check values and the instance seed are kept.
        state_dir: PathBuf,
    },
    /// The file that the boot left.
    File {
        /// The file.
        file: PathBuf,
        /// Who certifies keys, instead of the KMS that the file names.
        dstack_urls: Vec<NodeUrl>,
    },
}

/// Where the host reaches the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostListener {
    /// A port of this machine's vsock.
    Vsock(u32),
    /// A unix socket, where there is no vsock.
    Unix(PathBuf),
}

/// Reads file and environment. A file that is JSON is one of dstack's own agent: see [`crate::upstream`].
///
/// # Errors
/// [`ConfigError`] names the key.
pub fn load(file: PathBuf) -> Result<Loaded<RawConfig>, ConfigError> {
    if let Some(pairs) = crate::upstream::read(&file)? {
        let named = |key: String| format!("{ENVIRONMENT_PREFIX}__{}", key.to_uppercase().replace('.', "__"));
        let pairs = pairs.into_iter().map(|(key, value)| (named(key), value));
        // The environment still has the last word.
        return Loader::new().environment_from(ENVIRONMENT_PREFIX, pairs).environment(ENVIRONMENT_PREFIX).load();
    }
    Loader::new().file(file).environment(ENVIRONMENT_PREFIX).secret("boot.instance_seed").load()
}

fn wrong(key: &'static str, expected: &str, got: impl ToString) -> ConfigError {
    ConfigError::Value { key, expected: expected.to_owned(), got: got.to_string() }
}

impl TryFrom<RawConfig> for Config {
    type Error = ConfigError;

    fn try_from(raw: RawConfig) -> Result<Self, ConfigError> {
        let keys = key_source(&raw)?;
        let route = raw.proxy.parse().map_err(|_| wrong("proxy", "direct, vsock:CID:PORT or http://host:port", &raw.proxy))?;
        let mut key_classes = BTreeSet::new();
        for name in &raw.key_classes {
            match KeyClass::from_name(name) {
                Some(KeyClass::Custom) | None => return Err(wrong("key_classes", "disk, env, k256 or p256", name)),
                Some(class) => key_classes.insert(class),
            };
        }
        if key_classes.is_empty() {
            return Err(wrong("key_classes", "at least one of disk, env, k256, p256", "none"));
        }
        let socket_mode = u32::from_str_radix(&raw.api.socket_mode, 8)
            .ok()
            .filter(|mode| *mode <= 0o777)
            .ok_or_else(|| wrong("api.socket_mode", "octal permissions", &raw.api.socket_mode))?;
        if !(1..=4096).contains(&raw.api.connections_max) {
            return Err(wrong("api.connections_max", "1 to 4096", raw.api.connections_max));
        }
        let ms = |key, value: u64, least: u64| {
            let in_bounds = (least..=600_000).contains(&value);
            in_bounds.then(|| Duration::from_millis(value)).ok_or_else(|| wrong(key, "milliseconds, at most 600000", value))
        };
        let RawTimeouts { connect_ms, request_ms, hedge_ms, patience_ms } = raw.timeouts;
        let settings = Settings {
            connect_timeout: ms("timeouts.connect_ms", connect_ms, 1)?,
            request_timeout: ms("timeouts.request_ms", request_ms, 1)?,
            hedge_after: ms("timeouts.hedge_ms", hedge_ms, 1)?,
            patience: ms("timeouts.patience_ms", patience_ms, 0)?,
            discover_every: match raw.discover_s {
                0 => None,
                seconds @ 1..=DISCOVER_S_MAX => Some(Duration::from_secs(seconds)),
                other => return Err(wrong("discover_s", "seconds, at most 86400; 0 for the configured nodes alone", other)),
            },
        };
        let app_id = raw
            .boot
            .app_id
            .map(|text| dstack_protocol::AppId::from_hex(&text).map(|id| id.0).ok_or_else(|| wrong("boot.app_id", "40 hex digits", &text)));
        let instance_seed = raw.boot.instance_seed.map(|text| {
            hex::decode(&text)
                .ok()
                .filter(|seed| (1..=64).contains(&seed.len()))
                .ok_or_else(|| wrong("boot.instance_seed", "1 to 64 bytes of hex", "other text"))
        });
        let host = raw.api.host.as_deref().map(host_listener).transpose()?;
        let RawMachine { data_disks, docker_socket, poweroff } = raw.machine;
        if data_disks.is_empty() || data_disks.len() > DISKS_MAX {
            return Err(wrong("machine.data_disks", "1 to 16 mount points", data_disks.len()));
        }
        if poweroff.is_empty() {
            return Err(wrong("machine.poweroff", "a program and its arguments", "nothing"));
        }
        Ok(Self {
            device: raw.device,
            app_compose: raw.app_compose,
            keys,
            sys_config: raw.sys_config,
            route,
            key_classes: key_classes.into_iter().collect(),
            socket: raw.api.socket,
            socket_mode,
            tappd_socket: raw.api.tappd_socket,
            external: raw.api.external,
            host,
            connections_max: raw.api.connections_max,
            surroundings: Surroundings { data_disks, docker_socket, host_api_url: String::new(), poweroff },
            admin_listen: raw.admin.listen,
            trust: raw.trust,
            app_id: app_id.transpose()?,
            instance_seed: instance_seed.transpose()?,
            settings,
            log_format: raw.log.format,
            log_filter: raw.log.filter,
            lock_memory: raw.hardening.lock_memory,
        })
    }
}

/// Longest time between two looks for nodes.
const DISCOVER_S_MAX: u64 = 86_400;

/// Most mount points shown.
const DISKS_MAX: usize = 16;

fn key_source(raw: &RawConfig) -> Result<KeySource, ConfigError> {
    let urls = |key: &'static str, texts: &[String]| {
        let parsed = texts.iter().map(|text| text.parse::<NodeUrl>().map_err(|_| wrong(key, "https://host:port", text)));
        let parsed = parsed.collect::<Result<Vec<_>, _>>()?;
        let in_bounds = parsed.len() <= dstack_client::nodes::NODES_MAX;
        in_bounds.then_some(parsed).ok_or_else(|| wrong(key, "at most 64 addresses", texts.len()))
    };
    let dstack_urls = urls("dstack_urls", &raw.dstack_urls)?;
    if let Some(file) = &raw.keys_file {
        if !raw.kms_urls.is_empty() {
            return Err(wrong("keys_file", "either this file or kms_urls", "both"));
        }
        return Ok(KeySource::File { file: file.clone(), dstack_urls });
    }
    let kms_urls = urls("kms_urls", &raw.kms_urls)?;
    if kms_urls.is_empty() {
        return Err(wrong("kms_urls", "1 to 64 addresses, or a keys_file", "none"));
    }
    let state_dir = raw.state_dir.clone().ok_or_else(|| wrong("state_dir", "a directory", "nothing"))?;
    Ok(KeySource::Cluster { kms_urls, dstack_urls, state_dir })
}

fn host_listener(text: &str) -> Result<HostListener, ConfigError> {
    let expected = || wrong("api.host", "vsock:PORT or unix:PATH", text);
    match text.split_once(':') {
        Some(("vsock", port)) => port.parse().map(HostListener::Vsock).map_err(|_| expected()),
        Some(("unix", path)) if !path.is_empty() => Ok(HostListener::Unix(PathBuf::from(path))),
        _ => Err(expected()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str =
        "device = \"software:/run/tee.sock\"\napp_compose = \"/a.json\"\nkms_urls = [\"https://kms:12001\"]\nstate_dir = \"/s\"\n";

    fn checked(more: &str, environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agent.toml");
        std::fs::write(&file, format!("{LEAST}{more}")).unwrap();
        let pairs = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Loader::new().file(file).environment_from(ENVIRONMENT_PREFIX, pairs).load::<RawConfig>()?.raw.try_into()
    }

    #[test]
    fn the_least_that_is_needed_has_dstacks_defaults() {
        let config = checked("", &[]).unwrap();
        assert_eq!(config.socket, PathBuf::from("/var/run/dstack.sock"));
        assert_eq!(config.socket_mode, 0o777);
        assert_eq!(config.key_classes, [KeyClass::Disk, KeyClass::Env, KeyClass::K256]);
        assert_eq!(config.trust, Trust::default());
        let config = checked("", &[("DSTACK_AGENT__API__SOCKET", "/tmp/d.sock"), ("DSTACK_AGENT__KMS_URLS", "[\"https://b:1\"]")]).unwrap();
        assert_eq!(config.socket, PathBuf::from("/tmp/d.sock"));
        let KeySource::Cluster { kms_urls, dstack_urls, .. } = config.keys else { panic!("a cluster") };
        assert_eq!((kms_urls, dstack_urls), (vec!["https://b:1".parse().unwrap()], Vec::new()));
    }

    #[test]
    fn names_the_key_that_is_wrong() {
        let key = |more: &str| match checked(more, &[]) {
            Err(ConfigError::Value { key, .. }) => key.to_owned(),
            Err(ConfigError::Key { key, .. }) => key,
            other => panic!("{other:?}"),
        };
        assert_eq!(key("key_classes = [\"custom\"]"), "key_classes");
        assert_eq!(key("key_classes = []"), "key_classes");
        assert_eq!(key("[api]\nsocket_mode = \"999\""), "api.socket_mode");
        assert_eq!(key("[api]\nconnections_max = 0"), "api.connections_max");
        assert_eq!(key("[timeouts]\nrequest_ms = 0"), "timeouts.request_ms");
        assert_eq!(key("discover_s = 86401"), "discover_s");
        assert_eq!(key("[api]\nhost = \"tcp:1\""), "api.host");
        assert_eq!(key("[machine]\ndata_disks = []"), "machine.data_disks");
        assert_eq!(key("proxy = \"socks\""), "proxy");
        assert_eq!(key("dstack_urls = [\"http://x\"]"), "dstack_urls");
        assert_eq!(key("keys_file = \"/k\""), "keys_file");
        assert_eq!(key("[boot]\napp_id = \"12\""), "boot.app_id");
        assert_eq!(key("[boot]\ninstance_seed = \"\""), "boot.instance_seed");
        assert_eq!(key("[trust]\nroots = []"), "trust.roots");
        let none = checked("", &[("DSTACK_AGENT__KMS_URLS", "[]")]);
        assert!(matches!(none, Err(ConfigError::Value { key: "kms_urls", .. })));
    }
}
