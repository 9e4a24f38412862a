//! A guest and a node on device `tdx`: the files by which a TD's kernel gives quotes and registers, mounted over an emulated TD. Their
//! programs know of no emulation; only the root behind the quotes is the testkit's.

use std::path::PathBuf;

use dstack_attest::wire::{EventVersion, RuntimeEvent};
use dstack_testkit::cluster::{Agent, AgentSpec, App, Cluster, ClusterError, ClusterSpec, FORMING, MachineKind, until};
use dstack_testkit::tsm::{Mounted, SoftwareTd, mount};
use dstack_testkit::{Measured, SoftwareRoots};

use crate::releases::audit_verifies;
use crate::workload::{Workload, check_values, compose_file, registered, runtime};

/// A mounted TD of a cluster's machines.
struct Td {
    mounted: Mounted,
    events: PathBuf,
}

/// Whether this machine can mount: said where not, and a failure under CI.
fn can_mount() -> bool {
    let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") else { return true };
    #[allow(clippy::disallowed_methods, reason = "whether tests may be left out is CI's to say")]
    let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(!ci, "/dev/fuse: {error}; CI has to have it");
    eprintln!("left out: /dev/fuse: {error}");
    false
}

impl Td {
    /// Machine `name` under the cluster's roots, running `measured`.
    fn new(cluster: &Cluster, name: &str, measured: &Measured) -> Self {
        let roots = SoftwareRoots::load(&cluster.dir().join("roots")).unwrap();
        let at = cluster.dir().join(format!("{name}.tsm"));
        std::fs::create_dir(&at).unwrap();
        let mounted = mount(&at, SoftwareTd::new(name, &roots, measured).unwrap()).unwrap();
        Self { mounted, events: cluster.dir().join(format!("{name}.events")) }
    }

    /// The text of a config.
    fn text(&self) -> String {
        let (root, rtmr) = (self.mounted.tsm_root(), self.mounted.measurements());
        format!("tdx:{};rtmr={};ccel=none;events={}", root.display(), rtmr.display(), self.events.display())
    }

    /// Measures what a guest's boot measures of an app.
    fn boot(&self, app_id: &str, compose_hash: &str) {
        let device = dstack_tee::open(&self.text()).unwrap();
        let hex = |text: &str| hex::decode(text).unwrap();
        let events = [
            ("system-preparing", Vec::new()),
            ("app-id", hex(app_id)),
            ("compose-hash", hex(compose_hash)),
            ("instance-id", vec![0x22; 20]),
            ("boot-mr-done", Vec::new()),
        ];
        for (name, payload) in events {
            device.measure(&RuntimeEvent { event: name.to_owned(), payload, version: EventVersion::V1 }).unwrap();
        }
    }
}

fn of_class(values: &[(String, String)], class: &str) -> String {
    values.iter().find(|(name, _)| name == class).map(|(_, kcv)| kcv.clone()).unwrap()
}

fn spec<'a>(device: Option<&'a str>, app: &'a App, name: &'a str) -> AgentSpec<'a> {
    AgentSpec { machine: "web", device, app, app_id: None, instance_seed: None, name }
}

#[test]
fn an_agent_in_a_td_gets_the_keys_of_its_app() {
    if !can_mount() {
        return;
    }
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let other = cluster.measure("other", &compose_file(cluster.dir(), "other", "alpine:4"), MachineKind::Tdx).unwrap();
    let emulated = Agent::start(&cluster, &spec(None, &app, "emulated")).unwrap();

    let td = Td::new(&cluster, "guest", &Measured::executable(b"an image"));
    td.boot(&app.app_id, &app.compose_hash);
    let text = td.text();
    let agent = Agent::start(&cluster, &spec(Some(&text), &app, "guest")).unwrap();
    let (there, here) = (emulated.check_values().unwrap(), agent.check_values().unwrap());
    for class in ["env", "k256"] {
        assert_eq!(of_class(&here, class), of_class(&there, class), "{class} is the app's");
    }
    assert_ne!(of_class(&here, "disk"), of_class(&there, "disk"), "a disk is an instance's");
    let info = agent.call("Info", "{}").unwrap();
    assert_eq!((info["app_id"].as_str(), info["instance_id"].as_str()), (Some(app.app_id.as_str()), Some("22".repeat(20).as_str())));
    agent.call("GetQuote", r#"{"report_data":"abcd"}"#).unwrap();
    agent.stop().unwrap();

    // What was measured decides: another document beside it, a TD that measured an app nobody registered, one that measured none.
    let ended = |device: &str, app: &App, name: &str| match Agent::start(&cluster, &spec(Some(device), app, name)) {
        Err(ClusterError::Ended { log, .. }) => log,
        got => panic!("{name}: {got:?}"),
    };
    let log = ended(&text, &other, "other-document");
    assert!(log.contains("the compose file is not the measured one"), "{log}");
    let stranger = Td::new(&cluster, "stranger", &Measured::executable(b"an image"));
    stranger.boot(&other.app_id, &other.compose_hash);
    let log = ended(&stranger.text(), &other, "stranger");
    assert!(log.contains("APP_UNKNOWN"), "{log}");
    let bare = Td::new(&cluster, "bare", &Measured::executable(b"an image"));
    let log = ended(&bare.text(), &app, "bare");
    assert!(log.contains("was not booted as a dstack app"), "{log}");
    audit_verifies(&mut cluster);
}

#[test]
fn a_node_in_a_td_is_one_of_the_cluster() {
    if !can_mount() {
        return;
    }
    const SEAT: u16 = 3;
    let mut cluster = Cluster::plan(&ClusterSpec::default()).unwrap();
    let program = std::fs::read(&cluster.node(SEAT).program).unwrap();
    let name = cluster.node(SEAT).name();
    let td = Td::new(&cluster, &name, &Measured::executable(&program));
    let config = cluster.node(SEAT).config();
    let text = std::fs::read_to_string(&config).unwrap();
    let emulated = format!("device = {:?}", cluster.device.text(&name));
    assert!(text.contains(&emulated), "{text}");
    std::fs::write(&config, text.replace(&emulated, &format!("device = {:?}", td.text()))).unwrap();

    cluster.start_all().unwrap();
    cluster.init().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    let (runtime, app) = (runtime(), registered(&cluster, "web", MachineKind::Tdx));
    let web = Workload::boot(&cluster, "web", &app);
    let keys = check_values(&runtime.block_on(web.keys(&cluster.node(SEAT).url())));
    let seals = |cluster: &mut Cluster, seat| cluster.node(seat).status().unwrap()["seals"].clone();
    assert_eq!((seals(&mut cluster, 1), seals(&mut cluster, SEAT)), (true.into(), false.into()), "a TD has no key of its own");
    let data = cluster.node(SEAT).data_dir();
    assert!(!data.join("node-key.sealed").exists() && !data.join("shares").exists(), "nothing is sealed");

    // Its share counts: without another node there are just enough.
    cluster.node(1).kill();
    assert_eq!(check_values(&runtime.block_on(web.keys(&cluster.node(2).url()))), keys);
    cluster.start_all().unwrap();
    cluster.wait_ready(FORMING).unwrap();

    // After a restart it is a node that knows nothing, and is admitted anew under the same seat (ADR 0014).
    cluster.node(SEAT).kill();
    cluster.node(SEAT).start().unwrap();
    until("it to be admitted and to vote", FORMING, || {
        let status = cluster.node(SEAT).status()?;
        let row = status["state"]["seats"].as_array().and_then(|seats| seats.iter().find(|row| row["seat"] == SEAT)).cloned();
        let admitted = row.is_some_and(|row| row["index"] == 4) && status["raft"]["votes"] == true;
        if admitted { Ok(()) } else { Err(ClusterError::Unexpected { from: name.clone(), got: status.to_string() }) }
    })
    .unwrap();
    assert!(cluster.node(SEAT).status().unwrap()["share"].is_null(), "its share was in memory");
    assert_eq!(check_values(&runtime.block_on(web.keys(&cluster.node(SEAT).url()))), keys, "it coordinates without one");
    audit_verifies(&mut cluster);
}
