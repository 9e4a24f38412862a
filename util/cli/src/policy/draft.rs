//! An app's policy from flags or a TOML file. Owns: names of its fields and their defaults. Never: a default for what may run.

use dstack_protocol::governance::Object;
use dstack_protocol::limits::{
    ADVISORY_BYTES_MAX, PATH_BYTES_MAX, POLICY_ADVISORIES_MAX, POLICY_HASHES_MAX, POLICY_PATHS_MAX, SESSION_MS_MAX,
};
use dstack_protocol::policy::{AppPolicy, PathRule, Rate, TcbRules};
use dstack_protocol::release::KeyClass;
use dstack_protocol::{TcbStatus, Wire};
use serde::Deserialize;

use crate::args;
use crate::failure::Failure;

/// A policy as people write it: the form of the file, and what the flags fill.
#[derive(Deserialize, Debug, Clone, Default)]
#[serde(deny_unknown_fields)]
pub(crate) struct Draft {
    #[serde(default)]
    pub(crate) app_id: String,
    /// Instead of an app: every app that nobody registered.
    #[serde(default)]
    pub(crate) delegation: bool,
    pub(crate) name: String,
    pub(crate) platforms: Vec<String>,
    #[serde(default)]
    pub(crate) compose_hashes: Vec<String>,
    #[serde(default)]
    pub(crate) any_os_image: bool,
    #[serde(default)]
    pub(crate) os_images: Vec<String>,
    /// Empty: `UpToDate` only.
    #[serde(default)]
    pub(crate) tcb: Vec<String>,
    /// `30d`; without it what is out of date is refused at once.
    pub(crate) tcb_grace: Option<String>,
    #[serde(default)]
    pub(crate) min_evaluation: u32,
    #[serde(default)]
    pub(crate) refuse_advisories: Vec<String>,
    #[serde(default)]
    pub(crate) accept_vlek: bool,
    pub(crate) classes: Vec<String>,
    #[serde(default)]
    pub(crate) paths: Vec<String>,
    pub(crate) rate: Option<u32>,
    pub(crate) burst: Option<u32>,
    pub(crate) session_s: Option<u64>,
    #[serde(default)]
    pub(crate) allow_legacy: bool,
    #[serde(default)]
    pub(crate) ask_authority: bool,
}

impl Draft {
    /// Reads a policy file.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        toml::from_str(text).map_err(|error| bad(error.to_string()))
    }

    /// For what the policy is, and the policy: lists in order, checked by the rules of the policy's own decoder.
    pub(crate) fn policy(&self) -> Result<(Object, AppPolicy), Failure> {
        let object = match (self.delegation, self.app_id.is_empty()) {
            (true, true) => Object::Delegation,
            (true, false) => return Err(bad("either an app id or the delegation")),
            (false, _) => Object::App(args::app_id(&self.app_id).map_err(|why| bad(format!("app id: {why}")))?),
        };
        if self.delegation && !self.ask_authority {
            return Err(bad("a delegation asks the authority (ask_authority), else it would admit anybody"));
        }
        for (what, count, max) in [
            ("compose hashes", self.compose_hashes.len(), POLICY_HASHES_MAX),
            ("os images", self.os_images.len(), POLICY_HASHES_MAX),
            ("paths", self.paths.len(), POLICY_PATHS_MAX),
        ] {
            if count > max {
                return Err(bad(format!("{count} {what}, at most {max}")));
            }
        }
        if let Some(path) = self.paths.iter().find(|path| path.len() > PATH_BYTES_MAX) {
            return Err(bad(format!("a path has {} bytes, at most {PATH_BYTES_MAX}", path.len())));
        }
        if self.name.len() > 64 {
            return Err(bad("a name has 1 to 64 bytes"));
        }
        let tcb_allowed = match self.tcb.is_empty() {
            true => vec![TcbStatus::UpToDate],
            false => list("tcb status", &self.tcb, args::tcb_status)?,
        };
        let grace_s = self.tcb_grace.as_deref().map(args::duration).transpose().map_err(|why| bad(format!("tcb grace: {why}")))?;
        let grace_s = u32::try_from(grace_s.unwrap_or_default().as_secs()).map_err(|_| bad("tcb grace: at most two years"))?;
        if let Some(id) = self.refuse_advisories.iter().find(|id| id.len() > ADVISORY_BYTES_MAX) {
            return Err(bad(format!("an advisory has {} bytes, at most {ADVISORY_BYTES_MAX}", id.len())));
        }
        if self.refuse_advisories.len() > POLICY_ADVISORIES_MAX {
            return Err(bad(format!("{} refused advisories, at most {POLICY_ADVISORIES_MAX}", self.refuse_advisories.len())));
        }
        let session_ms = match self.session_s {
            Some(seconds) => seconds.checked_mul(1000).ok_or_else(|| bad("session_s is too long"))?,
            None => SESSION_MS_MAX,
        };
        let policy = AppPolicy {
            name: self.name.clone(),
            platforms: list("platform", &self.platforms, args::platform)?,
            compose_hashes: list("compose hash", &self.compose_hashes, args::hash)?,
            any_os_image: self.any_os_image,
            os_images: list("os image", &self.os_images, args::hash)?,
            tcb_allowed,
            classes: list("class", &self.classes, class)?,
            paths: list("path", &self.paths, path_rule)?,
            rate: Rate {
                per_second: self.rate.unwrap_or(Rate::DEFAULT.per_second),
                burst: self.burst.unwrap_or(self.rate.map_or(Rate::DEFAULT.burst, |rate| rate.saturating_mul(30))),
            },
            session_ms,
            allow_legacy: self.allow_legacy,
            ask_authority: self.ask_authority,
            tcb: TcbRules {
                grace_s,
                min_evaluation: self.min_evaluation,
                refused_advisories: list("advisory", &self.refuse_advisories, |id| Ok(id.to_ascii_uppercase()))?,
                accept_vlek: self.accept_vlek,
            },
        };
        let policy = AppPolicy::decode(&policy.encode()).map_err(|error| bad(error.to_string()))?;
        Ok((object, policy))
    }
}

fn bad(why: impl Into<String>) -> Failure {
    Failure::usage(format!("policy: {}", why.into()), "`dstack policy propose --help` shows flags and file")
}

/// Parses, sorts, and refuses what stands twice.
fn list<T: Ord>(what: &str, texts: &[String], parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, Failure> {
    let parsed: Result<Vec<T>, Failure> =
        texts.iter().map(|text| parse(text).map_err(|why| bad(format!("{what} {text}: {why}")))).collect();
    let mut parsed = parsed?;
    parsed.sort();
    if parsed.windows(2).any(|pair| pair.first() == pair.last()) {
        return Err(bad(format!("a {what} stands twice")));
    }
    Ok(parsed)
}

fn class(text: &str) -> Result<KeyClass, String> {
    KeyClass::from_name(text).ok_or_else(|| format!("want one of {}", KeyClass::ALL.map(KeyClass::name).join(", ")))
}

fn path_rule(text: &str) -> Result<PathRule, String> {
    match text.split_once(':') {
        Some(("exact", path)) => Ok(PathRule::Exact(path.to_owned())),
        Some(("prefix", path)) => Ok(PathRule::Prefix(path.to_owned())),
        _ => Err("want exact:PATH or prefix:PATH".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use dstack_protocol::{AppId, Platform};

    use super::*;

    fn draft() -> Draft {
        let text = format!(
            "app_id = \"{}\"\nname = \"web\"\nplatforms = [\"nitro\", \"tdx\"]\ncompose_hashes = [\"{}\", \"{}\"]\nany_os_image = true\n\
             classes = [\"custom\", \"disk\"]\npaths = [\"prefix:/b\", \"exact:/a:b\"]\nrate = 5\n",
            "03".repeat(20),
            "bb".repeat(32),
            "aa".repeat(32)
        );
        Draft::parse(&text).unwrap()
    }

    #[test]
    fn lists_are_sorted_and_defaults_are_the_strict_ones() {
        let (object, policy) = draft().policy().unwrap();
        assert_eq!(object, Object::App(AppId([3; 20])));
        assert_eq!(policy.platforms, [Platform::Tdx, Platform::Nitro]);
        assert_eq!(policy.compose_hashes, [[0xaa; 32], [0xbb; 32]]);
        assert_eq!(policy.tcb_allowed, [TcbStatus::UpToDate]);
        assert_eq!(policy.classes, [KeyClass::Disk, KeyClass::Custom]);
        assert_eq!(policy.paths, [PathRule::Exact("/a:b".to_owned()), PathRule::Prefix("/b".to_owned())]);
        assert_eq!(policy.rate, Rate { per_second: 5, burst: 150 });
        assert_eq!((policy.session_ms, policy.allow_legacy), (SESSION_MS_MAX, false));
        assert_eq!(policy.tcb, TcbRules::default());
    }

    #[test]
    fn tcb_rules_are_read() {
        let mut draft = draft();
        draft.tcb_grace = Some("30d".to_owned());
        draft.min_evaluation = 18;
        draft.refuse_advisories = vec!["intel-sa-00002".to_owned(), "INTEL-SA-00001".to_owned()];
        draft.accept_vlek = true;
        let refused_advisories = vec!["INTEL-SA-00001".to_owned(), "INTEL-SA-00002".to_owned()];
        let expected = TcbRules { grace_s: 2_592_000, min_evaluation: 18, refused_advisories, accept_vlek: true };
        assert_eq!(draft.policy().unwrap().1.tcb, expected);
    }

    #[test]
    fn a_delegation_names_no_app_and_asks_the_authority() {
        let delegation = Draft { app_id: String::new(), delegation: true, ask_authority: true, compose_hashes: vec![], ..draft() };
        let (object, policy) = delegation.policy().unwrap();
        assert_eq!((object, policy.ask_authority, policy.compose_hashes.len()), (Object::Delegation, true, 0));
        assert!(Draft { ask_authority: false, ..delegation.clone() }.policy().is_err());
        assert!(Draft { app_id: "03".repeat(20), ..delegation.clone() }.policy().is_err());
        assert!(Draft { delegation: false, ..delegation }.policy().is_err());
    }

    #[test]
    fn wrong_fields_are_named() {
        let wrong = |change: fn(&mut Draft), part: &str| {
            let mut draft = draft();
            change(&mut draft);
            let mut report = Vec::new();
            draft.policy().unwrap_err().report(&mut report).unwrap();
            let report = String::from_utf8(report).unwrap();
            assert!(report.contains(part), "{part} in {report}");
        };
        wrong(|d| d.app_id = "03".to_owned(), "app id");
        wrong(|d| d.platforms.push("tdx".to_owned()), "platform stands twice");
        wrong(|d| d.platforms.push("sgx".to_owned()), "sgx");
        wrong(|d| d.any_os_image = false, "os_images");
        wrong(|d| d.paths.push("/c".to_owned()), "exact:PATH");
        wrong(|d| d.classes.clear(), "classes");
        wrong(|d| d.compose_hashes.clear(), "compose_hashes");
        wrong(|d| d.tcb_grace = Some("1000d".to_owned()), "tcb_grace_s");
        wrong(|d| d.tcb_grace = Some("soon".to_owned()), "tcb grace");
        wrong(|d| d.refuse_advisories = vec!["x".repeat(33)], "33 bytes");
        wrong(|d| d.refuse_advisories = vec!["A".to_owned(), "a".to_owned()], "advisory stands twice");
        wrong(|d| d.session_s = Some(u64::MAX), "session_s");
        wrong(|d| d.compose_hashes = vec!["aa".repeat(32); 257], "at most 256");
        assert!(Draft::parse("unknown = 1").is_err());
    }
}
