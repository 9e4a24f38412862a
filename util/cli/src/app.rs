//! `dstack app measure`: what an app is known by. Owns: writing app-compose.json by dstack's convention, hashing its bytes.
//! Never: hashes anything but the bytes that are shipped.
//! Source: reference on app-compose.json ("Compose hash": sorted keys, compact, UTF-8 as it is; hash the bytes, ship the bytes).

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use dstack_protocol::codec::sha256;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::args;
use crate::failure::{Done, Failure};
use crate::files;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Compose hash and app id of an app.
    #[command(after_help = HELP)]
    Measure(Measure),
}

const HELP: &str =
    "Of a docker-compose YAML file it writes app-compose.json (next to it, or to --out): sorted keys, compact, manifest_version 2.
Of an app-compose.json it hashes the bytes as they are. app_id is the first 20 bytes of the compose hash.
The emulated Nitro of tests measures its own image: `dstack-testkit measure --platform nitro --compose app-compose.json`.

Examples: dstack app measure docker-compose.yml --pin pin.json --name shop
          dstack app measure app-compose.json";

#[derive(Args)]
pub(crate) struct Measure {
    /// docker-compose YAML or app-compose.json.
    file: PathBuf,
    /// Where to write app-compose.json.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Replace the file to write if it is there.
    #[arg(long)]
    force: bool,
    /// Pin from `cluster init`: becomes the measured member `dstack_kms`, the public keys of roots `ca` and `id` included.
    #[arg(long)]
    pin: Option<PathBuf>,
    /// Name of the app; without it the name of the folder or file.
    #[arg(long)]
    name: Option<String>,
    /// Where the app's disk key comes from.
    #[arg(long, value_enum, default_value = "kms")]
    key_provider: KeyProvider,
    /// Hex id that the key provider must have.
    #[arg(long, default_value = "")]
    key_provider_id: String,
    /// Environment variables that may be set after measuring; repeat or separate by commas.
    #[arg(long = "allowed-env", value_delimiter = ',')]
    allowed_envs: Vec<String>,
    /// Serve the app's logs to anyone.
    #[arg(long)]
    public_logs: bool,
    /// Serve system information to anyone.
    #[arg(long)]
    public_sysinfo: bool,
    /// Reach the app through a gateway.
    #[arg(long)]
    gateway: bool,
    /// One identity for all instances: no instance id, so no disk key of an instance.
    #[arg(long)]
    no_instance_id: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
enum KeyProvider {
    None,
    Kms,
    Local,
    Tpm,
}

impl KeyProvider {
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Kms => "kms",
            Self::Local => "local",
            Self::Tpm => "tpm",
        }
    }
}

/// Largest file measured.
const FILE_BYTES_MAX: usize = 4 * 1024 * 1024;

pub(crate) fn run(command: Command) -> Done {
    let Command::Measure(measure) = command;
    let bytes = files::read(&measure.file, FILE_BYTES_MAX)?;
    // JSON is YAML too, so JSON is asked first, unless the name says YAML.
    let named_yaml = measure.file.extension().is_some_and(|extension| extension == "yml" || extension == "yaml");
    let document: Option<Value> = if named_yaml { None } else { serde_json::from_slice(&bytes).ok() };
    match document {
        Some(document) => {
            if measure.pin.is_some() || measure.out.is_some() {
                let hint = "give --pin and --out with the docker-compose YAML, from which app-compose.json is made";
                return Err(Failure::usage("an app-compose.json is measured as it is", hint));
            }
            check_app_compose(&document).map_err(|why| not_a_compose(&measure.file, &why))?;
            Ok(report(&bytes, &measure.file, measure.json))
        }
        None => {
            let composed = compose(&measure, &bytes)?;
            let out = measure.out.clone().unwrap_or_else(|| measure.file.with_file_name("app-compose.json"));
            let same = std::fs::read(&out).is_ok_and(|old| old == composed);
            if measure.force {
                files::replace(&out, &composed)?;
            } else if !same {
                files::write_new(&out, &composed)?;
            }
            Ok(report(&composed, &out, measure.json))
        }
    }
}

fn report(bytes: &[u8], path: &Path, as_json: bool) -> String {
    let hash = sha256(&[bytes]);
    let compose_hash = hex::encode(hash);
    // dstack: an app id is the first 20 bytes of the first compose hash.
    let app_id: String = compose_hash.chars().take(40).collect();
    if as_json {
        return format!("{}\n", json!({"app_compose": path.display().to_string(), "compose_hash": compose_hash, "app_id": app_id}));
    }
    format!("app_compose={}\ncompose_hash={compose_hash}\napp_id={app_id}\n", path.display())
}

fn not_a_compose(path: &Path, why: &str) -> Failure {
    Failure::wrong(format!("{}: {why}", path.display()), "give a docker-compose YAML file or an app-compose.json")
}

fn check_app_compose(document: &Value) -> Result<(), String> {
    let members = document.as_object().ok_or("not a JSON object")?;
    for name in ["name", "runner"] {
        if !members.get(name).is_some_and(Value::is_string) {
            return Err(format!("app-compose.json needs a text member {name}"));
        }
    }
    let versioned = members.get("manifest_version").is_some_and(|version| version.is_u64() || version.is_string());
    if versioned { Ok(()) } else { Err("app-compose.json needs manifest_version".to_owned()) }
}

/// Makes app-compose.json of a docker-compose file.
fn compose(measure: &Measure, yaml: &[u8]) -> Result<Vec<u8>, Failure> {
    let wrong = |why: &str| not_a_compose(&measure.file, why);
    let text = std::str::from_utf8(yaml).map_err(|_| wrong("not UTF-8"))?;
    let parsed: serde_yaml_ng::Value = serde_yaml_ng::from_str(text).map_err(|error| wrong(&format!("not YAML: {error}")))?;
    let services = parsed.get("services").and_then(serde_yaml_ng::Value::as_mapping);
    if services.is_none_or(serde_yaml_ng::Mapping::is_empty) {
        return Err(wrong("no services in it"));
    }
    let name = measure.name.clone().or_else(|| default_name(&measure.file));
    let name = name.ok_or_else(|| Failure::usage("the app has no name", "give --name"))?;
    if !measure.key_provider_id.is_empty() {
        args::hex_bytes(&measure.key_provider_id).map_err(|why| Failure::usage(format!("--key-provider-id: {why}"), "give hex digits"))?;
    }
    let mut members = json!({
        "manifest_version": 2,
        "name": name,
        "runner": "docker-compose",
        "docker_compose_file": text,
        "kms_enabled": measure.key_provider == KeyProvider::Kms,
        "local_key_provider_enabled": measure.key_provider == KeyProvider::Local,
        "key_provider": measure.key_provider.name(),
        "key_provider_id": measure.key_provider_id,
        "gateway_enabled": measure.gateway,
        "public_logs": measure.public_logs,
        "public_sysinfo": measure.public_sysinfo,
        "allowed_envs": measure.allowed_envs,
        "no_instance_id": measure.no_instance_id,
        "secure_time": true,
    });
    if let (Some(path), Some(members)) = (&measure.pin, members.as_object_mut()) {
        members.insert("dstack_kms".to_owned(), Pin::load(path)?.measured());
    }
    Ok(sorted(members).to_string().into_bytes())
}

/// The folder's name, as docker compose has it, else the file's.
fn default_name(file: &Path) -> Option<String> {
    let folder = file.canonicalize().ok()?.parent()?.file_name()?.to_str().map(str::to_owned);
    folder.or_else(|| file.file_stem()?.to_str().map(str::to_owned))
}

/// A pin as `cluster init` prints it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pin {
    cluster_id: String,
    pk_prf: String,
    generation: u32,
    /// Public key of root `ca`, where the pin has it: what a guest holds the root's certificate against.
    #[serde(default)]
    ca_pub: Option<String>,
    /// Public key of root `id`: who signs app keys.
    #[serde(default)]
    id_pub: Option<String>,
}

impl Pin {
    fn load(path: &Path) -> Result<Self, Failure> {
        let bad = |why: String| Failure::wrong(format!("{}: {why}", path.display()), "use the pin that `dstack cluster init` wrote");
        let pin: Self = serde_json::from_slice(&files::read(path, 4096)?).map_err(|error| bad(error.to_string()))?;
        for value in [&pin.cluster_id, &pin.pk_prf] {
            args::hash(value).map_err(&bad)?;
        }
        for (name, key, lengths) in [("ca_pub", &pin.ca_pub, [64, 66].as_slice()), ("id_pub", &pin.id_pub, &[66])] {
            if key.as_ref().is_some_and(|key| !lengths.contains(&key.len()) || hex::decode(key).is_err()) {
                return Err(bad(format!("{name} is no public key")));
            }
        }
        if pin.generation != 0 {
            return Err(bad(format!("generation {} is not one that this build pins", pin.generation)));
        }
        Ok(pin)
    }

    /// What is measured: the cluster and the public keys of its roots, in lower case so that one pin has one hash.
    fn measured(&self) -> Value {
        let members = [
            ("cluster_id", Some(&self.cluster_id)),
            ("pk_prf", Some(&self.pk_prf)),
            ("ca_pub", self.ca_pub.as_ref()),
            ("id_pub", self.id_pub.as_ref()),
        ];
        let named = members.into_iter().filter_map(|(name, value)| Some((name.to_owned(), Value::from(value?.to_lowercase()))));
        Value::Object(named.collect())
    }
}

/// Keys of every object in ascending order.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(members) => {
            let mut members: Vec<(String, Value)> = members.into_iter().map(|(name, value)| (name, sorted(value))).collect();
            members.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(members.into_iter().collect::<Map<_, _>>())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}
