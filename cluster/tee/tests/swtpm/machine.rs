//! A machine of Google Cloud: a software TD by FUSE, a real vTPM with the cloud's key, firmware that has measured. How its evidence is
//! judged.

use super::guest::Td;
use super::pki::AkAuthority;
use super::process::Swtpm;
use dstack_attest::{AttestError, CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity, VerifyContext, verify};
use dstack_runtime::clock::{Clock, SystemClock};
use dstack_tee::options::Options;
use dstack_tee::tpm::GcpDevice;
use dstack_testkit::SoftwareRoots;
use std::rc::Rc;

/// A machine of Google Cloud. The order is that in which its parts end.
pub(crate) struct Machine {
    pub(crate) td: Td,
    pub(crate) swtpm: Swtpm,
    pub(crate) authority: Rc<AkAuthority>,
}

impl Machine {
    pub(crate) fn new() -> Option<Self> {
        Self::of(SoftwareRoots::generate(SystemClock::new().now()).unwrap(), &Rc::new(AkAuthority::new()))
    }

    /// Under these roots, its vTPM's key certified by this authority.
    pub(crate) fn of(roots: SoftwareRoots, authority: &Rc<AkAuthority>) -> Option<Self> {
        Self::with_firmware(roots, authority, GOOGLE_FIRMWARE_V2)
    }

    /// The same above a firmware that logs these digests in PCR 0.
    pub(crate) fn with_firmware(roots: SoftwareRoots, authority: &Rc<AkAuthority>, firmware: [&str; 3]) -> Option<Self> {
        let events = firmware_events(firmware);
        let (td, swtpm) = (Td::of(roots, |td| td)?, Swtpm::start()?);
        let key = swtpm.write_template();
        swtpm.write_certificate(&authority.certify(key));
        // the firmware's work: what its log says is what the PCRs hold
        for (pcr, digest) in &events {
            swtpm.tpm().extend(*pcr, *digest).unwrap();
        }
        std::fs::write(td.dir.path().join("tpm.log"), firmware_log(&events)).unwrap();
        Some(Self { td, swtpm, authority: Rc::clone(authority) })
    }

    pub(crate) fn text(&self) -> String {
        let log = self.td.dir.path().join("tpm.log");
        self.td.text(&format!(";tpm={};tpm-log={}", self.swtpm.tcti(), log.display())).replacen("tdx:", "gcp:", 1)
    }

    pub(crate) fn device(&self) -> GcpDevice {
        GcpDevice::open(&Options::parse(&self.text()).unwrap()).unwrap()
    }

    /// Judges evidence as a node does whose roots are this machine's.
    pub(crate) fn verify(&self, evidence: &[u8]) -> Result<VerifiedIdentity, AttestError> {
        let roots = TrustRoots::none().with_software_root(self.td.roots.tdx_root_der()).unwrap();
        let roots = roots.with_software_root(&self.authority.root_der).unwrap();
        let collateral = CollateralBundle::parse(&self.authority.beside(self.td.roots.bundle())).unwrap();
        let tcb = TcbPolicy::default();
        let context = VerifyContext { now: SystemClock::new().now(), roots: &roots, collateral: &collateral, tcb: &tcb };
        verify(evidence, &context)
    }
}

/// SHA-256 of the three events behind PCR 0 of Google's firmware version 2, as real machines log them: the version's text, what is not of
/// the host, the separator.
pub(crate) const GOOGLE_FIRMWARE_V2: [&str; 3] = [
    "fa129a8f82b65bcbce8f9e8e5f6de509beff9b1df33714116bf918c5a3bba45d",
    "b20ec425e0cea851df1ae32f426cff2e4b8e50e77883b8e9890dcf5369f90e1f",
    "df3f619804a92fdb4057192dc43dd748ea778adc52bc498ce80524c014b81119",
];

/// PCR and digest of what the firmware measured; PCR 4 is not quoted.
fn firmware_events(firmware: [&str; 3]) -> Vec<(u32, [u8; 32])> {
    let version = firmware.map(|digest| (0, hex::decode(digest).unwrap().try_into().unwrap()));
    version.into_iter().chain([(2, 3), (4, 4), (2, 5), (2, 6)].map(|(pcr, fill)| (pcr, [fill; 32]))).collect()
}

/// The firmware's log in the TCG2 form, banks SHA-1 and SHA-256, with a note that extends nothing.
fn firmware_log(events: &[(u32, [u8; 32])]) -> Vec<u8> {
    let mut spec = b"Spec ID Event03\0".to_vec();
    spec.extend([0, 0, 0, 0, 0, 2, 0, 2, 2, 0, 0, 0, 4, 0, 20, 0, 0x0b, 0, 32, 0, 0]);
    let mut log = [&0u32.to_le_bytes()[..], &3u32.to_le_bytes(), &[0; 20]].concat();
    log.extend((spec.len() as u32).to_le_bytes());
    log.extend(spec);
    let extending = events.iter().map(|(pcr, digest)| (*pcr, 4, *digest));
    for (pcr, event_type, digest) in [(0, 3u32, [0xee; 32])].into_iter().chain(extending) {
        log.extend([pcr.to_le_bytes(), event_type.to_le_bytes(), 2u32.to_le_bytes()].concat());
        log.extend([&[4, 0][..], &digest[..20], &[0x0b, 0], &digest].concat());
        log.extend([3, 0, 0, 0, b'e', b'v', b't']);
    }
    log
}
