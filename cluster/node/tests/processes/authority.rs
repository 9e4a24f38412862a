//! Apps that only a webhook authority knows, over processes: dstack's guests (mode L) and agents (mode C) are served while the authority
//! of the nodes allows them, and not a lease longer.

use std::collections::BTreeSet;
use std::time::Duration;

use dstack_protocol::codec::sha256;
use dstack_protocol::{ClusterId, RefusalCode};
use dstack_testkit::Measured;
use dstack_testkit::auth_simple::{AuthSimple, Lists};
use dstack_testkit::cluster::process::run;
use dstack_testkit::cluster::{Agent, AgentSpec, App, Cluster, ClusterSpec, MachineKind, value};
use serde_json::{Value, json};

use crate::dstack::{Guests, soon};
use crate::workload::{Workload, compose_file};

/// The guests' OS image, as the authority knows it.
const IMAGE: &str = "1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a";

/// Three nodes that ask this authority and believe it for two seconds.
fn spec(authority: &AuthSimple) -> ClusterSpec {
    let section = format!(
        "mode = \"pinned\"\n\n[dstack]\nlisten = \"127.0.0.1:0\"\nhosts = [\"kms.test\"]\ngateway_app_id = \"of-the-config\"\n\n\
         [authority]\nurl = {:?}\nlease_s = 2\nos_images = {{ {:?} = {IMAGE:?} }}",
        authority.url(),
        // Every emulated guest boots the same image.
        hex::encode(sha256(&[&Measured::compose(b"").tdx_measurement()[..192]])),
    );
    ClusterSpec { collateral: section, ..ClusterSpec::default() }
}

struct World {
    cluster: Cluster,
    guests: Guests,
    app: App,
    workload: Workload,
    certificate: Vec<String>,
}

impl World {
    fn app_key(&mut self, seat: u16) -> Value {
        let ask = json!({"api_version": 1, "vm_config": ""});
        self.guests.ask(&mut self.cluster, seat, "GetAppKey", Some(&ask), &self.certificate).unwrap_or_default()
    }

    /// Keys from that node, as soon as it gives them.
    fn served(&mut self, seat: u16) -> Value {
        soon("keys", || {
            let answer = self.app_key(seat);
            if answer.get("error").is_none() && answer.is_object() { Ok(answer) } else { Err(answer.to_string()) }
        })
    }

    /// Waits until that node refuses with that text: at the end of leases at the latest.
    fn refused(&mut self, seat: u16, text: &str) {
        soon(text, || {
            let answer = self.app_key(seat);
            let error = answer.get("error").and_then(Value::as_str).unwrap_or_default();
            if error.contains(text) { Ok(()) } else { Err(answer.to_string()) }
        });
    }

    /// Waits until a native client of all nodes is refused with that code.
    fn native_refused(&self, runtime: &tokio::runtime::Runtime, code: RefusalCode) {
        soon(code.text(), || {
            let answer = runtime.block_on(async {
                let client = self.workload.client(&self.cluster.kms_urls());
                client.release(&self.workload.app_id, &crate::workload::wishes()).await
            });
            match answer.map_err(|error| error.refusal().map(|refusal| refusal.code)) {
                Err(Some(got)) if got == code => Ok(()),
                other => Err(format!("{:?}", other.map(drop))),
            }
        });
    }
}

#[test]
fn an_existing_authority_decides_about_apps_that_nobody_registered() {
    let lists = Lists {
        gateway_app_id: "of-the-authority".to_owned(),
        kms_contract_addr: "0x1111111111111111111111111111111111111111".to_owned(),
        chain_id: 8453,
        ..Lists::default()
    };
    let mut authority = AuthSimple::start(0, lists).unwrap();
    let mut cluster = Cluster::start(&spec(&authority)).unwrap();
    let (guests, meta) = Guests::new(&mut cluster);
    assert_eq!(meta["chain_id"], 8453);
    assert_eq!(meta["kms_contract_address"], "0x1111111111111111111111111111111111111111");
    assert_eq!((&meta["gateway_app_id"], &meta["app_auth_implementation"]), (&json!("of-the-authority"), &json!("0xapp")));

    let app = cluster.measure("web", &compose_file(cluster.dir(), "web", "alpine:3"), MachineKind::Tdx).unwrap();
    let workload = Workload::boot(&cluster, "web", &app);
    let mut id = [0; 32];
    hex::decode_to_slice(&cluster.cluster_id, &mut id).unwrap();
    let certificate = guests.certificate(&ClusterId(id), &workload);
    let mut w = World { cluster, guests, app, workload, certificate };
    w.refused(1, "APP_UNKNOWN");
    assert_eq!(authority.asked().len(), 0, "nothing is delegated yet");

    let mut delegate = w.cluster.policy("propose").unwrap();
    delegate.args(["--delegation", "--ask-authority", "--name", "by-authority", "--platform", "tdx", "--any-os-image", "--allow-legacy"]);
    delegate.args(["--class", "disk,env,k256,p256,custom", "--path", "prefix:"]);
    let told = run(&mut delegate).unwrap();
    assert!(told.contains("LEAVE TO THE AUTHORITY"), "{told}");
    assert_eq!(value(&told, "state").unwrap(), "applied");

    // A deploy tool encrypts before the first boot: the app's env key is there for the asking.
    let by_id = json!({"app_id": w.app.app_id});
    let env = w.guests.asked(&mut w.cluster, 2, "GetAppEnvEncryptPubKey", Some(&by_id), &[]);
    assert_eq!(authority.asked().len(), 0, "no guest, no question");

    // The operator of the authority registers what the guest shows, as its reasons tell.
    w.refused(1, "App not allowed: Boot denied: OS image is not allowed");
    let shown = authority.asked().pop().unwrap();
    assert_eq!(shown["appId"], w.app.app_id.as_str());
    assert_eq!((shown["composeHash"].as_str(), shown["teeVariant"].as_str()), (Some(w.app.compose_hash.as_str()), Some("dstack-tdx")));
    assert_eq!(shown["osImageHash"], IMAGE);
    authority.change(|lists| _ = lists.os_images.insert(IMAGE.to_owned()));
    w.refused(1, "App not allowed: Boot denied: app not registered");
    let (app_id, hash) = (w.app.app_id.clone(), w.app.compose_hash.clone());
    let allow = move |lists: &mut Lists| _ = lists.apps.insert(app_id.clone(), BTreeSet::from([hash.clone()]));
    authority.change(&allow);
    let keys = w.served(1);
    assert_eq!((&keys["gateway_app_id"], &keys["tproxy_app_id"]), (&json!("of-the-authority"), &json!("of-the-authority")));
    assert_eq!(keys["os_image_hash"], IMAGE);
    let secret: [u8; 32] = hex::decode(keys["env_crypt_key"].as_str().unwrap()).unwrap().try_into().unwrap();
    let public = x25519_dalek::x25519(secret, x25519_dalek::X25519_BASEPOINT_BYTES);
    assert_eq!(env["public_key"], hex::encode(public), "the key that was asked for before the boot");
    assert_eq!(w.served(3)["disk_crypt_key"], keys["disk_crypt_key"], "any node");

    // An agent of the same app, in mode C.
    let agent = AgentSpec { machine: "web", device: None, app: &w.app, app_id: None, instance_seed: None, name: "agent" };
    let agent = Agent::start(&w.cluster, &agent).unwrap();
    agent.stop().unwrap();

    // What the authority takes back ends with the leases.
    authority.change(|lists| lists.apps.clear());
    w.refused(1, "App not allowed: Boot denied: app not registered");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    w.native_refused(&runtime, RefusalCode::AuthorityDenied);
    authority.change(&allow);
    assert_eq!(w.served(1)["disk_crypt_key"], keys["disk_crypt_key"]);

    // Silence is a no, told by its code; and over when the authority is back.
    let (port, lists) = (authority.port(), authority.lists());
    drop(authority);
    w.refused(1, "AUTHORITY_UNAVAILABLE");
    let status = w.cluster.node(1).status().unwrap();
    assert_eq!((&status["authority"]["answers"], &status["state"]["delegation"]["adopted"]), (&json!(false), &json!(1)));
    authority = soon("the port", || AuthSimple::start(port, lists.clone()).map_err(|error| error.to_string()));
    assert_eq!(w.served(1)["disk_crypt_key"], keys["disk_crypt_key"]);
    assert!(w.cluster.node(1).metric("kms_actors_authority_total{outcome=\"yes\"}").unwrap() >= 1.0);

    // A node that starts anew finds delegation and adopted app in its state.
    w.cluster.node(2).kill();
    w.cluster.node(2).start().unwrap();
    w.cluster.wait_ready(Duration::from_secs(60)).unwrap();
    assert_eq!(w.served(2)["disk_crypt_key"], keys["disk_crypt_key"]);

    // The operators' word ends it at once, while the authority still says yes.
    assert_eq!(value(&run(w.cluster.policy("revoke").unwrap().arg("--delegation")).unwrap(), "state").unwrap(), "applied");
    w.refused(1, "DELEGATION_REVOKED");
    assert!(!authority.asked().is_empty());
    crate::releases::audit_verifies(&mut w.cluster);
}
