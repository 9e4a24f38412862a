//! An emulated TD with all files of a guest, and how its evidence is judged.

use dstack_attest::wire::{Attestation, EventVersion, RuntimeEvent};
use dstack_attest::{AttestError, CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity, VerifyContext, verify};
use dstack_runtime::clock::{Clock, SystemClock};
use dstack_tee::options::Options;
use dstack_tee::tdx::{TdxDevice, Tsm};
use dstack_testkit::tsm::{Mounted, SoftwareTd, mount};
use dstack_testkit::{Measured, SoftwareRoots};
use std::path::PathBuf;

/// A mounted TD. The mount goes before the directory.
pub(crate) struct Td {
    pub(crate) mounted: Mounted,
    pub(crate) roots: SoftwareRoots,
    pub(crate) dir: tempfile::TempDir,
}

impl Td {
    /// `None` on a machine that cannot mount: said, and a failure under CI.
    pub(crate) fn new() -> Option<Self> {
        Self::booted(|td| td)
    }

    pub(crate) fn booted(boot: impl FnOnce(SoftwareTd) -> SoftwareTd) -> Option<Self> {
        Self::of(SoftwareRoots::generate(SystemClock::new().now()).unwrap(), boot)
    }

    /// On a machine under these roots.
    pub(crate) fn of(roots: SoftwareRoots, boot: impl FnOnce(SoftwareTd) -> SoftwareTd) -> Option<Self> {
        if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") {
            #[allow(clippy::disallowed_methods, reason = "whether tests may be left out is CI's to say")]
            let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
            assert!(!ci, "/dev/fuse: {error}; CI has to have it");
            eprintln!("left out: /dev/fuse: {error}");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("mnt");
        std::fs::create_dir(&at).unwrap();
        let td = boot(SoftwareTd::new("machine", &roots, &Measured::executable(b"a node")).unwrap());
        Some(Self { mounted: mount(&at, td).unwrap(), roots, dir })
    }

    pub(crate) fn tsm(&self) -> Tsm {
        Tsm::at(&self.mounted.tsm_root())
    }

    pub(crate) fn events(&self) -> PathBuf {
        self.dir.path().join("runtime_events.log")
    }

    /// The text of a config.
    pub(crate) fn text(&self, more: &str) -> String {
        let (root, rtmr) = (self.mounted.tsm_root(), self.mounted.measurements());
        format!("tdx:{};rtmr={};events={}{more}", root.display(), rtmr.display(), self.events().display())
    }

    pub(crate) fn device(&self, more: &str) -> TdxDevice {
        TdxDevice::open(&Options::parse(&self.text(more)).unwrap()).unwrap()
    }

    pub(crate) fn verify(&self, evidence: &[u8]) -> Result<VerifiedIdentity, AttestError> {
        let roots = TrustRoots::none().with_software_root(self.roots.tdx_root_der()).unwrap();
        let collateral = CollateralBundle::parse(self.roots.bundle()).unwrap();
        let now = SystemClock::new().now();
        verify(evidence, &VerifyContext { now, roots: &roots, collateral: &collateral, tcb: &TcbPolicy::default() })
    }
}

pub(crate) fn event(name: &str, payload: &[u8], version: EventVersion) -> RuntimeEvent {
    RuntimeEvent { event: name.to_owned(), payload: payload.to_vec(), version }
}

/// How often runtime events stand in evidence.
pub(crate) fn runtime_events(evidence: &[u8]) -> usize {
    Attestation::decode(evidence).unwrap().runtime_events.len()
}
