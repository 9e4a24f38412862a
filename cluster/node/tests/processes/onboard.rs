//! dstack's operators bring a cluster up: `Bootstrap` on each of its nodes, `/finish`, an upgraded node by `Onboard`, and service `Admin`.

use std::process::Command;

use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots, VerifyContext, verify};
use dstack_protocol::{TcbStatus, binding};
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_testkit::cluster::process::run;
use dstack_testkit::cluster::{Cluster, ClusterSpec, FORMING};
use serde_json::{Value, json};

use crate::dstack::{logged_port, soon};
use crate::genesis::modified_binary;

pub(crate) const TOKEN: &str = "the-operators-token";

/// Three nodes that wait for their operators. `admin`: more of section `[dstack.admin]`.
pub(crate) fn spec(admin: &str) -> ClusterSpec {
    let section = format!(
        "mode = \"pinned\"\n\n[dstack]\nlisten = \"127.0.0.1:0\"\nhosts = [\"127.0.0.1\", \"kms.test\"]\n\n[dstack.admin]\nlisten = \
         \"127.0.0.1:0\"\nauth_token = \"{TOKEN}\"\n{admin}\n\n[dstack.onboard]\nlisten = \"127.0.0.1:0\"\nsite_name = \"here\"\n"
    );
    ClusterSpec { collateral: section, ..ClusterSpec::default() }
}

/// curl's status and body.
pub(crate) fn curl(url: &str, arguments: &[&str]) -> (u16, String) {
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--max-time", "70", "-w", "\n%{http_code}"]).args(arguments).arg(url);
    let output = String::from_utf8(curl.output().unwrap().stdout).unwrap();
    let (body, status) = output.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

pub(crate) fn onboarding(cluster: &mut Cluster, seat: u16) -> String {
    format!("http://127.0.0.1:{}", logged_port(cluster, seat, "listening for dstack's onboarding"))
}

/// A call in JSON, as upstream's page and scripts make it.
pub(crate) fn call(base: &str, method: &str, body: &Value) -> (u16, Value) {
    let (status, text) = curl(&format!("{base}/prpc/Onboard.{method}?json"), &["--data-binary", &body.to_string()]);
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

pub(crate) fn error(answer: &(u16, Value)) -> &str {
    answer.1["error"].as_str().unwrap_or_else(|| panic!("no error: {answer:?}"))
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// What `Bootstrap` answers on each of these, called at once.
pub(crate) fn bootstrapped(bases: &[String]) -> Vec<Value> {
    let calls: Vec<_> = bases
        .iter()
        .cloned()
        .map(|base| {
            std::thread::spawn(move || {
                let ask = json!({"domain": "kms.test"});
                soon("Bootstrap", || match call(&base, "Bootstrap", &ask) {
                    (200, made) => Ok(made),
                    // Slow machines: the call says what it waits for, and is made again.
                    (503, other) => Err(other.to_string()),
                    other => panic!("{other:?}"),
                })
            })
        })
        .collect();
    calls.into_iter().map(|call| call.join().unwrap()).collect()
}

/// GetMeta of the TLS listener, as soon as it serves.
pub(crate) fn meta(cluster: &mut Cluster, seat: u16) -> (String, Value) {
    let url = format!("https://127.0.0.1:{}", logged_port(cluster, seat, "listening for dstack's protocol"));
    let meta = soon("GetMeta", || {
        let (status, text) = curl(&format!("{url}/prpc/GetMeta"), &["-k"]);
        if status == 200 { Ok(serde_json::from_str(&text).unwrap()) } else { Err(format!("{status} {text}")) }
    });
    (url, meta)
}

/// Verifies the evidence of `Bootstrap` as whoever publishes it with `setKmsInfo` does.
fn check_attestation(cluster: &mut Cluster, made: &Value) {
    let bytes = |name: &str| hex::decode(made[name].as_str().unwrap()).unwrap();
    let mut roots = TrustRoots::production();
    for root in cluster.device.roots() {
        roots = roots.with_software_root(&std::fs::read(root).unwrap()).unwrap();
    }
    let collateral = CollateralBundle::parse(&std::fs::read(cluster.genesis().join("collateral.json")).unwrap()).unwrap();
    let tcb = TcbPolicy::allowing(&[TcbStatus::UpToDate]);
    let context = VerifyContext { now: SystemClock::new().now(), roots: &roots, collateral: &collateral, tcb: &tcb };
    let identity = verify(&bytes("attestation"), &context).unwrap();
    assert_eq!(*identity.report_data(), binding::bootstrapped(&bytes("ca_pubkey"), &bytes("k256_pubkey")));
}

#[test]
fn operators_of_dstack_form_a_cluster_and_add_an_upgraded_node() {
    let mut cluster = Cluster::plan(&spec("")).unwrap();
    cluster.start_all().unwrap();
    let bases: Vec<String> = (1..=3).map(|seat| onboarding(&mut cluster, seat)).collect();

    // What operators look at first.
    let (status, page) = curl(&bases[0], &[]);
    assert!(status == 200 && page.contains("onboarding") && page.contains(&cluster.cluster_id), "{page}");
    assert_eq!(curl(&format!("{}/health", bases[0]), &[]), (200, "OK".to_owned()));
    let (status, info) = call(&bases[0], "GetAttestationInfo", &json!({}));
    assert_eq!((status, &info["tee_variant"], &info["site_name"]), (200, &json!("dstack-tdx"), &json!("here")), "{info}");
    // An emulated node measures no OS image.
    let lengths = ["device_id", "mr_aggregated", "os_image_hash", "ppid"].map(|field| info[field].as_str().unwrap().len());
    assert_eq!(lengths, [64, 64, 0, 32], "{info}");
    assert_eq!(call(&bases[0], "GetAttestationInfo", &json!({})).1, info);
    assert_ne!(call(&bases[1], "GetAttestationInfo", &json!({})).1["device_id"], info["device_id"], "another machine");

    // Nobody has let them take part: no vote, no leader, and nothing to finish.
    let status = cluster.node(1).status().unwrap();
    assert_eq!((&status["raft"]["leader"], &status["raft"]["votes"]), (&Value::Null, &json!(false)), "{status}");
    assert_eq!(status["dstack"]["serves"], false, "{status}");
    let (status, text) = curl(&format!("{}/finish", bases[0]), &[]);
    assert!(status == 409 && text.contains("call Bootstrap or Onboard first"), "{text}");
    for (domain, what) in [("", "domain"), ("-x", "domain"), ("other.test", "dstack.hosts"), ("kms.test:8000", "domain")] {
        let refused = call(&bases[0], "Bootstrap", &json!({ "domain": domain }));
        assert!(refused.0 == 400 && error(&refused).contains(what), "{refused:?}");
    }
    let nowhere = call(&bases[0], "Onboard", &json!({"domain": "kms.test", "source_url": "https://127.0.0.1:1"}));
    assert!(error(&nowhere).contains("Failed to onboard: source KMS") && error(&nowhere).contains("call Bootstrap"), "{nowhere:?}");

    // Bootstrap on each node, at once: upstream's answer, the same keys from each.
    let made = bootstrapped(&bases);
    for one in &made {
        assert_eq!(keys(one), ["ca_pubkey", "k256_pubkey", "attestation"], "nothing else is answered");
        assert_eq!((&one["ca_pubkey"], &one["k256_pubkey"]), (&made[0]["ca_pubkey"], &made[0]["k256_pubkey"]));
        check_attestation(&mut cluster, one);
    }
    cluster.init().unwrap();
    let again = call(&bases[0], "Bootstrap", &json!({"domain": "kms.test"}));
    assert_eq!((again.0, error(&again)), (400, "KMS has already been bootstrapped"));
    let other = call(&bases[0], "Onboard", &json!({"domain": "kms.test", "source_url": "https://127.0.0.1:1"}));
    assert_eq!((other.0, error(&other)), (400, "KMS has already been bootstrapped"));

    // Finish: by the path and by the method. Then dstack's own protocol is served, with what was made.
    assert_eq!(curl(&format!("{}/finish", bases[0]), &[]), (200, "OK".to_owned()));
    for base in &bases[1..] {
        assert_eq!(call(base, "Finish", &json!({})), (200, Value::Null));
    }
    for (seat, (base, made)) in (1..).zip(bases.iter().zip(&made)) {
        soon("the end of onboarding", || match curl(&format!("{base}/health"), &[]).0 {
            0 => Ok(()),
            status => Err(status.to_string()),
        });
        let (_, meta) = meta(&mut cluster, seat);
        assert_eq!((&meta["k256_pubkey"], &meta["bootstrap_info"]), (&made["k256_pubkey"], made), "node {seat}");
        assert_eq!(cluster.node(seat).status().unwrap()["dstack"], json!({"serves": true, "waits_for": null}));
    }
    check_admin(&mut cluster);

    // A restart needs no operator.
    cluster.node(2).kill();
    cluster.node(2).start().unwrap();
    cluster.wait_ready(FORMING).unwrap();

    // Node 3 with another binary and an empty disk: its operator is told what to allow.
    cluster.node(3).kill();
    let data = cluster.node(3).data_dir();
    std::fs::remove_dir_all(&data).unwrap();
    // Where it listened before is in its log.
    std::fs::remove_file(cluster.node(3).log()).unwrap();
    let modified = modified_binary(cluster.dir());
    cluster.node(3).program = modified;
    cluster.node(3).start().unwrap();
    let base = onboarding(&mut cluster, 3);
    let (source, before) = meta(&mut cluster, 1);
    let ask = json!({"domain": "kms.test", "source_url": source});
    let denied = call(&base, "Onboard", &ask);
    assert!(denied.0 == 400 && error(&denied).starts_with("Failed to onboard: boot denied: MEASUREMENT_NOT_ALLOWED"), "{denied:?}");
    let bootstrap = call(&base, "Bootstrap", &json!({"domain": "kms.test"}));
    assert_eq!((bootstrap.0, error(&bootstrap)), (400, "KMS has already been onboarded"));
    let measurement = error(&denied).split("--measurement ").nth(1).unwrap().split(' ').next().unwrap().to_owned();

    // The operators' quorum allows it, by the very command that was printed; then the same call goes through.
    let mut allow = cluster.policy("allow-node").unwrap();
    run(allow.args(["--platform", "tdx", "--measurement", &measurement])).unwrap();
    let joined = soon("Onboard", || match call(&base, "Onboard", &ask) {
        (200, joined) => Ok(joined),
        // The entry has to reach the nodes that let it in.
        (400 | 503, other) => Err(other.to_string()),
        other => panic!("{other:?}"),
    });
    assert_eq!(joined, json!({"k256_pubkey": before["k256_pubkey"]}));
    let again = call(&base, "Onboard", &ask);
    assert_eq!((again.0, error(&again)), (400, "KMS has already been onboarded"));
    let seats = cluster.node(1).status().unwrap()["state"]["seats"].clone();
    assert!(seats.as_array().unwrap().iter().any(|row| row["seat"] == 3 && row["index"] == 4), "admitted anew: {seats}");
    assert_eq!(curl(&format!("{base}/finish"), &[]), (200, "OK".to_owned()));
    let (_, after) = meta(&mut cluster, 3);
    assert_eq!((&after["ca_cert"], &after["k256_pubkey"]), (&before["ca_cert"], &before["k256_pubkey"]), "the keys are unchanged");
    assert_eq!(after["bootstrap_info"], Value::Null, "onboarded, not bootstrapped");
    crate::releases::audit_verifies(&mut cluster);
}

/// Who may call service `Admin`, in the forms of upstream's scripts.
fn check_admin(cluster: &mut Cluster) {
    let base = format!("http://127.0.0.1:{}", logged_port(cluster, 1, "listening for dstack's admin service"));
    let url = format!("{base}/prpc/Admin.ClearImageCache?json");
    let bearer = format!("Authorization: Bearer {TOKEN}");
    let header = format!("X-Admin-Token: {TOKEN}");
    let (password, user) = (format!("any:{TOKEN}"), format!("{TOKEN}:"));
    for right in [["-H", &bearer], ["-H", &header], ["-u", &password], ["-u", &user]] {
        assert_eq!(curl(&url, &[right[0], right[1], "--data-binary", "{\"image_hash\":\"all\"}"]), (200, "null".to_owned()), "{right:?}");
    }
    for wrong in [["-H", "Authorization: Bearer x"], ["-H", "X-Admin-Token: x"], ["-u", "any:x"], ["-H", "Accept: */*"]] {
        assert_eq!(curl(&url, &wrong), (401, String::new()), "{wrong:?}");
        assert_eq!(curl(&format!("{base}/health"), &wrong), (401, String::new()), "{wrong:?}");
    }
    let log = cluster.node(1).log_text();
    assert!(!log.contains(TOKEN), "the token is in the log");
    let mut check = Command::new(cluster.binaries.path("dstack-kms").unwrap());
    let effective = run(check.arg("--check-config").arg("--config").arg(cluster.node(1).config())).unwrap();
    assert!(effective.contains("<redacted>") && !effective.contains(TOKEN), "{effective}");
}
