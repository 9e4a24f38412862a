//! An enclave in QEMU and a cluster of processes: what the image proves decides whether it gets keys, over vsock and nothing else.
//!
//! Needs the kit that `cargo xtask test` builds once and keeps; without it the test says so and ends, in CI it fails.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};

use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_testkit::SoftwareRoots;
use dstack_testkit::cluster::{App, Cluster, ClusterError, ClusterSpec, MachineKind};
use dstack_testkit::eif::Image;
use dstack_testkit::nitro::EnclaveHost;
use dstack_testkit::qemu::{Enclave, Kit, Report, run_and_meet};

/// A file of the image that nothing reads.
const NOTE: &[u8] = b"build 1\n";

struct Setting {
    kit: Kit,
    cluster: Cluster,
    app: App,
    host: EnclaveHost,
}

impl Setting {
    fn new(kit: Kit) -> Self {
        let cluster = Cluster::start(&ClusterSpec { guests: Vec::new(), ..ClusterSpec::default() }).unwrap();
        let compose = cluster.dir().join("vault.yml");
        fs::write(&compose, "services:\n  vault:\n    image: alpine:3\n").unwrap();
        let app = cluster.measure("vault", &compose, MachineKind::Nitro).unwrap();
        let roots = SoftwareRoots::load(&cluster.dir().join("roots")).unwrap();
        let host = roots.enclave_host("qemu").unwrap();
        Self { kit, cluster, app, host }
    }

    /// The image of the app: program, measured files, what to run.
    fn image(&self, note: &[u8]) -> Image {
        let urls = self.cluster.kms_urls();
        let words = [
            "/app/dstack-util",
            "get-keys",
            "--device",
            "nsm",
            "--proxy",
            "vsock:2:3128",
            "--kms-url",
            &urls,
            "--app-id",
            &self.app.app_id,
            "--compose",
            "/app/app-compose.json",
            "--software-root",
            "/app/tdx-root.der",
            "--software-root",
            "/app/nitro-root.der",
            "--collateral",
            "/app/collateral.json",
            "--output",
            "/tmp/keys.json",
            "--kcv-file",
            "/tmp/kcv.json",
            "--patience-s",
            "45",
        ];
        let device = &self.cluster.device;
        let [tdx_root, nitro_root] = device.roots().map(|file| fs::read(file).unwrap());
        let (compose, collateral) = (fs::read(&self.app.compose).unwrap(), fs::read(device.collateral()).unwrap());
        let files: [(&str, &[u8]); 5] = [
            ("app-compose.json", &compose),
            ("tdx-root.der", &tdx_root),
            ("nitro-root.der", &nitro_root),
            ("collateral.json", &collateral),
            ("note", note),
        ];
        self.kit.image(&[&words], &files).unwrap()
    }

    /// Allows an image: as OS image and as what runs, which is the same in an enclave.
    fn allow(&self, image: &Image) {
        let hash = hex::encode(image.pcrs().image_hash());
        let mut command = self.cluster.policy("propose").unwrap();
        command.args(["--app-id", &self.app.app_id, "--name", "vault", "--platform", "nitro", "--os-image", &hash]);
        command.args(["--class", "disk,env,k256", "--compose-hash", &hash]);
        let out = dstack_testkit::cluster::process::run(&mut command).unwrap();
        assert_eq!(dstack_testkit::cluster::value(&out, "state").unwrap(), "applied");
    }

    fn run(&self, name: &str, image: &Image, host: &EnclaveHost) -> Report {
        self.met(name, image, host, &mut |_, _| Ok(()))
    }

    fn run_and_meet(&self, name: &str, image: &Image, meet: &mut dyn FnMut(&Path, &str)) -> Report {
        self.met(name, image, &self.host, &mut |vsock, console| {
            meet(vsock, console);
            Ok(())
        })
    }

    fn met(&self, name: &str, image: &Image, host: &EnclaveHost, meet: &mut dyn FnMut(&Path, &str) -> Result<(), ClusterError>) -> Report {
        let allowed: Vec<String> = self.cluster.kms_urls().split(',').map(|url| url.trim_start_matches("https://").to_owned()).collect();
        let dir: PathBuf = self.cluster.dir().join(name);
        let forwarder = self.cluster.binaries.path("dstack-util").unwrap();
        let report = run_and_meet(&self.kit, &forwarder, &Enclave { image, host, allowed: &allowed, dir }, meet).unwrap();
        assert!(!report.has("failed"), "{}", report.console);
        report
    }
}

#[test]
fn an_enclave_gets_its_keys_and_a_changed_one_does_not() {
    let Some(kit) = Kit::find().unwrap() else {
        assert!(std::env::var_os("CI").is_none(), "CI runs the enclave: `cargo xtask test` prepares it");
        eprintln!("SKIPPED: no enclave kit; `cargo xtask test` builds one");
        return;
    };
    let setting = Setting::new(kit);
    let image = setting.image(NOTE);
    setting.allow(&image);

    // Booted, measured as computed, limits kept, keys released.
    let first = setting.run("e1", &image, &setting.host);
    println!("{}", first.all("nsm"));
    the_module_is_as_documented(&first, &image, &setting.host);
    assert_eq!(first.all("exit"), "0", "{}", first.console);
    let values = first.all("check-values");
    for class in ["disk", "env", "k256"] {
        assert!(values.contains(&format!("\"{class}\"")), "{values}");
    }

    // The same image boots again: the same keys.
    let second = setting.run("e2", &image, &setting.host);
    assert_eq!((second.all("exit").as_str(), second.all("check-values")), ("0", values), "{}", second.console);

    // One byte of the ramdisk is another: other PCR0 and PCR2, refused by name, and no key.
    let changed = setting.image(b"build 2\n");
    assert_eq!(image.ramdisks[0], changed.ramdisks[0]);
    let differing = image.ramdisks[1].iter().zip(&changed.ramdisks[1]).filter(|(a, b)| a != b).count();
    assert_eq!((differing, image.ramdisks[1].len()), (1, changed.ramdisks[1].len()));
    let refused = setting.run("e3", &changed, &setting.host);
    assert_eq!(refused.all("measurement"), hex::encode(changed.pcrs().measurement()));
    assert_eq!(refused.all("exit"), "3", "{}", refused.console);
    let said = refused.all("said");
    assert!(said.contains("_NOT_ALLOWED") && said.contains("to do: add this"), "{said}");
    assert!(said.contains(&hex::encode(changed.pcrs().image_hash())), "{said}");
    assert!(!refused.has("check-values") && refused.all("printed").is_empty(), "{}", refused.console);

    the_agent_serves_inside(&setting);

    // The allowed image under a root that nobody trusts: no session, and no key.
    let others = SoftwareRoots::generate(SystemClock::new().now()).unwrap();
    let forged = setting.run("e4", &image, &others.enclave_host("qemu").unwrap());
    assert_ne!(forged.all("exit"), "0", "{}", forged.console);
    assert!(!forged.has("check-values"), "{}", forged.console);
}

/// What the first process found: the real driver's answers, and our own limits where the emulated module has none.
fn the_module_is_as_documented(report: &Report, image: &Image, host: &EnclaveHost) {
    let facts = report.all("nsm");
    for part in ["version: (1, 0, 0)", host.module_id(), "max_pcrs: 32", "locked_pcrs: {0, 1, 2,", "digest: \"SHA384\""] {
        assert!(facts.contains(part), "no {part} in {facts}");
    }
    assert_eq!(report.all("measurement"), hex::encode(image.pcrs().measurement()));
    assert_eq!(report.all("image-hash"), hex::encode(image.pcrs().image_hash()));
    assert_ne!(report.all("parent"), "00".repeat(48));
    assert_eq!(report.all("random"), "256");
    assert!(report.all("at-limits").starts_with("document of "), "{}", report.console);
    for (name, text) in [
        ("user-data", "user_data has 513 bytes, the device takes 512"),
        ("nonce", "nonce has 513 bytes, the device takes 512"),
        ("public-key", "public_key has 1025 bytes, the device takes 1024"),
    ] {
        assert_eq!(report.all(&format!("beyond-{name}")), format!("refused: {text}"));
    }
    // The guest's clock is the host's, so certificates mean something there.
    let now = SystemClock::new().now().0 / 1000;
    let clock: u64 = report.all("clock").parse().unwrap();
    assert!(now.abs_diff(clock) < 600, "clock {clock}, now {now}");
}

/// What the host is told to do at the end: a file that the first process waits for.
const OFF: &str = "/tmp/off";
const HOST_PORT: u32 = 8000;

/// The agent in an enclave: keys fetched over vsock and evidence of the NSM by its socket inside, `GuestApi` on vsock for the host.
fn the_agent_serves_inside(setting: &Setting) {
    let device = &setting.cluster.device;
    let [tdx_root, nitro_root] = device.roots().map(|file| fs::read(file).unwrap());
    let (compose, collateral) = (fs::read(&setting.app.compose).unwrap(), fs::read(device.collateral()).unwrap());
    let agent = fs::read(setting.kit.path("dstack-agent").unwrap()).unwrap();
    let urls = setting.cluster.kms_urls().split(',').map(|url| format!("{url:?}")).collect::<Vec<_>>().join(", ");
    let config = format!(
        "device = \"nsm\"\napp_compose = \"/app/app-compose.json\"\nkms_urls = [{urls}]\nstate_dir = \"/tmp/state\"\nproxy = \"vsock:2:3128\"\n\
         [api]\nsocket = \"/run/dstack.sock\"\nhost = \"vsock:{HOST_PORT}\"\n[boot]\napp_id = {:?}\n[log]\nformat = \"pretty\"\n\
         [machine]\npoweroff = [\"/app/dstack-util\", \"rand\", \"-o\", {OFF:?}]\n\
         [trust]\nsoftware_roots = [\"/app/tdx-root.der\", \"/app/nitro-root.der\"]\ncollateral = \"/app/collateral.json\"\n",
        setting.app.app_id
    );
    let report_data = "5a".repeat(64);
    let quote = format!("{{\"report_data\":\"{report_data}\"}}");
    let ask = |path, body| ["ask", "/run/dstack.sock", path, body];
    let key = ask("/GetKey", "{\"path\":\"a\",\"purpose\":\"signing\"}");
    let programs: [&[&str]; 6] = [
        &["start", "/app/dstack-agent", "--config", "/app/agent.toml"],
        &key,
        &ask("/GetQuote", &quote),
        &ask("/Info", "{}"),
        &key,
        &["wait", OFF],
    ];
    let files: [(&str, &[u8]); 6] = [
        ("dstack-agent", &agent),
        ("agent.toml", config.as_bytes()),
        ("app-compose.json", &compose),
        ("tdx-root.der", &tdx_root),
        ("nitro-root.der", &nitro_root),
        ("collateral.json", &collateral),
    ];
    let image = setting.kit.image(&programs, &files).unwrap();
    setting.allow(&image);

    // Once the agent has answered inside, the host asks it over vsock, and has it switch off.
    let mut told = None;
    let report = setting.run_and_meet("e5", &image, &mut |vsock, console| {
        if told.is_none() && console.contains("enclave answered /Info") {
            let info = host_asks(vsock, "Info");
            // The machine may be off before the answer is out of it; that it goes off is what counts.
            let last = host_call(vsock, "Shutdown");
            assert!(last.is_empty() || last.starts_with("HTTP/1.1 200"), "{last}");
            told = Some(info);
        }
    });
    let answered = report.all("answered");
    let whole: Vec<&str> = answered.lines().map(str::trim).collect();
    assert_eq!(whole, ["/GetKey", "/GetQuote", "/Info", "/GetKey"].map(|path| format!("{path} HTTP/1.1 200 OK")), "{}", report.console);
    let keys: Vec<String> = report.all("answer-hash").lines().filter(|line| line.starts_with("/GetKey")).map(str::to_owned).collect();
    assert!(keys.len() == 2 && keys[0] == keys[1], "the same key twice: {keys:?}");
    let answer = report.all("answer");
    assert!(answer.contains(&format!("/Info app_id {}", setting.app.app_id)), "{answer}");
    assert!(told.unwrap().contains("\"version\""), "the host's side answers on vsock");

    // The evidence of the socket is the module's: the image's measurement, the caller's data.
    let attestation = answer.lines().find_map(|line| line.strip_prefix("/GetQuote attestation ")).unwrap();
    let roots = dstack_attest::TrustRoots::none().with_software_root(&nitro_root).unwrap();
    let bundle = dstack_attest::CollateralBundle::parse(&collateral).unwrap();
    let tcb = dstack_attest::TcbPolicy::default();
    let context = dstack_attest::VerifyContext { now: SystemClock::new().now(), roots: &roots, collateral: &bundle, tcb: &tcb };
    let identity = dstack_attest::verify(&hex::decode(attestation.trim()).unwrap(), &context).unwrap();
    assert_eq!((identity.report_data(), identity.app_id().unwrap().to_string()), (&[0x5a; 64], setting.app.app_id.clone()));
    assert_eq!(identity.measurement(), image.pcrs().measurement());
}

/// One call of `GuestApi` by the enclave's vsock that has to succeed; its answer.
fn host_asks(vsock: &std::path::Path, method: &str) -> String {
    let answer = host_call(vsock, method);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

/// One call of `GuestApi` by the enclave's vsock; all that comes back.
fn host_call(vsock: &std::path::Path, method: &str) -> String {
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    let mut stream = std::os::unix::net::UnixStream::connect(vsock).unwrap();
    writeln!(stream, "CONNECT {HOST_PORT}").unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("OK"), "{line:?}");
    write!(
        stream,
        "POST /api/{method} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}"
    )
    .unwrap();
    let mut answer = String::new();
    // A machine that goes off resets the connection; what came before stays.
    let _ = reader.read_to_string(&mut answer);
    answer
}
