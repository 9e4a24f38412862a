//! Where a tunnel may lead. Owns: `host:port` as text, compared without regard to case. Never: a pattern; each node is named.

use std::fmt;
use std::str::FromStr;

use dstack_client::NodeUrl;

/// An allowed target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target(String);

/// Why a text is no target. The settings are at fault, or the asking peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a target: {text:?}; expected host:port")]
pub struct TargetError {
    /// The text.
    pub text: String,
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let wrong = || TargetError { text: text.chars().take(200).collect() };
        let bare = text.strip_prefix("https://").unwrap_or(text).trim_end_matches('/');
        let authority = format!("https://{bare}").parse::<NodeUrl>().map_err(|_| wrong())?.authority();
        // A port is not left to guesses.
        if bare.eq_ignore_ascii_case(&authority) { Ok(Self(authority.to_ascii_lowercase())) } else { Err(wrong()) }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Target {
    /// As the system's resolver takes it.
    pub(crate) fn authority(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_name_host_and_port() {
        for (text, target) in [("KMS-1:12001", "kms-1:12001"), ("https://10.0.0.1:443/", "10.0.0.1:443"), ("[::1]:1", "[::1]:1")] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), target);
        }
        for text in ["", "kms-1", "kms-1:", "kms-1:0", "*:443", "a b:1", "http://a:1", "kms-1:12001/x"] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }
}
