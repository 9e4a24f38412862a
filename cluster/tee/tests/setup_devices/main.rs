//! The boot of a guest, `dstack-util setup` as a process, on the devices of hardware: a TD by the kernel's files (FUSE) with keys of a
//! cluster of processes, a machine of Google Cloud with a real vTPM and keys sealed in it. What was measured is judged by our own verifier.
//! Needs root, /dev/fuse and swtpm.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

#[path = "../fuse_tdx/guest.rs"]
#[allow(dead_code, reason = "the tests of TDX use more of it")]
mod guest;
#[path = "../swtpm/machine.rs"]
#[allow(dead_code, reason = "the tests of the TPM use more of it")]
mod machine;
#[path = "../swtpm/pki.rs"]
#[allow(dead_code, reason = "the tests of the TPM use more of it")]
mod pki;
#[path = "../swtpm/process.rs"]
#[allow(dead_code, reason = "the tests of the TPM use more of it")]
mod process;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;
use std::time::Duration;

use dstack_attest::eventlog::{replay_runtime, runtime_preimage};
use dstack_attest::wire::{Attestation, PlatformEvidence, RuntimeEvent};
use dstack_protocol::Platform;
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_tee::{Device as _, open};
use dstack_testkit::SoftwareRoots;
use dstack_testkit::cluster::{App, Binaries, Cluster, ClusterError, ClusterSpec, MachineKind, until};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::guest::Td;
use crate::machine::{GOOGLE_FIRMWARE_V2, Machine};
use crate::pki::AkAuthority;

/// For a new cluster to sign the first time.
const SIGNING: Duration = Duration::from_secs(180);

/// One machine's files: the host's share, work directories.
struct Guest {
    dir: tempfile::TempDir,
    program: PathBuf,
}

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("share")).unwrap();
        fs::write(dir.path().join("cmdline"), "dstack.storage_fs=ext4\n").unwrap();
        Self { dir, program: Binaries::find().unwrap().path("dstack-util").unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn share(&self, name: &str, content: &[u8]) {
        fs::write(self.path("share").join(name), content).unwrap();
    }

    fn setup(&self, device: &str, more: &[&str]) -> Output {
        let mut command = Command::new(&self.program);
        let file = |name: &str| self.path(name).display().to_string();
        command.args(["setup", "--tee", device, "--work-dir", &file("work"), "--host-shared", &file("share")]);
        command.args(["--kernel-command-line", &file("cmdline"), "--engine-config", &file("daemon.json")]).args(more);
        command.output().unwrap()
    }

    fn keys(&self) -> Value {
        read_json(&self.path("work/.host-shared/.appkeys.json"))
    }
}

fn read_json(file: &Path) -> Value {
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", said(output));
}

/// What a boot measured, by its own evidence.
fn measured(evidence: &[u8]) -> Vec<RuntimeEvent> {
    Attestation::decode(evidence).unwrap().runtime_events
}

fn names(events: &[RuntimeEvent]) -> Vec<&str> {
    events.iter().map(|event| event.event.as_str()).collect()
}

fn payload(events: &[RuntimeEvent], name: &str) -> Vec<u8> {
    events.iter().find(|event| event.event == name).unwrap().payload.clone()
}

/// Events of a boot up to its keys, and after them.
const BEFORE: [&str; 7] = ["system-preparing", "app-id", "compose-hash", "gpu-policy-hash", "instance-id", "boot-mr-done", "key-provider"];
const AFTER: [&str; 2] = ["storage-fs", "system-ready"];

/// A cluster that serves guests of both kinds of machines, with two forms of one app.
struct Setting {
    cluster: Cluster,
    /// Certifies the keys of Google Cloud's vTPMs; nodes trust its root.
    authority: Rc<AkAuthority>,
    app: App,
    /// Pins the cluster: its own protocol.
    native: Vec<u8>,
    /// Pins nothing: dstack's protocol.
    legacy: Vec<u8>,
    /// Outlives the cluster in it.
    _dir: tempfile::TempDir,
}

impl Setting {
    fn new() -> Self {
        let (dir, authority) = (tempfile::tempdir().unwrap(), AkAuthority::new());
        let (roots, google) = (SoftwareRoots::generate(SystemClock::new().now()).unwrap(), dir.path().join("google-root.der"));
        roots.save(&dir.path().join("roots")).unwrap();
        fs::write(dir.path().join("roots/collateral.json"), authority.beside(roots.bundle())).unwrap();
        fs::write(&google, &authority.root_der).unwrap();
        let spec = ClusterSpec {
            guests: vec![("web".to_owned(), MachineKind::Tdx)],
            dstack: true,
            more_roots: vec![google],
            dir: Some(dir.path().to_owned()),
            ..ClusterSpec::default()
        };
        let cluster = Cluster::start(&spec).unwrap();
        let compose = cluster.dir().join("web.yml");
        fs::write(&compose, "services:\n  web:\n    image: alpine:3\n").unwrap();
        let app = cluster.measure("web", &compose, MachineKind::Tdx).unwrap();
        let mut native = read_json(&app.compose);
        native["secure_time"] = json!(false);
        // the whole pin, so that the root's certificate and the identity's signature are held against it
        let pin = read_json(cluster.pin().unwrap());
        for name in ["ca_pub", "id_pub"] {
            native["dstack_kms"][name] = pin[name].clone();
        }
        let mut legacy = native.clone();
        legacy.as_object_mut().unwrap().remove("dstack_kms").unwrap();
        legacy["key_provider"] = json!("kms");
        let [native, legacy] = [native, legacy].map(|document| document.to_string().into_bytes());
        let hashes = [&native, &legacy].map(|document| hex::encode(Sha256::digest(document)));
        fs::write(&app.compose, &native).unwrap();
        let app = App { compose_hash: hashes[0].clone(), app_id: hashes[0][..40].to_owned(), ..app };
        let mut propose = cluster.policy("propose").unwrap();
        propose.args(["--app-id", &app.app_id, "--name", "web", "--platform", "tdx,gcp-tdx", "--any-os-image", "--allow-legacy"]);
        propose.args(["--class", "disk,env,k256,p256", "--compose-hash", &hashes.join(",")]);
        let output = propose.output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("applied"), "{}", said(&output));
        let setting = Self { cluster, authority: Rc::new(authority), app, native, legacy, _dir: dir };
        setting.wait_for_signatures();
        setting
    }

    /// A young cluster may not have signed yet; what it signed once it answers at once.
    fn wait_for_signatures(&self) {
        let mut tries = 0;
        let whole = until("the cluster's signatures", SIGNING, || {
            tries += 1;
            let keys = read_json(&self.cluster.fetch_keys("web", &self.app, &format!("try-{tries}"))?.path);
            let lacks = ["k256_signature", "ca_cert"].iter().find(|name| keys[**name] == "");
            lacks.map_or(Ok(keys), |name| Err(ClusterError::Unexpected { from: "cluster".to_owned(), got: format!("no {name}") }))
        });
        assert_eq!(whole.unwrap()["k256_signature"].as_str().unwrap().len(), 130);
    }

    fn roots(&self) -> SoftwareRoots {
        SoftwareRoots::load(&self.cluster.dir().join("roots")).unwrap()
    }

    fn native_urls(&self) -> Vec<String> {
        self.cluster.kms_urls().split(',').map(str::to_owned).collect()
    }

    /// What makes a guest of the cluster's own protocol trust emulated nodes.
    fn trust(&self) -> [String; 4] {
        let [tdx_root, _] = self.cluster.device.roots();
        let shown = |file: PathBuf| file.display().to_string();
        ["--software-root".to_owned(), shown(tdx_root), "--collateral".to_owned(), shown(self.cluster.device.collateral())]
    }

    fn guest(&self, document: &[u8], urls: &[String]) -> Guest {
        let guest = Guest::new();
        guest.share("app-compose.json", document);
        guest.share(".sys-config.json", json!({ "kms_urls": urls }).to_string().as_bytes());
        let info = json!({ "instance_id_seed": "01".repeat(20), "app_id": self.app.app_id });
        guest.share(".instance_info", info.to_string().as_bytes());
        guest
    }
}

/// Boots on a TD, twice; the events, the keys, and that nothing is measured twice.
fn boot_twice(td: &Td, guest: &Guest, document: &[u8], more: &[&str]) -> (Vec<RuntimeEvent>, Value) {
    let text = td.text(";ccel=none");
    succeeds(&guest.setup(&text, more));
    let keys = guest.keys();
    let evidence = open(&text).unwrap().evidence([7; 64]).unwrap();
    let events = measured(&evidence);
    let register = td.mounted.registers()[3];
    assert_eq!(register, replay_runtime(&events), "RTMR3 is what the log says");
    // our own judge: quote, certificates, replay, identity
    let identity = td.verify(&evidence).unwrap();
    assert_eq!((identity.platform(), identity.report_data()), (Platform::Tdx, &[7; 64]));
    assert_eq!(identity.compose_hash(), Some(Sha256::digest(document).into()));
    assert_eq!(identity.app_id().unwrap().0.as_slice(), payload(&events, "app-id"));
    let info = read_json(&guest.path("work/.host-shared/.instance_info"));
    assert_eq!(info["instance_id"], hex::encode(identity.instance_id()));
    assert_eq!(identity.key_provider(), payload(&events, "key-provider"));

    let again = guest.setup(&text, more);
    succeeds(&again);
    assert!(said(&again).contains("this boot has its keys already"), "{}", said(&again));
    assert_eq!((td.mounted.registers()[3], guest.keys()), (register, keys.clone()), "the second run measures and asks nothing");
    assert_eq!(measured(&open(&text).unwrap().evidence([8; 64]).unwrap()), events);
    (events, keys)
}

#[test]
fn a_td_gets_its_keys_from_a_cluster_by_both_protocols() {
    let Some(()) = fuse_is_here() else { return };
    let setting = Setting::new();
    let machine = || Td::of(setting.roots(), |td| td).unwrap();
    let more = setting.trust();
    let more = more.each_ref().map(String::as_str);
    let urls = setting.native_urls();
    let guest = setting.guest(&setting.native, &urls);
    let (events, keys) = boot_twice(&machine(), &guest, &setting.native, &more);
    assert_eq!(names(&events), [&BEFORE[..], &AFTER].concat());
    let provider = format!(r#"{{"name":"kms","id":"{}"}}"#, setting.cluster.cluster_id);
    assert_eq!(payload(&events, "key-provider"), provider.as_bytes());
    for name in ["disk_crypt_key", "env_crypt_key", "k256_key"] {
        assert_eq!(keys[name].as_str().unwrap().len(), 64, "{name}");
    }
    assert!(keys["ca_cert"].as_str().unwrap().starts_with("-----BEGIN CERTIFICATE-----\n"));
    assert_eq!(keys["k256_signature"].as_str().unwrap().len(), 130);

    // another boot of the same instance: another TD, the same keys
    let next = setting.guest(&setting.native, &urls);
    assert_eq!(boot_twice(&machine(), &next, &setting.native, &more).1, keys);

    // by dstack's protocol another document, and the node that answers learns the keys: they are the same, by the same roots
    let guest = setting.guest(&setting.legacy, &setting.cluster.dstack_urls());
    let (events, by_dstack) = boot_twice(&machine(), &guest, &setting.legacy, &[]);
    let kept: Vec<&str> = names(&events).into_iter().filter(|name| *name != "os-image-hash").collect();
    assert_eq!(kept, [&BEFORE[..], &AFTER].concat());
    for name in ["disk_crypt_key", "k256_key", "k256_signature", "ca_cert"] {
        assert_eq!(by_dstack[name], keys[name], "{name}");
    }
    let root = by_dstack["key_provider"]["Kms"]["pubkey"].as_str().unwrap();
    assert_eq!(payload(&events, "key-provider"), format!(r#"{{"name":"kms","id":"{root}"}}"#).as_bytes());
    assert_eq!(keys["key_provider"]["Kms"]["pubkey"], root);

    // another instance has another disk, in one boot with the first nothing at all
    let td = machine();
    succeeds(&guest.setup(&td.text(";ccel=none"), &[]));
    let info = json!({ "instance_id_seed": "02".repeat(20), "app_id": setting.app.app_id });
    let other = setting.guest(&setting.legacy, &setting.cluster.dstack_urls());
    other.share(".instance_info", info.to_string().as_bytes());
    let refused = other.setup(&td.text(";ccel=none"), &[]);
    assert!(!refused.status.success() && said(&refused).contains("setup step 4 (measured events)"), "{}", said(&refused));
}

#[test]
fn a_machine_of_google_cloud_gets_its_keys_from_a_cluster_by_both_protocols() {
    let Some(()) = fuse_is_here() else { return };
    let setting = Setting::new();
    let Some(machine) = Machine::of(setting.roots(), &setting.authority) else { return };
    let boot = |machine: &Machine, document: &[u8], urls: &[String], more: &[&str]| {
        let guest = setting.guest(document, urls);
        let output = guest.setup(&format!("{};ccel=none", machine.text()), more);
        (guest, output)
    };
    let trust = setting.trust();
    let trust = trust.each_ref().map(String::as_str);
    let (guest, output) = boot(&machine, &setting.native, &setting.native_urls(), &trust);
    succeeds(&output);
    let keys = guest.keys();
    let evidence = machine.device().evidence([7; 64]).unwrap();
    let identity = machine.verify(&evidence).unwrap();
    assert_eq!((identity.platform(), identity.compose_hash()), (Platform::GcpTdx, Some(Sha256::digest(&setting.native).into())));
    assert_eq!(names(&measured(&evidence)), [&BEFORE[..], &AFTER].concat());
    assert_eq!(identity.key_provider(), format!(r#"{{"name":"kms","id":"{}"}}"#, setting.cluster.cluster_id).as_bytes());

    // Another machine by dstack's protocol: the app's keys are the same, the disk is another instance's.
    let other = Machine::of(setting.roots(), &setting.authority).unwrap();
    let (guest, output) = boot(&other, &setting.legacy, &setting.cluster.dstack_urls(), &[]);
    succeeds(&output);
    let by_dstack = guest.keys();
    for name in ["k256_key", "k256_signature", "ca_cert"] {
        assert_eq!(by_dstack[name], keys[name], "{name}");
    }
    assert_ne!(by_dstack["disk_crypt_key"], keys["disk_crypt_key"]);

    // A vTPM whose key another authority certified, and another firmware below: nodes refuse both, by either protocol.
    let stranger = Machine::of(setting.roots(), &Rc::new(AkAuthority::new())).unwrap();
    let [version, other_host, separator] = GOOGLE_FIRMWARE_V2;
    let changed = Machine::with_firmware(setting.roots(), &setting.authority, [other_host, version, separator]).unwrap();
    let impatient = [&trust[..], &["--patience-s", "3"]].concat();
    for (machine, document, urls, more, why) in [
        (&stranger, &setting.native, setting.native_urls(), &impatient[..], "its evidence does not hold there"),
        (&changed, &setting.legacy, setting.cluster.dstack_urls(), &[], "a firmware that is not listed"),
    ] {
        let (guest, output) = boot(machine, document, &urls, more);
        let said = said(&output);
        assert!(!output.status.success() && said.contains("setup step 5 (keys)") && said.contains(why), "{said}");
        assert!(!guest.path("work/.host-shared/.appkeys.json").exists());
    }
}

#[test]
fn a_machine_of_google_cloud_measures_into_both_registers_and_seals_its_keys() {
    let Some(machine) = Machine::new() else { return };
    let guest = Guest::new();
    let document =
        json!({ "manifest_version": "2", "name": "web", "runner": "docker-compose", "secure_time": false, "key_provider": "tpm" });
    let document = document.to_string().into_bytes();
    guest.share("app-compose.json", &document);
    guest.share(".sys-config.json", b"{}");
    guest.share(".instance_info", json!({ "instance_id_seed": "01".repeat(20), "app_id": "11".repeat(20) }).to_string().as_bytes());
    let text = format!("{};ccel=none", machine.text());
    let tcti = machine.swtpm.tcti();
    let more = ["--tpm", tcti.as_str()];
    succeeds(&guest.setup(&text, &more));
    let keys = guest.keys();
    let evidence = open(&text).unwrap().evidence([5; 64]).unwrap();
    let events = measured(&evidence);
    assert_eq!(names(&events), [&BEFORE[..], &AFTER].concat());

    // one list of events behind RTMR3 and PCR 14
    let digests = events.iter().map(|event| <[u8; 32]>::from(Sha256::digest(runtime_preimage(event))));
    let pcr14 = digests.fold([0; 32], |pcr, digest| <[u8; 32]>::from(Sha256::digest([pcr, digest].concat())));
    let PlatformEvidence::GcpTdx(_, quoted) = Attestation::decode(&evidence).unwrap().platform else { panic!("another platform") };
    let value = quoted.pcr_values.iter().find(|pcr| pcr.index == 14).unwrap();
    assert_eq!((&value.value[..], machine.td.mounted.registers()[3]), (&pcr14[..], replay_runtime(&events)));
    let identity = machine.verify(&evidence).unwrap();
    assert_eq!((identity.platform(), identity.compose_hash()), (Platform::GcpTdx, Some(Sha256::digest(&document).into())));
    assert_eq!(identity.key_provider(), br#"{"name":"tpm","id":""}"#);

    // the instance is bound to this TPM's key
    let instance = |binding: &[u8]| hex::encode(&Sha256::digest([&[1; 20][..], &[0x11; 20], binding].concat())[..20]);
    let binding = open(&text).unwrap().instance_binding().unwrap().unwrap();
    assert_eq!(hex::encode(identity.instance_id()), instance(&binding));
    assert_ne!(hex::encode(identity.instance_id()), instance(&[]));

    // a second run measures nothing twice; a changed document cannot follow the registers
    let again = guest.setup(&text, &more);
    succeeds(&again);
    assert_eq!((guest.keys(), measured(&open(&text).unwrap().evidence([6; 64]).unwrap())), (keys, events));
    let changed = String::from_utf8(document).unwrap().replace("\"web\"", "\"other\"");
    guest.share("app-compose.json", changed.as_bytes());
    let refused = guest.setup(&text, &more);
    assert!(!refused.status.success() && said(&refused).contains("boot anew"), "{}", said(&refused));
}

/// `None` on a machine that cannot mount: said, and a failure under CI.
fn fuse_is_here() -> Option<()> {
    Td::new().map(drop)
}
