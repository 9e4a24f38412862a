//! The demo, as a person runs it with `--keep`: it tells its story, prints how to use the cluster, the documented commands work against
//! it, and it leaves nothing behind.

use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dstack_testkit::cluster::{Binaries, ClusterError, ENDING, Process, until, value};

#[test]
fn the_demo_ends_clean_when_interrupted() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let scratch = tempfile::tempdir().unwrap();
    let mut command = Command::new(Binaries::find().unwrap().path("dstack-testkit").unwrap());
    command.args(["demo", "--keep", "--examples"]).arg(&examples).env("TMPDIR", scratch.path());
    let mut demo = Process::spawn("demo", &command, &scratch.path().join("demo.log")).unwrap();
    let told = until("the demo to be ready", Duration::from_secs(90), || {
        demo.check_running()?;
        let told = demo.log_text();
        if told.contains("KMS_URLS=") && told.ends_with('\n') {
            Ok(told)
        } else {
            Err(ClusterError::Unexpected { from: "demo".to_owned(), got: told })
        }
    })
    .unwrap();
    for part in ["the same keys as before", "COMPOSE_NOT_ALLOWED", "got", "to do:"] {
        assert!(told.contains(part), "{part} is missing in:\n{told}");
    }
    assert_eq!(value(&told, "KMS_URLS").unwrap().split(',').filter(|url| url.starts_with("https://127.0.0.1:")).count(), 3);
    let socket = value(&told, "AGENT_SOCK").unwrap();
    assert!(std::fs::metadata(&socket).unwrap().file_type().is_socket());
    for (name, same_as) in [("DSTACK_SIMULATOR_ENDPOINT", "AGENT_SOCK"), ("TAPPD_SIMULATOR_ENDPOINT", "TAPPD_SOCK")] {
        assert_eq!(value(&told, name).unwrap(), value(&told, same_as).unwrap());
    }
    assert!(std::fs::metadata(value(&told, "TAPPD_SOCK").unwrap()).unwrap().file_type().is_socket());
    let dir = Path::new(&socket).parent().unwrap().to_owned();
    assert!(processes_naming(&dir) >= 5, "device, three nodes, agent");

    // What a person types next.
    let printed = ["KMS", "APP_ID", "AGENT_SOCK"].map(|name| (name, value(&told, name).unwrap()));
    crate::by_hand::follow("dstack-compat.md", "By hand", &printed);

    let status = demo.terminate(ENDING).unwrap();
    assert!(status.success(), "{status}: {}", demo.log_text());
    assert_eq!(processes_naming(&dir), 0);
    assert!(!dir.exists(), "files are left in {}", dir.display());
}

/// Processes whose command line names a directory.
fn processes_naming(dir: &Path) -> usize {
    let needle = dir.to_str().unwrap();
    let pids = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit()));
    pids.filter(|pid| std::fs::read(pid.path().join("cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(needle))).count()
}
