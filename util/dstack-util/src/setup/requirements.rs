//! Conditions that app-compose.json puts on the machine. Owns: judging each. Never: passes over one it cannot judge.
//! Source: util and deploy reference §3 step 2, §7; the grammar of `os_version` is ours (ADR 0021).

use std::cmp::Ordering;

use dstack_attest::wire::TdxEvent;
use dstack_protocol::codec::sha256;

use super::compose::Requirements;

/// Shortest launch token, bytes.
pub const LAUNCH_TOKEN_BYTES_MIN: usize = 32;
/// Type of the firmware's ACPI events.
const ACPI_EVENT_TYPE: u32 = 10;

/// Why the app must not run on this machine. Its author decides: another machine, or another document.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequirementError {
    /// The image is of another version.
    #[error("requirements.os_version is {wanted:?}, this image is {got:?}")]
    OsVersion {
        /// The comparison.
        wanted: String,
        /// The image's.
        got: String,
    },
    /// Another platform.
    #[error("requirements.platforms has {wanted:?}, this is {got}")]
    Platform {
        /// The list.
        wanted: Vec<String>,
        /// This one.
        got: &'static str,
    },
    /// ACPI tables are to be measured and are not, or the other way round.
    #[error("requirements.tdx_measure_acpi_tables is {wanted}, the firmware's log has {got} ACPI events")]
    Acpi {
        /// Whether they must be.
        wanted: bool,
        /// How many there are.
        got: usize,
    },
    /// The deployer does not know the token.
    #[error("requirements.launch_token_hash: {why}")]
    LaunchToken {
        /// What is wrong.
        why: &'static str,
    },
    /// A GPU has to prove itself and nothing here can ask it.
    #[error("requirements.gpu_policy.attest_gpu: this build has no GPU attester")]
    Gpu,
}

/// What is known of the machine.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// `VERSION_ID` of the image.
    pub os_version: &'a str,
    /// As evidence names the platform.
    pub platform: &'static str,
    /// The whole event log.
    pub event_log: &'a [TdxEvent],
    /// `.user-config`.
    pub user_config: Option<&'a [u8]>,
}

/// Judges all.
///
/// # Errors
/// The first that fails.
pub fn judge(requirements: &Requirements, facts: Facts<'_>) -> Result<(), RequirementError> {
    if let Some(wanted) = requirements.os_version.as_ref().filter(|wanted| !version_fits(wanted, facts.os_version)) {
        return Err(RequirementError::OsVersion { wanted: wanted.clone(), got: facts.os_version.to_owned() });
    }
    if let Some(wanted) = requirements.platforms.as_ref().filter(|wanted| !wanted.iter().any(|name| name == facts.platform)) {
        return Err(RequirementError::Platform { wanted: wanted.clone(), got: facts.platform });
    }
    if let Some(wanted) = requirements.tdx_measure_acpi_tables {
        let got = facts.event_log.iter().filter(|event| event.event_type == ACPI_EVENT_TYPE && event.event_payload == b"ACPI DATA").count();
        if wanted != (got == 3) {
            return Err(RequirementError::Acpi { wanted, got });
        }
    }
    if let Some(hash) = &requirements.launch_token_hash {
        launch_token(hash, facts.user_config)?;
    }
    let attest_gpu = requirements.gpu_policy.as_ref().and_then(|policy| policy.get("attest_gpu"));
    if attest_gpu.and_then(serde_json::Value::as_bool).unwrap_or(false) {
        return Err(RequirementError::Gpu);
    }
    Ok(())
}

fn launch_token(hash: &str, user_config: Option<&[u8]>) -> Result<(), RequirementError> {
    let wrong = |why| RequirementError::LaunchToken { why };
    let config: serde_json::Value = user_config
        .and_then(|bytes| serde_json::from_slice(bytes).ok())
        .ok_or(wrong("there is no user config, or it is no JSON: the token stands there at dstack.launch_token"))?;
    let token = config.pointer("/dstack/launch_token").and_then(serde_json::Value::as_str);
    let token = token.ok_or(wrong("the user config has no text at dstack.launch_token"))?;
    if token.len() < LAUNCH_TOKEN_BYTES_MIN {
        return Err(wrong("the token has fewer than 32 bytes"));
    }
    let own = hex::encode(sha256(&[b"dstack-launch-token/v1:", token.as_bytes()]));
    if hash.eq_ignore_ascii_case(&own) { Ok(()) } else { Err(wrong("the token is another one")) }
}

/// Comparisons joined by commas, all of which must hold: `>=0.5.6, <0.7`. Without an operator: equal.
fn version_fits(wanted: &str, got: &str) -> bool {
    let Some(got) = numbers(got) else { return false };
    wanted.split(',').map(str::trim).all(|one| {
        let operator = one.chars().take_while(|c| "<>=^~".contains(*c)).count();
        let (operator, version) = one.split_at_checked(operator).unwrap_or_default();
        let Some(version) = numbers(version.trim()) else { return false };
        let length = got.len().max(version.len());
        let padded = |numbers: &[u64]| numbers.iter().copied().chain(std::iter::repeat(0)).take(length).collect::<Vec<_>>();
        let order = padded(&got).cmp(&padded(&version));
        match operator {
            "" | "=" | "==" => order == Ordering::Equal,
            ">" => order == Ordering::Greater,
            ">=" => order != Ordering::Less,
            "<" => order == Ordering::Less,
            "<=" => order != Ordering::Greater,
            _ => false,
        }
    })
}

fn numbers(text: &str) -> Option<Vec<u64>> {
    let text = text.trim().trim_start_matches('v');
    let text = text.split(['-', '+']).next().unwrap_or_default();
    text.split('.').map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        for (wanted, got, fits) in [
            ("0.6.0", "0.6.0", true),
            ("0.6", "v0.6.0-rc1", true),
            (">=0.5.6, <0.7", "0.6.1", true),
            (">=0.5.6, <0.7", "0.10.0", false),
            ("<=0.5", "0.5.1", false),
            (">0.5", "0.5.1", true),
            ("^0.5", "0.5.1", false),
            ("", "0.5.1", false),
            ("0.5", "", false),
        ] {
            assert_eq!(version_fits(wanted, got), fits, "{wanted:?} and {got:?}");
        }
    }

    #[test]
    fn each_condition_is_judged() {
        let token = "t".repeat(32);
        let config = serde_json::json!({ "dstack": { "launch_token": token } }).to_string();
        let facts = Facts { os_version: "0.6.0", platform: "dstack-tdx", event_log: &[], user_config: Some(config.as_bytes()) };
        let judged = |requirements: serde_json::Value| judge(&serde_json::from_value(requirements).unwrap(), facts);
        assert_eq!(judged(serde_json::json!({})), Ok(()));
        assert_eq!(judged(serde_json::json!({ "platforms": ["dstack-tdx"], "tdx_measure_acpi_tables": false })), Ok(()));
        assert!(matches!(judged(serde_json::json!({ "platforms": [] })), Err(RequirementError::Platform { .. })));
        assert_eq!(judged(serde_json::json!({ "tdx_measure_acpi_tables": true })), Err(RequirementError::Acpi { wanted: true, got: 0 }));
        let hash = hex::encode(sha256(&[format!("dstack-launch-token/v1:{token}").as_bytes()]));
        assert_eq!(judged(serde_json::json!({ "launch_token_hash": hash })), Ok(()));
        let other = judged(serde_json::json!({ "launch_token_hash": "00" })).unwrap_err();
        assert!(other.to_string().contains("another"));
        assert_eq!(judged(serde_json::json!({ "gpu_policy": { "attest_gpu": true } })), Err(RequirementError::Gpu));
    }
}
