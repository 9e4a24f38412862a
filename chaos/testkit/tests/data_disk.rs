//! The data disk of a guest in a machine that has device-mapper: `dstack-util setup` with keys of a cluster of processes formats, opens and
//! mounts a real LUKS2 disk, finds it again after a power cycle, and refuses what is not its own.
//!
//! Needs the kit that `cargo xtask test` builds once and keeps; without it the test says so and ends, in CI it fails.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::PathBuf;

use dstack_testkit::cluster::{App, Cluster, ClusterSpec, MachineKind};
use dstack_testkit::qemu::{DiskMachine, Kit, Report, run_with_disk};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// The emulated TD, as the machine sees it.
const TEE: &str = "/run/tee.sock";
/// More than the header, and a small file system.
const DISK_BYTES: u64 = 96 << 20;
const SWAP_BYTES: u64 = 8 << 20;
/// What the app keeps.
const NOTE: &str = "kept by the app on its data disk";

struct Setting {
    kit: Kit,
    cluster: Cluster,
    app: App,
    disk: PathBuf,
}

/// A folder of the host's files: name, document, seed of the instance.
type Share<'a> = (&'a str, &'a [u8], u8);

impl Setting {
    fn new(kit: Kit) -> Self {
        let guests = vec![("web".to_owned(), MachineKind::Tdx)];
        let cluster = Cluster::start(&ClusterSpec { guests, ..ClusterSpec::default() }).unwrap();
        let compose = cluster.dir().join("web.yml");
        fs::write(&compose, "services:\n  web:\n    image: alpine:3\n").unwrap();
        let app = cluster.measure("web", &compose, MachineKind::Tdx).unwrap();
        let disk = cluster.dir().join("disk.img");
        fs::File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
        Self { kit, cluster, app, disk }
    }

    /// The measured document with these members as well.
    fn document(&self, more: Value) -> Vec<u8> {
        let mut document: Value = serde_json::from_slice(&fs::read(&self.app.compose).unwrap()).unwrap();
        document.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        document.to_string().into_bytes()
    }

    /// Powers a machine on, runs `programs`, powers it off.
    fn boot(&self, name: &str, shares: &[Share<'_>], programs: &[&[&str]]) -> Report {
        let device = &self.cluster.device;
        let [tdx_root, nitro_root] = device.roots().map(|file| fs::read(file).unwrap());
        let collateral = fs::read(device.collateral()).unwrap();
        let config = json!({ "kms_urls": self.cluster.kms_urls().split(',').collect::<Vec<_>>() }).to_string().into_bytes();
        let mut files: Vec<(String, Vec<u8>)> = vec![
            ("tdx-root.der".to_owned(), tdx_root),
            ("nitro-root.der".to_owned(), nitro_root),
            ("collateral.json".to_owned(), collateral),
        ];
        for (share, document, seed) in shares {
            let info = json!({ "instance_id_seed": hex::encode([*seed; 20]), "app_id": self.app.app_id });
            files.push((format!("{share}/app-compose.json"), document.to_vec()));
            files.push((format!("{share}/.sys-config.json"), config.clone()));
            files.push((format!("{share}/.instance_info"), info.to_string().into_bytes()));
        }
        let files: Vec<(&str, &[u8])> = files.iter().map(|(name, content)| (name.as_str(), content.as_slice())).collect();
        let allowed: Vec<String> = self.cluster.kms_urls().split(',').map(|url| url.trim_start_matches("https://").to_owned()).collect();
        let machine = DiskMachine {
            programs,
            files: &files,
            relays: &[(TEE, &device.socket("web"))],
            allowed: &allowed,
            disk: &self.disk,
            dir: self.cluster.dir().join(name),
        };
        let forwarder = self.cluster.binaries.path("dstack-util").unwrap();
        let report = run_with_disk(&self.kit, &forwarder, &machine).unwrap();
        assert!(!report.has("failed"), "{}", report.console);
        report
    }
}

/// `dstack-util setup` of a share, with the machine's disk.
fn setup(share: &str) -> Vec<String> {
    let words = "/app/dstack-util setup --device /dev/vda --mount-point /data --proxy vsock:2:3128 --software-root /app/tdx-root.der \
                 --software-root /app/nitro-root.der --collateral /app/collateral.json --patience-s 60";
    let mut words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
    words.extend(["--tee".to_owned(), format!("software:{TEE}")]);
    words.extend(["--work-dir".to_owned(), format!("/guest/{share}"), "--host-shared".to_owned(), format!("/app/{share}")]);
    words
}

fn shell(script: &str) -> Vec<String> {
    ["/usr/bin/sh", "-ec", script].map(str::to_owned).to_vec()
}

#[test]
fn a_disk_is_made_once_opened_again_and_kept_from_others() {
    let Some(kit) = Kit::find().unwrap() else {
        assert!(std::env::var_os("CI").is_none(), "CI runs the machine: `cargo xtask test` prepares it");
        eprintln!("SKIPPED: no kit; `cargo xtask test` builds one");
        return;
    };
    let setting = Setting::new(kit);
    let more = |file_system: &str| json!({ "storage_fs": file_system, "swap_size": SWAP_BYTES, "secure_time": false });
    let (ext4, zfs) = (setting.document(more("ext4")), setting.document(more("zfs")));
    let hashes = [&ext4, &zfs].map(|document| hex::encode(Sha256::digest(document)));
    assert_eq!(setting.cluster.register(&setting.app, &hashes.each_ref().map(String::as_str)).unwrap(), "applied");
    let own: Share<'_> = ("own", &ext4, 1);
    let run = |name: &str, shares: &[Share<'_>], programs: &[Vec<String>]| {
        let programs: Vec<Vec<&str>> = programs.iter().map(|words| words.iter().map(String::as_str).collect()).collect();
        let programs: Vec<&[&str]> = programs.iter().map(Vec::as_slice).collect();
        setting.boot(name, shares, &programs)
    };
    let close = shell("swapoff /data/.swap; umount /data; cryptsetup close dstack_data_disk; sync");

    // a blank disk; zfs, which this kernel has not, leaves it blank
    let refused: Share<'_> = ("zfs", &zfs, 1);
    let look = format!("cat /sys/block/dm-0/dm/name /sys/block/dm-0/dm/uuid /proc/mounts /proc/swaps; echo '{NOTE}' > /data/note");
    let first = run("m1", &[own, refused], &[setup("zfs"), setup("own"), setup("own"), shell(&look), close.clone()]);
    assert_eq!(first.all("exit"), "1\n0\n0\n0\n0", "{}", first.console);
    let said = first.all("said");
    for words in ["setup step 9 (data disk): storage_fs is zfs, but this kernel has none", "new=true", "this boot has its keys already"] {
        assert!(said.contains(words), "no {words:?} in {said}");
    }
    assert!(said.find("storage_fs is zfs") < said.find("new=true"), "the refusal came first and left the disk blank: {said}");
    let printed = first.all("printed");
    for words in ["dstack_data_disk", "CRYPT-LUKS2-", "/dev/mapper/dstack_data_disk /data ext4 rw,nosuid,nodev", "/data/.swap"] {
        assert!(printed.contains(words), "no {words:?} in {printed}");
    }

    // what lies on the disk is no plain text
    let image = fs::read(&setting.disk).unwrap();
    assert!(image.starts_with(b"LUKS\xba\xbe\x00\x02"), "LUKS2");
    assert!(!image.windows(NOTE.len()).any(|bytes| bytes == NOTE.as_bytes()));

    // the next boot: another instance's key is refused before anything is opened, our own finds what was kept
    let other: Share<'_> = ("other", &ext4, 2);
    let second = run("m2", &[own, other], &[setup("other"), setup("own"), shell("cat /data/note /proc/swaps"), close]);
    assert_eq!(second.all("exit"), "1\n0\n0\n0", "{}", second.console);
    let said = second.all("said");
    assert!(said.contains("setup step 9 (data disk): the disk key does not open /dev/vda"), "{said}");
    assert!(said.contains("new=false") && !said.contains("new=true"), "{said}");
    let printed = second.all("printed");
    assert!(printed.contains(NOTE) && printed.contains("/data/.swap"), "{printed}");
}
