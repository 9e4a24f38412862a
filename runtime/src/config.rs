//! Typed configuration. Owns: reading a TOML file, overlaying environment and flags, naming the culprit of an error,
//! printing what is in force. Never: knows a key of any binary, keeps a secret value in an error or a print.
//! Source: style.md §8.
//!
//! A binary defines a raw struct (`#[serde(deny_unknown_fields)]`), loads it here, and checks it once into its own
//! configuration type. Later sources win: file, then environment, then flags.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// Largest configuration file that is read.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// The TOML file.
    File(PathBuf),
    /// An environment variable, by its name.
    Environment(String),
    /// A command line flag, by the key it sets.
    Flag(String),
    /// No source gave it.
    Nowhere,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Flag(key) => write!(f, "flag for {key}"),
            Self::Nowhere => f.write_str("no source"),
        }
    }
}

/// Why there is no configuration. Always the operator's to mend; the process must not start.
#[non_exhaustive]
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read config file {}: {reason}", path.display())]
    Unreadable {
        /// The file asked for.
        path: PathBuf,
        /// The operating system's answer.
        reason: String,
    },
    /// The file is larger than any sensible configuration.
    #[error("config file {} has {size_bytes} bytes, the limit is {CONFIG_BYTES_MAX}", path.display())]
    TooLarge {
        /// The file asked for.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// The file is no TOML.
    #[error("config file {} line {line}: {message}", path.display())]
    Syntax {
        /// The file asked for.
        path: PathBuf,
        /// Line of the first error, from 1.
        line: usize,
        /// What the parser expected.
        message: String,
    },
    /// An override names a path through something that is no section.
    #[error("{origin} sets `{key}`, but `{blocker}` is a value, not a section")]
    NotASection {
        /// The override.
        origin: Origin,
        /// The key it sets.
        key: String,
        /// The part of the key that already holds a value.
        blocker: String,
    },
    /// A key that was renamed is still in use.
    #[error("{origin} uses `{old}`, which is now `{new}`")]
    Renamed {
        /// Who uses it.
        origin: Origin,
        /// The key of old.
        old: String,
        /// What to write now.
        new: String,
    },
    /// A key is unknown, missing or of the wrong type.
    #[error("config key `{key}` ({origin}): {message}")]
    Key {
        /// Dotted key, or the section in which one is missing.
        key: String,
        /// Who set it.
        origin: Origin,
        /// What is wrong with it.
        message: String,
    },
    /// A value is well-formed and out of bounds, or contradicts another. Made by the binaries' own checks.
    #[error("config key `{key}`: expected {expected}, got {got}")]
    Value {
        /// Dotted key.
        key: &'static str,
        /// What is allowed.
        expected: String,
        /// What was given.
        got: String,
    },
}

/// Collects the sources of one configuration. See the module text for their order.
#[derive(Debug, Default)]
pub struct Loader {
    file: Option<PathBuf>,
    environment_prefix: Option<String>,
    environment: Vec<(String, String)>,
    flags: Vec<(String, String)>,
    fallbacks: Vec<(&'static str, &'static str)>,
    renamed: Vec<(&'static str, &'static str)>,
    secret_keys: BTreeSet<&'static str>,
}

impl Loader {
    /// No sources yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads this file first.
    pub fn file(mut self, path: impl Into<PathBuf>) -> Self {
        self.file = Some(path.into());
        self
    }

    /// Takes the process environment: `PREFIX__SECTION__KEY` sets `section.key`.
    ///
    /// Values are TOML where they parse as number, boolean, array, table or quoted string, else plain text; a value
    /// that replaces text in the file stays text.
    pub fn environment(self, prefix: &str) -> Self {
        // Names and values that are no UTF-8 cannot be ours.
        let pairs = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        self.environment_from(prefix, pairs)
    }

    /// As [`Loader::environment`], from given pairs.
    pub fn environment_from(mut self, prefix: &str, pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        self.environment_prefix = Some(format!("{prefix}__"));
        self.environment.extend(pairs);
        self
    }

    /// Takes a variable that is named without our prefix, as another program names it: its text, as it stands, sets the key where nothing
    /// else does and the section that holds the key, if one does, is there. The first that is set and not empty wins.
    pub fn fallback(mut self, variable: &'static str, key: &'static str) -> Self {
        self.fallbacks.push((variable, key));
        self
    }

    /// Sets a dotted key from the command line.
    pub fn flag(mut self, key: &str, value: &str) -> Self {
        self.flags.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Refuses `old` with an error that names `new`. Both are dotted keys.
    pub fn renamed(mut self, old: &'static str, new: &'static str) -> Self {
        self.renamed.push((old, new));
        self
    }

    /// Never shows the value of this dotted key.
    pub fn secret(mut self, key: &'static str) -> Self {
        self.secret_keys.insert(key);
        self
    }

    /// Reads all sources into the raw struct.
    ///
    /// # Errors
    /// [`ConfigError`], naming the key and the source that set it.
    pub fn load<R: DeserializeOwned>(self) -> Result<Loaded<R>, ConfigError> {
        let mut table = match &self.file {
            Some(path) => read_file(path)?,
            None => Table::new(),
        };
        let mut origins: BTreeMap<String, Origin> = BTreeMap::new();
        for (key, value, origin) in self.overrides() {
            overlay(&mut table, &key, &value, &origin)?;
            origins.insert(key, origin);
        }
        for (variable, key) in &self.fallbacks {
            let set = self.environment.iter().find(|(name, value)| name == variable && !value.is_empty());
            let unset = lookup(&table, key).is_none_or(|value| value.as_str() == Some(""));
            let (section, leaf) = match key.rsplit_once('.') {
                Some((section, leaf)) => (lookup_mut(&mut table, section).and_then(Value::as_table_mut), leaf),
                None => (Some(&mut table), *key),
            };
            if let (Some((_, value)), true, Some(section)) = (set, unset, section) {
                section.insert(leaf.to_owned(), Value::String(value.clone()));
                origins.insert((*key).to_owned(), Origin::Environment((*variable).to_owned()));
            }
        }
        let origin_of = |key: &str| {
            origins.get(key).cloned().unwrap_or_else(|| match (&self.file, lookup(&table, key)) {
                (Some(path), Some(_)) => Origin::File(path.clone()),
                _ => Origin::Nowhere,
            })
        };
        for (old, new) in &self.renamed {
            if lookup(&table, old).is_some() {
                return Err(ConfigError::Renamed { origin: origin_of(old), old: (*old).to_owned(), new: (*new).to_owned() });
            }
        }
        let raw = table.clone().try_into::<R>().map_err(|error| key_error(&error, origin_of, &self.secret_keys))?;
        Ok(Loaded { raw, effective: table, secret_keys: self.secret_keys })
    }

    fn overrides(&self) -> Vec<(String, String, Origin)> {
        let mut overrides = Vec::new();
        if let Some(prefix) = &self.environment_prefix {
            for (name, value) in &self.environment {
                if let Some(rest) = name.strip_prefix(prefix.as_str()) {
                    let key = rest.split("__").map(str::to_lowercase).collect::<Vec<_>>().join(".");
                    overrides.push((key, value.clone(), Origin::Environment(name.clone())));
                }
            }
        }
        for (key, value) in &self.flags {
            overrides.push((key.clone(), value.clone(), Origin::Flag(key.clone())));
        }
        overrides
    }
}

/// A raw configuration and what it was made of.
#[derive(Debug)]
pub struct Loaded<R> {
    /// To be checked by the binary.
    pub raw: R,
    effective: Table,
    secret_keys: BTreeSet<&'static str>,
}

impl<R> Loaded<R> {
    /// What is in force after all overrides, as TOML, without secret values. For `--check-config`.
    pub fn effective(&self) -> String {
        let mut shown = self.effective.clone();
        for key in &self.secret_keys {
            if let Some(value) = lookup_mut(&mut shown, key) {
                *value = Value::String("<redacted>".to_owned());
            }
        }
        shown.to_string()
    }
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let unreadable = |error: std::io::Error| ConfigError::Unreadable { path: path.to_owned(), reason: error.to_string() };
    let size_bytes = std::fs::metadata(path).map_err(unreadable)?.len();
    if size_bytes > CONFIG_BYTES_MAX {
        return Err(ConfigError::TooLarge { path: path.to_owned(), size_bytes });
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    text.parse::<Table>().map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        line: error.span().and_then(|span| text.get(..span.start)).map_or(1, |before| before.matches('\n').count().saturating_add(1)),
        message: one_line(error.message()),
    })
}

fn overlay(table: &mut Table, key: &str, text: &str, origin: &Origin) -> Result<(), ConfigError> {
    let not_a_section =
        |blocker: &str| ConfigError::NotASection { origin: origin.clone(), key: key.to_owned(), blocker: blocker.to_owned() };
    let (sections, leaf) = match key.rsplit_once('.') {
        Some((sections, leaf)) => (sections.split('.').collect(), leaf),
        None => (Vec::new(), key),
    };
    let mut section = table;
    for name in sections {
        let entry = section.entry(name).or_insert_with(|| Value::Table(Table::new()));
        section = entry.as_table_mut().ok_or_else(|| not_a_section(name))?;
    }
    let keep_text = section.get(leaf).is_some_and(Value::is_str);
    section.insert(leaf.to_owned(), if keep_text { Value::String(unquoted(text)) } else { parse_value(text) });
    Ok(())
}

/// TOML where it parses as such, else plain text. Dates stay text: no key of ours is one.
fn parse_value(text: &str) -> Value {
    match format!("v = {text}").parse::<Table>().ok().and_then(|mut table| if table.len() == 1 { table.remove("v") } else { None }) {
        Some(Value::Datetime(_)) | None => Value::String(text.to_owned()),
        Some(value) => value,
    }
}

fn unquoted(text: &str) -> String {
    match parse_value(text) {
        Value::String(inner) => inner,
        _ => text.to_owned(),
    }
}

fn lookup<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        None => table.get(key),
        Some((section, rest)) => lookup(table.get(section)?.as_table()?, rest),
    }
}

fn lookup_mut<'a>(table: &'a mut Table, key: &str) -> Option<&'a mut Value> {
    match key.split_once('.') {
        None => table.get_mut(key),
        Some((section, rest)) => lookup_mut(table.get_mut(section)?.as_table_mut()?, rest),
    }
}

/// Reads key and message out of the deserializer's error, whose text is "message" or "message\nin `a.b`".
fn key_error(error: &toml::de::Error, origin_of: impl Fn(&str) -> Origin, secret_keys: &BTreeSet<&'static str>) -> ConfigError {
    let shown = error.to_string();
    let section = shown.trim_end().rsplit_once("\nin `").and_then(|(_, rest)| rest.strip_suffix('`')).unwrap_or("");
    let message = one_line(error.message());
    let unknown = message.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next());
    let key = match (section, unknown) {
        (section, None) => section.to_owned(),
        // The error's path may end in the unknown field itself or in the section that holds it.
        (section, Some(field)) if section == field || section.ends_with(&format!(".{field}")) => section.to_owned(),
        ("", Some(field)) => field.to_owned(),
        (section, Some(field)) => format!("{section}.{field}"),
    };
    // "invalid type: string \"…\"" quotes the value.
    let message = if secret_keys.contains(key.as_str()) { "wrong type or form (value not shown)".to_owned() } else { message };
    ConfigError::Key { origin: origin_of(&key), key: if key.is_empty() { "(top level)".to_owned() } else { key }, message }
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Raw {
        node: RawNode,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct RawNode {
        listen: String,
        seat: u16,
        #[serde(default)]
        peers: Vec<String>,
        #[serde(default)]
        token: Option<String>,
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn pair(name: &str, value: &str) -> Vec<(String, String)> {
        vec![(name.to_owned(), value.to_owned())]
    }

    #[test]
    fn later_sources_win_and_types_follow_the_file() {
        let file = file("[node]\nlisten = \"1\"\nseat = 1\n");
        let loaded = Loader::new()
            .file(file.path())
            .environment_from(
                "KMS",
                [pair("KMS__NODE__LISTEN", "7"), pair("KMS__NODE__SEAT", "2"), pair("OTHER__NODE__SEAT", "9")].concat(),
            )
            .environment_from("KMS", pair("KMS__NODE__PEERS", "[\"a\", \"b\"]"))
            .flag("node.seat", "3")
            .load::<Raw>()
            .unwrap();
        assert_eq!(loaded.raw.node, RawNode { listen: "7".into(), seat: 3, peers: vec!["a".into(), "b".into()], token: None });
    }

    #[test]
    fn another_programs_variable_sets_a_key_without_a_section() {
        #[derive(Deserialize)]
        struct Flat {
            proxy: String,
        }
        let of = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            Loader::new().environment_from("KMS", pairs).fallback("A", "proxy").fallback("B", "proxy").load::<Flat>().unwrap().raw.proxy
        };
        assert_eq!(of(&[("B", "b"), ("A", "")]), "b");
        assert_eq!(of(&[("B", "b"), ("A", "a")]), "a");
        assert_eq!(of(&[("A", "a"), ("KMS__PROXY", "own")]), "own");
    }

    #[test]
    fn unknown_key_names_key_and_source() {
        let file = file("[node]\nlisten = \"x\"\nseat = 1\n");
        let error = Loader::new().file(file.path()).environment_from("KMS", pair("KMS__NODE__PORT", "1")).load::<Raw>().unwrap_err();
        let ConfigError::Key { key, origin, message } = error else { panic!("{error:?}") };
        assert_eq!(key, "node.port");
        assert_eq!(origin, Origin::Environment("KMS__NODE__PORT".into()));
        assert!(message.contains("unknown field"), "{message}");
    }

    #[test]
    fn wrong_type_in_the_file_names_the_file() {
        let file = file("[node]\nlisten = \"x\"\nseat = \"one\"\n");
        let error = Loader::new().file(file.path()).load::<Raw>().unwrap_err();
        let ConfigError::Key { key, origin, .. } = error else { panic!("{error:?}") };
        assert_eq!(key, "node.seat");
        assert_eq!(origin, Origin::File(file.path().to_owned()));
    }

    #[test]
    fn missing_key_names_its_section() {
        let file = file("[node]\nlisten = \"x\"\n");
        let error = Loader::new().file(file.path()).load::<Raw>().unwrap_err();
        assert!(error.to_string().contains("missing field `seat`"), "{error}");
        assert!(error.to_string().contains("`node`"), "{error}");
    }

    #[test]
    fn renamed_key_names_the_new_one() {
        let file = file("[node]\naddress = \"x\"\nseat = 1\n");
        let error = Loader::new().file(file.path()).renamed("node.address", "node.listen").load::<Raw>().unwrap_err();
        assert!(matches!(error, ConfigError::Renamed { ref new, .. } if new == "node.listen"), "{error:?}");
    }

    #[test]
    fn secrets_are_neither_printed_nor_quoted_in_errors() {
        let good = file("[node]\nlisten = \"x\"\nseat = 1\ntoken = \"hunter2\"\n");
        let loaded = Loader::new().file(good.path()).secret("node.token").load::<Raw>().unwrap();
        assert!(loaded.effective().contains("<redacted>"));
        assert!(!loaded.effective().contains("hunter2"));
        let bad = file("[node]\nlisten = \"x\"\nseat = 1\ntoken = 424242\n");
        let error = Loader::new().file(bad.path()).secret("node.token").load::<Raw>().unwrap_err();
        assert!(error.to_string().contains("node.token"), "{error}");
        assert!(!error.to_string().contains("424242"), "{error}");
    }

    #[test]
    fn a_fallback_sets_what_nothing_else_sets_and_makes_no_section() {
        let load = |text: &str, pairs: Vec<(String, String)>| {
            let file = file(text);
            let loader = Loader::new().file(file.path()).environment_from("KMS", pairs);
            loader.fallback("FIRST", "node.token").fallback("SECOND", "node.token").load::<Raw>()
        };
        let node = "[node]\nlisten = \"x\"\nseat = 1\n";
        let token = |text: &str, pairs| load(text, pairs).unwrap().raw.node.token;
        assert_eq!(token(node, pair("SECOND", "424242")), Some("424242".to_owned()));
        assert_eq!(token(node, [pair("SECOND", "b"), pair("FIRST", "a")].concat()), Some("a".to_owned()));
        assert_eq!(token(node, [pair("SECOND", "b"), pair("FIRST", "")].concat()), Some("b".to_owned()));
        assert_eq!(token(&format!("{node}token = \"file\"\n"), pair("FIRST", "a")), Some("file".to_owned()));
        assert_eq!(token(&format!("{node}token = \"\"\n"), pair("FIRST", "a")), Some("a".to_owned()));
        let missing = load("", pair("FIRST", "a")).unwrap_err().to_string();
        assert!(missing.contains("missing field `node`"), "{missing}");
    }

    #[test]
    fn syntax_error_names_the_line() {
        let file = file("[node]\nlisten = \"x\"\nseat = = 1\n");
        let error = Loader::new().file(file.path()).load::<Raw>().unwrap_err();
        assert!(matches!(error, ConfigError::Syntax { line: 3, .. }), "{error:?}");
    }

    #[test]
    fn override_through_a_value_is_refused() {
        let file = file("[node]\nlisten = \"x\"\nseat = 1\n");
        let error = Loader::new().file(file.path()).flag("node.seat.deep", "1").load::<Raw>().unwrap_err();
        assert!(matches!(error, ConfigError::NotASection { ref blocker, .. } if blocker == "seat"), "{error:?}");
    }
}
