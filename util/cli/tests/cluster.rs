//! The operators' side of a real cluster: three node processes, three operators of whom two decide, a timelock.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use dstack_testkit::cluster::process::outcome;
use dstack_testkit::cluster::{Cluster, ClusterError, ClusterSpec, until};
use serde_json::Value;

const APP: &str = "0303030303030303030303030303030303030303";
const PATIENCE: Duration = Duration::from_secs(30);

/// Exit code, stdout, stderr of `dstack`.
fn dstack(cluster: &Cluster, arguments: &[&str]) -> (i32, String, String) {
    let (status, stdout, stderr) = outcome(cluster.dstack().unwrap().args(arguments)).unwrap();
    (status.code().unwrap(), stdout, stderr)
}

/// As [`dstack`], and it must succeed.
fn done(cluster: &Cluster, arguments: &[&str]) -> String {
    let (code, stdout, stderr) = dstack(cluster, arguments);
    assert_eq!(code, 0, "{arguments:?}\n{stdout}{stderr}");
    stdout
}

/// As [`dstack`], and it must be refused for this reason.
fn refused(cluster: &Cluster, arguments: &[&str], part: &str) {
    let (code, stdout, stderr) = dstack(cluster, arguments);
    assert_eq!(code, 1, "{arguments:?}\n{stdout}{stderr}");
    assert!(stderr.contains(part) && stderr.contains("\ntry: "), "{part} in {stderr}");
}

fn field(out: &str, name: &str) -> String {
    let line = out.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("{name} in {out}")).to_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn shown(cluster: &Cluster, genesis: &str) -> Value {
    let (_, stdout, stderr) = dstack(cluster, &["policy", "show", "--genesis", genesis, APP]);
    serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}"))
}

fn a_live_node_is_judged(cluster: &mut Cluster, genesis: &str) {
    let url = cluster.node(1).url();
    let address = url.trim_start_matches("https://");
    let judged: Value = serde_json::from_str(&done(cluster, &["evidence", "verify", address, "--genesis", genesis, "--json"])).unwrap();
    assert_eq!((&judged["result"], &judged["form"]), (&Value::from("ok"), &Value::from("certificate")), "{judged}");
    assert_eq!(judged["proven"]["software_root"], true);
    // Without the cluster's roots it is nobody's.
    refused(cluster, &["evidence", "verify", address, "--collateral", &format!("{genesis}/collateral.json")], "chain.untrusted_root");
    assert!(done(cluster, &["evidence", "show", address]).starts_with("nothing here is verified\n"));
}

#[test]
fn operators_govern_a_cluster() {
    let spec = ClusterSpec { operators: 3, approvals: 2, timelock_s: 2, guests: Vec::new(), ..ClusterSpec::default() };
    let mut cluster = Cluster::start(&spec).unwrap();
    let genesis = cluster.genesis().to_owned();
    let genesis = text(&genesis);
    a_live_node_is_judged(&mut cluster, genesis);
    let keys: Vec<PathBuf> = cluster.operators.iter().map(|operator| operator.key.clone()).collect();
    let keys: Vec<&str> = keys.iter().map(|key| text(key)).collect();
    let hash = "aa".repeat(32);
    let policy = ["--app-id", APP, "--name", "web", "--platform", "tdx", "--compose-hash", &hash, "--any-os-image", "--class", "disk"];
    let head = [&["policy", "propose", "--genesis", genesis], policy.as_slice()].concat();
    let propose = |more: &[&'static str], key: usize| [head.as_slice(), &["--key", keys[key]], more].concat();

    // One of two approvals: pending, however often the same operator gives it.
    let out = done(&cluster, &propose(&[], 0));
    assert_eq!(field(&out, "state"), "pending");
    let action = field(&out, "action");
    let again = done(&cluster, &["policy", "approve", "--genesis", genesis, &action, "--key", keys[0]]);
    assert!(again.contains("set the policy of app 0303") && again.contains(&hash), "what is signed is shown: {again}");
    assert_eq!(field(&again, "state"), "pending");
    let row = shown(&cluster, genesis);
    assert_eq!((row["version"].as_u64(), row["pending_actions"][0].as_str()), (Some(0), Some(action.as_str())));

    // A key that is no operator's.
    let stranger = cluster.dir().join("stranger.key");
    done(&cluster, &["operator", "keygen", "--out", text(&stranger)]);
    refused(&cluster, &["policy", "approve", "--genesis", genesis, &action, "--key", text(&stranger)], "BAD_APPROVAL");

    // The second approval is signed apart from the network, then sent; the nodes end the timelock by themselves.
    let approval = cluster.dir().join("approval.bin");
    let signed = done(&cluster, &["policy", "approve", "--genesis", genesis, &action, "--key", keys[1], "--sign-only", text(&approval)]);
    assert_eq!(field(&signed, "state"), "signed");
    let sent = done(&cluster, &["policy", "submit", "--genesis", genesis, text(&approval)]);
    assert_eq!(field(&sent, "state"), "pending", "the timelock runs");
    until("the timelock", PATIENCE, || match shown(&cluster, genesis)["version"].as_u64() {
        Some(1) => Ok(()),
        other => Err(ClusterError::Unexpected { from: "policy show".to_owned(), got: format!("{other:?}") }),
    })
    .unwrap();

    an_env_key_is_shown_and_not_made_twice(&cluster, genesis, keys[0], text(&stranger));

    // What builds on an old version is refused; a revocation by one operator holds at once.
    refused(&cluster, &propose(&["--base-version", "0"], 0), "STALE_VERSION");
    refused(&cluster, &["policy", "approve", "--genesis", genesis, &action, "--key", keys[2]], "UNKNOWN_ACTION");
    let out = done(&cluster, &["policy", "revoke", "--genesis", genesis, "--app-id", APP, "--key", keys[2]]);
    assert_eq!(field(&out, "state"), "applied");
    assert_eq!(shown(&cluster, genesis)["revoked"], true);

    another_genesis_trusts_none_of_these_nodes(&cluster);
    one_node_is_no_cluster(&mut cluster, genesis);
    the_logs_hold(&mut cluster, genesis);
}

/// The nodes compute it by themselves; what an operator signs for a further attempt is verified before it is refused.
fn an_env_key_is_shown_and_not_made_twice(cluster: &Cluster, genesis: &str, key: &str, stranger: &str) {
    let show = || -> Value { serde_json::from_str(&done(cluster, &["env", "show", "--genesis", genesis, APP])).unwrap() };
    until("the env key", PATIENCE * 4, || match show()["public_key"].as_str() {
        Some(hex) if hex.len() == 64 => Ok(()),
        other => Err(ClusterError::Unexpected { from: "env show".to_owned(), got: format!("{other:?}") }),
    })
    .unwrap();
    let row = show();
    assert_eq!((row["open"].as_bool(), row["attempts_free"].as_u64()), (Some(false), Some(3)), "{row}");
    refused(cluster, &["env", "retry", APP, "--genesis", genesis, "--key", key], "ENV_KEY_PINNED");
    refused(cluster, &["env", "retry", APP, "--genesis", genesis, "--key", stranger, "--wait", "5s"], "BAD_APPROVAL");
    refused(cluster, &["env", "show", "--genesis", genesis, &"09".repeat(20)], "APP_UNKNOWN");
}

fn another_genesis_trusts_none_of_these_nodes(cluster: &Cluster) {
    let plan = std::fs::read_to_string(cluster.dir().join("plan.toml")).unwrap();
    let (head, measurement) = plan.split_once("measurement = \"").unwrap();
    let digit = if measurement.starts_with('0') { '1' } else { '0' };
    std::fs::write(cluster.dir().join("other.toml"), format!("{head}measurement = \"{digit}{}", &measurement[1..])).unwrap();
    let (plan, folder) = (cluster.dir().join("other.toml"), cluster.dir().join("other"));
    done(cluster, &["cluster", "plan", "--plan", text(&plan), "--out", text(&folder)]);
    refused(cluster, &["cluster", "init", "--genesis", text(&folder), "--timeout", "20s"], "not allowed by the genesis document");
    let (code, stdout, _) = dstack(cluster, &["cluster", "status", "--genesis", text(&folder)]);
    assert!(code == 1 && stdout.contains("not trusted"), "{stdout}");
}

fn one_node_is_no_cluster(cluster: &mut Cluster, genesis: &str) {
    let status = |cluster: &Cluster| {
        let (code, stdout, _) = dstack(cluster, &["cluster", "status", "--genesis", genesis, "--json"]);
        let rows: Vec<Value> = serde_json::from_str(&stdout).unwrap();
        (code, rows.iter().filter(|row| row["status"]["ready"] == true && row["software_root"] == true).count())
    };
    assert_eq!(status(cluster), (0, 3));
    cluster.node(1).kill();
    assert_eq!(status(cluster).0, 0, "two of three are a majority");
    cluster.node(2).kill();
    assert_eq!(status(cluster).0, 1);
}

fn the_logs_hold(cluster: &mut Cluster, genesis: &str) {
    cluster.node(3).kill();
    for seat in 1..=3 {
        let data = cluster.node(seat).data_dir();
        let out = done(cluster, &["audit", "verify", "--data", text(&data), "--genesis", genesis]);
        assert!(out.contains("governance") && out.contains("ceremony"), "{out}");
    }
    // A flipped bit in the middle of a node's log.
    let data = cluster.node(1).data_dir();
    let first = |folder: &Path| std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let segment = first(&first(&data.join("audit")));
    let mut bytes = std::fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    refused(cluster, &["audit", "verify", "--data", text(&data), "--genesis", genesis], "audit-");
}
