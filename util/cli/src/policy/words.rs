//! What an action does, in words, so that an operator signs what is read. Owns: a line for every field of every kind.
//! Never: leaves a field out: what is not shown must not be signed.

use dstack_protocol::governance::{Action, ActionKind, Object, OperatorsBody, policy_hash};
use dstack_protocol::policy::{AppPolicy, PathRule};
use dstack_protocol::{Platform, UnixMillis, Wire};

/// The action, a field a line.
pub(crate) fn describe(action: &Action) -> String {
    let mut lines = vec![
        format!("{} {}", verb(action.kind), object(&action.object)),
        format!("  cluster       {}", action.cluster_id),
        format!("  action        {}", hex::encode(action.action_id)),
        format!("  builds on     version {}", action.base_version),
        format!("  void after    {} (unix ms {})", utc(action.not_after), action.not_after),
    ];
    lines.extend(body(action));
    lines.iter().map(|line| format!("{line}\n")).collect()
}

fn verb(kind: ActionKind) -> &'static str {
    match kind {
        ActionKind::SetAppPolicy => "set the policy of",
        ActionKind::Revoke => "REVOKE at once",
        ActionKind::Unrevoke => "undo the revocation of",
        ActionKind::SetOperators => "replace the",
        ActionKind::GrantSeat => "grant",
        ActionKind::SetSettings => "change the",
        ActionKind::AllowNodeMeasurement => "allow nodes of",
        ActionKind::NewGeneration => "begin",
        ActionKind::DestroyGeneration => "DESTROY",
        ActionKind::Resume => "resume after a full stop with the",
        ActionKind::SetDelegation => "LEAVE TO THE AUTHORITY whatever app it allows: set the policy of the",
    }
}

fn object(object: &Object) -> String {
    match object {
        Object::App(app) => format!("app {app}"),
        Object::Measurement(bytes) => format!("measurement {}", hex::encode(bytes)),
        Object::Platform(platform) => format!("platform {}", platform.name()),
        Object::Seat(seat) => format!("seat {seat}"),
        Object::Operators => "operators".to_owned(),
        Object::Settings => "settings".to_owned(),
        Object::Generation(generation) => format!("generation {generation}"),
        Object::Delegation => "delegation".to_owned(),
    }
}

fn body(action: &Action) -> Vec<String> {
    let raw = || vec![format!("  body          {} (not known to this build)", hex::encode(&action.body))];
    match action.kind {
        ActionKind::SetAppPolicy | ActionKind::SetDelegation => {
            AppPolicy::decode(&action.body).map_or_else(|_| raw(), |body| policy(&body, &action.body))
        }
        ActionKind::SetOperators => OperatorsBody::decode(&action.body).map_or_else(|_| raw(), |body| operators(&body)),
        ActionKind::AllowNodeMeasurement => match action.body.as_slice() {
            [byte] if Platform::from_byte(*byte).is_some() => {
                vec![format!("  platform      {}", Platform::from_byte(*byte).map_or("", Platform::name))]
            }
            _ => raw(),
        },
        _ if action.body.is_empty() => Vec::new(),
        _ => raw(),
    }
}

fn policy(policy: &AppPolicy, bytes: &[u8]) -> Vec<String> {
    let hashes = |hashes: &[[u8; 32]]| hashes.iter().map(hex::encode).collect::<Vec<_>>();
    let mut lines = vec![
        format!("  name          \"{}\"", policy.name.escape_debug()),
        list("platforms", policy.platforms.iter().map(|platform| platform.name().to_owned())),
        if policy.compose_hashes.is_empty() {
            "  compose hash  ANY that the authority allows".to_owned()
        } else {
            list("compose hash", hashes(&policy.compose_hashes))
        },
        if policy.any_os_image { "  os image      ANY".to_owned() } else { list("os image", hashes(&policy.os_images)) },
        list("tcb status", policy.tcb_allowed.iter().map(|status| status.name().to_owned())),
        format!("  tcb grace     {}", grace(policy.tcb.grace_s)),
        format!(
            "  tcb evaluation {}",
            if policy.tcb.min_evaluation == 0 { "any".to_owned() } else { format!("{} or later", policy.tcb.min_evaluation) }
        ),
        list(
            "no advisory",
            if policy.tcb.refused_advisories.is_empty() { vec!["any may apply".to_owned()] } else { policy.tcb.refused_advisories.clone() },
        ),
        format!("  VLEK          {}", if policy.tcb.accept_vlek { "ACCEPTED" } else { "no" }),
        list("key classes", policy.classes.iter().map(|class| class.name().to_owned())),
    ];
    if !policy.paths.is_empty() {
        let rule = |rule: &PathRule| match rule {
            PathRule::Exact(path) => format!("exactly \"{}\"", path.escape_debug()),
            PathRule::Prefix(prefix) if prefix.is_empty() => "ANY path".to_owned(),
            PathRule::Prefix(prefix) => format!("beginning with \"{}\"", prefix.escape_debug()),
        };
        lines.push(list("paths", policy.paths.iter().map(rule)));
    }
    lines.push(format!("  rate          {} a second, burst {}", policy.rate.per_second, policy.rate.burst));
    lines.push(format!("  sessions      {} s at most", policy.session_ms / 1000));
    lines.push(format!("  legacy mode   {}", if policy.allow_legacy { "ALLOWED" } else { "no" }));
    lines.push(format!("  authority     {}", if policy.ask_authority { "each node asks its own" } else { "none is asked" }));
    lines.push(format!("  policy hash   {}", hex::encode(policy_hash(bytes))));
    lines
}

/// How long out of date.
fn grace(seconds: u32) -> String {
    match (seconds, seconds % 86_400) {
        (0, _) => "none: out of date is refused at once".to_owned(),
        (_, 0) => format!("out of date for {} days", seconds / 86_400),
        _ => format!("out of date for {seconds} s"),
    }
}

fn operators(body: &OperatorsBody) -> Vec<String> {
    let keys = body.operators.iter().map(hex::encode);
    vec![format!("  approvals     {} for a change, {} for a revocation", body.k, body.r), list("keys", keys)]
}

fn list(name: &str, items: impl IntoIterator<Item = String>) -> String {
    let items: Vec<String> = items.into_iter().collect();
    format!("  {name:<13} {}", items.join(&format!("\n{}", " ".repeat(16))))
}

/// `2026-01-31 12:00:00 UTC`.
fn utc(time: UnixMillis) -> String {
    let (days, second_of_day) = (time.0 / 86_400_000, time.0 / 1000 % 86_400);
    if days > 100_000 {
        return "far ahead".to_owned();
    }
    let mut year = 1970;
    let mut rest = days;
    loop {
        let leap = u64::from((year % 4 == 0 && year % 100 != 0) || year % 400 == 0);
        if rest < 365 + leap {
            break;
        }
        rest -= 365 + leap;
        year += 1;
    }
    let leap = u64::from((year % 4 == 0 && year % 100 != 0) || year % 400 == 0);
    let mut month = 1;
    for length in [31, 28 + leap, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{:02} {hour:02}:{minute:02}:{second:02} UTC", rest + 1)
}

#[cfg(test)]
mod tests {
    use dstack_protocol::policy::{Rate, TcbRules};
    use dstack_protocol::release::KeyClass;
    use dstack_protocol::{AppId, ClusterId, TcbStatus};

    use super::*;

    #[test]
    fn dates_agree_with_the_parser() {
        for (text, shown) in [
            ("1970-01-01T00:00:00Z", "1970-01-01 00:00:00 UTC"),
            ("2000-02-29T23:59:59Z", "2000-02-29 23:59:59 UTC"),
            ("2024-12-31T12:30:01Z", "2024-12-31 12:30:01 UTC"),
            ("2100-03-01T00:00:00Z", "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(crate::args::time(text).unwrap()), shown);
        }
    }

    #[test]
    fn every_field_of_a_policy_is_shown_and_control_characters_are_not() {
        let policy = AppPolicy {
            name: "web\u{1b}[2J".to_owned(),
            platforms: vec![Platform::Tdx, Platform::Nitro],
            compose_hashes: vec![[0xaa; 32], [0xbb; 32]],
            any_os_image: false,
            os_images: vec![[0xcc; 32]],
            tcb_allowed: vec![TcbStatus::UpToDate],
            classes: vec![KeyClass::Disk, KeyClass::Custom],
            paths: vec![PathRule::Exact("/a".to_owned()), PathRule::Prefix("/b".to_owned())],
            rate: Rate { per_second: 7, burst: 11 },
            session_ms: 60_000,
            allow_legacy: true,
            tcb: TcbRules {
                grace_s: 2_592_000,
                min_evaluation: 18,
                refused_advisories: vec!["INTEL-SA-00828".to_owned()],
                accept_vlek: true,
            },
            ask_authority: false,
        };
        let action = Action {
            cluster_id: ClusterId([1; 32]),
            action_id: [2; 16],
            kind: ActionKind::SetAppPolicy,
            object: Object::App(AppId([3; 20])),
            base_version: 5,
            body: policy.encode(),
            not_after: UnixMillis(1_767_225_600_000),
        };
        let shown = describe(&action);
        for part in [
            "set the policy of app 0303",
            "version 5",
            "2026-01-01",
            "tdx",
            "nitro",
            &"aa".repeat(32),
            &"bb".repeat(32),
            &"cc".repeat(32),
            "UpToDate",
            "disk",
            "custom",
            "exactly \"/a\"",
            "beginning with \"/b\"",
            "7 a second, burst 11",
            "60 s",
            "ALLOWED",
            "for 30 days",
            "18 or later",
            "INTEL-SA-00828",
            "VLEK          ACCEPTED",
        ] {
            assert!(shown.contains(part), "{part} in\n{shown}");
        }
        assert!(!shown.contains('\u{1b}'));
        let asking = AppPolicy { ask_authority: true, compose_hashes: vec![], ..policy };
        let delegating = Action { kind: ActionKind::SetDelegation, object: Object::Delegation, body: asking.encode(), ..action };
        let shown = describe(&delegating);
        for part in ["LEAVE TO THE AUTHORITY", "ANY that the authority allows", "each node asks its own"] {
            assert!(shown.contains(part), "{part} in\n{shown}");
        }
    }
}
