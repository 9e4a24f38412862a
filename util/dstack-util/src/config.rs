//! Settings of `get-keys`. Owns: their keys and checks. Never: a default for whom to trust.
//! Sources, later ones win: TOML file, environment (`DSTACK_UTIL__KMS_URLS`), flags.

use std::path::PathBuf;
use std::time::Duration;

use dstack_client::{NodeUrl, Route, Settings, Trust};
use dstack_protocol::AppId;
use dstack_protocol::release::KeyClass;
use dstack_runtime::config::{ConfigError, Loaded, Loader};
use serde::Deserialize;

use crate::dstack_kms::base_of;
use crate::system_proxy;

/// Prefix of environment variables.
pub const ENVIRONMENT_PREFIX: &str = "DSTACK_UTIL";

/// As written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawConfig {
    kms_urls: Vec<String>,
    #[serde(default)]
    mode: Option<String>,
    #[serde(default)]
    device: Option<String>,
    #[serde(default)]
    events: Option<PathBuf>,
    #[serde(default)]
    compose: Option<PathBuf>,
    #[serde(default)]
    root_ca: Option<PathBuf>,
    #[serde(default)]
    app_id: Option<String>,
    #[serde(default)]
    output: Option<PathBuf>,
    #[serde(default)]
    kcv_file: Option<PathBuf>,
    #[serde(default = "default_classes")]
    key_classes: Vec<String>,
    #[serde(default = "default_patience")]
    patience_s: u64,
    #[serde(default = "default_discover")]
    discover: bool,
    #[serde(default)]
    proxy: Option<String>,
    /// Of the environment: see [`crate::system_proxy`].
    #[serde(default)]
    system_proxy: String,
    #[serde(default)]
    no_proxy: String,
    #[serde(default)]
    trust: Trust,
}

fn default_classes() -> Vec<String> {
    [KeyClass::Disk, KeyClass::Env, KeyClass::K256].map(|class| class.name().to_owned()).to_vec()
}

fn default_patience() -> u64 {
    60
}

fn default_discover() -> bool {
    true
}

/// Which way to a KMS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The cluster's own release: no node learns a key.
    Native,
    /// dstack's protocol: the node that answers learns the keys.
    Dstack,
}

/// Checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The way; chosen by the compose file where it is not named.
    pub mode: Option<Mode>,
    /// Nodes, in order of preference.
    pub kms_urls: Vec<NodeUrl>,
    /// As `dstack_tee::open` reads it; the one that is here without it.
    pub device: Option<String>,
    /// Event log of an emulated guest.
    pub events: Option<PathBuf>,
    /// The measured file, with the pin of mode native.
    pub compose: Option<PathBuf>,
    /// Root CA of mode dstack, PEM.
    pub root_ca: Option<PathBuf>,
    /// The app that the evidence shall name.
    pub app_id: Option<AppId>,
    /// Where the keys go; standard output without it.
    pub output: Option<PathBuf>,
    /// Where check values are kept.
    pub kcv_file: Option<PathBuf>,
    /// Keys to fetch.
    pub key_classes: Vec<KeyClass>,
    /// The way to the nodes.
    pub route: Route,
    /// What nodes are judged by.
    pub trust: Trust,
    /// Of the client.
    pub settings: Settings,
}

/// Of the client: how long it tries, and whether it learns the cluster's other nodes.
#[must_use]
pub fn settings(patience_s: u64, discover: bool) -> Settings {
    let defaults = Settings::default();
    let discover_every = defaults.discover_every.filter(|_| discover);
    Settings { patience: Duration::from_secs(patience_s), discover_every, ..defaults }
}

/// Merges file, environment and flags. `flags`: keys with their values as TOML.
///
/// # Errors
/// [`ConfigError`] names the key.
pub fn load(file: Option<PathBuf>, flags: &[(&str, String)]) -> Result<Loaded<RawConfig>, ConfigError> {
    // A proxy's address may hold a password.
    let loader = Loader::new().environment(ENVIRONMENT_PREFIX).secret("system_proxy");
    let loader = system_proxy::VARIABLES.into_iter().fold(loader, |loader, variable| loader.fallback(variable, "system_proxy"));
    let loader = system_proxy::EXEMPT.into_iter().fold(loader, |loader, variable| loader.fallback(variable, "no_proxy"));
    let loader = flags.iter().fold(loader, |loader, (key, value)| loader.flag(key, value));
    match file {
        Some(file) => loader.file(file).load(),
        None => loader.load(),
    }
}

fn wrong(key: &'static str, expected: &str, got: impl ToString) -> ConfigError {
    ConfigError::Value { key, expected: expected.to_owned(), got: got.to_string() }
}

impl TryFrom<RawConfig> for Config {
    type Error = ConfigError;

    fn try_from(raw: RawConfig) -> Result<Self, ConfigError> {
        let kms_urls =
            raw.kms_urls.iter().map(|text| base_of(text).parse::<NodeUrl>().map_err(|_| wrong("kms_urls", "https://host:port", text)));
        let kms_urls = kms_urls.collect::<Result<Vec<_>, _>>()?;
        if kms_urls.is_empty() || kms_urls.len() > dstack_client::nodes::NODES_MAX {
            return Err(wrong("kms_urls", "1 to 64 addresses", kms_urls.len()));
        }
        let app_id = raw.app_id.map(|text| AppId::from_hex(&text).ok_or_else(|| wrong("app_id", "40 hex digits", &text)));
        let mut key_classes: Vec<KeyClass> = Vec::new();
        for name in &raw.key_classes {
            // The document has places for these three.
            match KeyClass::from_name(name) {
                Some(class @ (KeyClass::Disk | KeyClass::Env | KeyClass::K256)) if !key_classes.contains(&class) => key_classes.push(class),
                _ => return Err(wrong("key_classes", "disk, env and k256, each once", name)),
            }
        }
        if key_classes.is_empty() {
            return Err(wrong("key_classes", "at least one of disk, env, k256", "none"));
        }
        if raw.patience_s > 3600 {
            return Err(wrong("patience_s", "at most 3600 seconds", raw.patience_s));
        }
        let mode = match raw.mode.as_deref() {
            None => None,
            Some("native") => Some(Mode::Native),
            Some("dstack") => Some(Mode::Dstack),
            Some(other) => return Err(wrong("mode", "native or dstack", other)),
        };
        let route = match &raw.proxy {
            Some(text) => text.parse().map_err(|_| wrong("proxy", "direct, vsock:CID:PORT or http://host:port", text))?,
            None => system_proxy::route(&raw.system_proxy, &raw.no_proxy, &kms_urls)
                .map_err(|error| wrong("proxy", &error.to_string(), "another address in the environment"))?,
        };
        let beside = raw.output.as_ref().map(|output| {
            let mut name = output.clone().into_os_string();
            name.push(".kcv.json");
            PathBuf::from(name)
        });
        Ok(Self {
            mode,
            kms_urls,
            device: raw.device,
            events: raw.events,
            compose: raw.compose,
            root_ca: raw.root_ca,
            app_id: app_id.transpose()?,
            output: raw.output,
            kcv_file: raw.kcv_file.or(beside),
            key_classes,
            route,
            trust: raw.trust,
            settings: settings(raw.patience_s, raw.discover),
        })
    }
}
