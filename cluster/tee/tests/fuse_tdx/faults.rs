//! Bad days: every errno of the interface, hosts that lie, processes that interfere or die.

use super::guest::Td;
use dstack_tee::tdx::{QUOTE_BYTES_MAX, Tsm, TsmError};
use dstack_tee::{Device, TeeError, open};
use dstack_testkit::tsm::Fault;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const EIO: i32 = 5;
const ENXIO: i32 = 6;
const EINTR: i32 = 4;
const EACCES: i32 = 13;
const EBUSY: i32 = 16;
const EINVAL: i32 = 22;
const ENOTTY: i32 = 25;
const EFBIG: i32 = 27;
const ENOMEM: i32 = 12;
const ETIMEDOUT: i32 = 110;

#[test]
fn every_errno_has_its_own_error_and_leaves_no_entry() {
    let Some(td) = Td::new() else { return };
    let tsm = td.tsm();
    for (fault, expected) in [
        (Fault::Outblob(EIO), TsmError::HostRefused),
        (Fault::Outblob(ETIMEDOUT), TsmError::HostTimeout),
        (Fault::Outblob(ENOTTY), TsmError::ProviderGone),
        (Fault::Outblob(EINVAL), TsmError::Malformed),
        (Fault::Outblob(EFBIG), TsmError::TooLarge { limit_bytes: QUOTE_BYTES_MAX }),
        (Fault::Endless, TsmError::TooLarge { limit_bytes: QUOTE_BYTES_MAX }),
        (Fault::Empty, TsmError::Empty),
        (Fault::Mkdir(ENXIO), TsmError::NoProvider),
        (Fault::Mkdir(EACCES), TsmError::Denied { path: td.mounted.tsm_root().join("report").display().to_string() }),
    ] {
        td.mounted.inject(fault.clone());
        assert_eq!(tsm.quote(&[1; 64]), Err(expected), "{fault:?}");
        assert_eq!((td.mounted.pending_faults(), td.mounted.entries().len()), (0, 0), "{fault:?}");
        // the next request is served
        assert!(tsm.quote(&[1; 64]).is_ok(), "{fault:?}");
    }
    td.mounted.inject(Fault::Outblob(ENOMEM));
    assert!(matches!(tsm.quote(&[1; 64]), Err(TsmError::System { errno: ENOMEM, .. })));
}

#[test]
fn interruptions_and_a_busy_host_are_waited_out_but_not_for_ever() {
    let Some(td) = Td::new() else { return };
    let tsm = td.tsm();
    for _ in 0..5 {
        td.mounted.inject(Fault::Outblob(EINTR));
    }
    td.mounted.inject(Fault::Outblob(EBUSY));
    td.mounted.inject(Fault::Outblob(EBUSY));
    assert_eq!(tsm.quote(&[2; 64]).unwrap()[568..632], [2; 64]);
    assert_eq!(td.mounted.pending_faults(), 0);

    let begun = Instant::now();
    for _ in 0..9 {
        td.mounted.inject(Fault::Outblob(EBUSY));
    }
    let busy = tsm.quote(&[2; 64]).unwrap_err();
    assert!(matches!(busy, TsmError::Busy { waited_ms } if waited_ms > 1000), "{busy}");
    assert!(begun.elapsed() < Duration::from_secs(30));
    for _ in 0..33 {
        td.mounted.inject(Fault::Outblob(EINTR));
    }
    assert_eq!(tsm.quote(&[2; 64]), Err(TsmError::Interrupted));
    assert!(td.mounted.entries().is_empty());
}

#[test]
fn another_process_in_the_entry_is_noticed_by_the_generation() {
    let Some(td) = Td::new() else { return };
    let tsm = td.tsm();
    for fault in [Fault::WriteBefore, Fault::WriteAfter, Fault::LostCommit, Fault::Removed] {
        td.mounted.inject(fault.clone());
        assert_eq!(tsm.quote(&[3; 64]).unwrap()[568..632], [3; 64], "{fault:?}");
        assert_eq!((td.mounted.pending_faults(), td.mounted.entries().len()), (0, 0), "{fault:?}");
    }
    for _ in 0..5 {
        td.mounted.inject(Fault::WriteBefore);
    }
    let given_up = tsm.quote(&[3; 64]).unwrap_err();
    assert!(matches!(given_up, TsmError::Disturbed { tries: 5, .. }), "{given_up}");
}

#[test]
fn a_quote_of_other_report_data_is_never_handed_out() {
    let Some(td) = Td::new() else { return };
    let device = td.device("");
    td.mounted.inject(Fault::OtherReportData);
    assert_eq!(device.evidence([4; 64]), Err(TeeError::BadEvidence { why: "is bound to other report data" }));
    assert!(td.verify(&device.evidence([4; 64]).unwrap()).is_ok());
}

#[test]
fn a_machine_without_a_tds_driver_is_refused_at_start() {
    let Some(td) = Td::new() else { return };
    td.mounted.set_provider(None);
    assert_eq!(open(&td.text("")).unwrap_err(), TeeError::Tsm(TsmError::NoProvider));
    td.mounted.set_provider(Some("sev_guest"));
    assert_eq!(open(&td.text("")).unwrap_err(), TeeError::Tsm(TsmError::WrongProvider { got: "sev_guest".into() }));
    assert!(td.mounted.entries().is_empty());
}

#[test]
fn the_emulation_refuses_what_the_kernel_refuses() {
    let Some(td) = Td::new() else { return };
    let entry = td.mounted.tsm_root().join("report/mine");
    let errno = |result: std::io::Result<()>| result.unwrap_err().raw_os_error();
    std::fs::create_dir(&entry).unwrap();
    assert_eq!(errno(std::fs::create_dir(&entry)), Some(17));
    assert_eq!(errno(std::fs::read(entry.join("outblob")).map(drop)), Some(EINVAL), "no inblob yet");
    assert_eq!(errno(std::fs::write(entry.join("inblob"), [0; 65])), Some(EFBIG));
    std::fs::write(entry.join("inblob"), [0; 32]).unwrap();
    assert_eq!(errno(std::fs::read(entry.join("outblob")).map(drop)), Some(EINVAL), "32 bytes are none of TDX");
    assert_eq!(std::fs::read_to_string(entry.join("generation")).unwrap(), "1\n");
    assert_eq!(errno(std::fs::read(entry.join("inblob")).map(drop)), Some(EACCES));
    assert_eq!(errno(std::fs::remove_file(entry.join("inblob"))), Some(1));
    assert!(std::fs::write(entry.join("other"), []).is_err());
    assert_eq!(td.mounted.entries(), ["mine"]);
    // one that somebody left behind hinders nobody
    assert!(td.tsm().quote(&[1; 64]).is_ok());
    assert_eq!(td.mounted.entries(), ["mine"]);
    std::fs::remove_dir(&entry).unwrap();
    assert!(td.mounted.entries().is_empty());
}

/// Not a test of its own: [`a_killed_client_hinders_nobody`] runs it in a process that it kills.
#[test]
#[ignore = "the client that another test kills"]
fn client_in_a_process_of_its_own() {
    #[allow(clippy::disallowed_methods, reason = "told by the parent test")]
    let root = std::env::var("DSTACK_TEST_TSM_ROOT").unwrap();
    let quote = Tsm::at(Path::new(&root)).quote(&[5; 64]);
    panic!("it was to be killed during the request, which ended: {:?}", quote.map(|quote| quote.len()));
}

#[test]
fn a_killed_client_hinders_nobody() {
    let Some(td) = Td::new() else { return };
    td.mounted.inject(Fault::Slow(Duration::from_secs(2)));
    let mut client = Command::new(own_program())
        .args(["--exact", "faults::client_in_a_process_of_its_own", "--ignored"])
        .env("DSTACK_TEST_TSM_ROOT", td.mounted.tsm_root())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while td.mounted.quotes() == 0 {
        assert!(Instant::now() < deadline, "the client asked for no quote");
        assert!(client.try_wait().unwrap().is_none(), "the client ended before its quote");
        std::thread::sleep(Duration::from_millis(5));
    }
    client.kill().unwrap();
    assert!(!client.wait().unwrap().success());
    assert_eq!(td.mounted.entries().len(), 1, "its entry stays behind");
    let tsm = td.tsm();
    for count in 0..5 {
        assert_eq!(tsm.quote(&[count; 64]).unwrap()[568..632], [count; 64]);
    }
    assert_eq!(td.mounted.entries().len(), 1);
}

fn own_program() -> PathBuf {
    std::env::current_exe().unwrap()
}
