//! An enclave in QEMU and a cluster of processes: what the image proves decides whether it gets keys, over vsock and nothing else.
//!
//! Needs the kit that `cargo xtask test` builds once and keeps; without it the test says so and ends, in CI it fails.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::PathBuf;

use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_testkit::SoftwareRoots;
use dstack_testkit::cluster::{App, Cluster, ClusterSpec, MachineKind};
use dstack_testkit::eif::Image;
use dstack_testkit::nitro::EnclaveHost;
use dstack_testkit::qemu::{Enclave, Kit, Report, run};

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
        let allowed: Vec<String> = self.cluster.kms_urls().split(',').map(|url| url.trim_start_matches("https://").to_owned()).collect();
        let dir: PathBuf = self.cluster.dir().join(name);
        let forwarder = self.cluster.binaries.path("dstack-util").unwrap();
        let report = run(&self.kit, &forwarder, &Enclave { image, host, allowed: &allowed, dir }).unwrap();
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
