//! A machine of Google Cloud: a software TD by FUSE, a real vTPM with the cloud's key, firmware that has measured. How its evidence is
//! judged.

use super::guest::Td;
use super::pki::AkAuthority;
use super::process::Swtpm;
use dstack_attest::{AttestError, CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity, VerifyContext, verify};
use dstack_runtime::clock::{Clock, SystemClock};
use dstack_tee::options::Options;
use dstack_tee::tpm::GcpDevice;
use sha2::{Digest as _, Sha256};

/// A machine of Google Cloud. The order is that in which its parts end.
pub(crate) struct Machine {
    pub(crate) td: Td,
    pub(crate) swtpm: Swtpm,
    pub(crate) authority: AkAuthority,
}

impl Machine {
    pub(crate) fn new() -> Option<Self> {
        let (td, swtpm) = (Td::new()?, Swtpm::start()?);
        let authority = AkAuthority::new();
        let key = swtpm.write_template();
        swtpm.write_certificate(&authority.certify(key));
        // the firmware's work: what its log says is what the PCRs hold
        for (pcr, fill) in FIRMWARE_EVENTS {
            swtpm.tpm().extend(pcr, [fill; 32]).unwrap();
        }
        std::fs::write(td.dir.path().join("tpm.log"), firmware_log()).unwrap();
        Some(Self { td, swtpm, authority })
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
        let pool = serde_json::json!({
            "certificates": [hex::encode(&self.authority.intermediate_der)],
            "crls": self.authority.crls.iter().map(hex::encode).collect::<Vec<_>>(),
        });
        let mut bundle: serde_json::Value = serde_json::from_slice(self.td.roots.bundle()).unwrap();
        bundle["x509"] = pool;
        let collateral = CollateralBundle::parse(&serde_json::to_vec(&bundle).unwrap()).unwrap();
        let tcb = TcbPolicy::default().with_google_firmware(&[firmware()]);
        let context = VerifyContext { now: SystemClock::new().now(), roots: &roots, collateral: &collateral, tcb: &tcb };
        verify(evidence, &context)
    }
}

/// PCR 0 after [`FIRMWARE_EVENTS`].
fn firmware() -> [u8; 32] {
    let measured = FIRMWARE_EVENTS.iter().filter(|(pcr, _)| *pcr == 0);
    measured.fold([0; 32], |pcr, (_, fill)| Sha256::digest([pcr, [*fill; 32]].concat()).into())
}

/// PCR and digest of what the firmware measured; PCR 4 is not quoted.
pub(crate) const FIRMWARE_EVENTS: [(u32, u8); 6] = [(0, 1), (0, 2), (2, 3), (4, 4), (2, 5), (2, 6)];

/// The firmware's log in the TCG2 form, banks SHA-1 and SHA-256, with a note that extends nothing.
fn firmware_log() -> Vec<u8> {
    let mut spec = b"Spec ID Event03\0".to_vec();
    spec.extend([0, 0, 0, 0, 0, 2, 0, 2, 2, 0, 0, 0, 4, 0, 20, 0, 0x0b, 0, 32, 0, 0]);
    let mut log = [&0u32.to_le_bytes()[..], &3u32.to_le_bytes(), &[0; 20]].concat();
    log.extend((spec.len() as u32).to_le_bytes());
    log.extend(spec);
    for (pcr, event_type, fill) in [(0, 3u32, 0xee)].into_iter().chain(FIRMWARE_EVENTS.map(|(pcr, fill)| (pcr, 4, fill))) {
        log.extend([pcr.to_le_bytes(), event_type.to_le_bytes(), 2u32.to_le_bytes()].concat());
        log.extend([&[4, 0][..], &[fill; 20], &[0x0b, 0], &[fill; 32]].concat());
        log.extend([3, 0, 0, 0, b'e', b'v', b't']);
    }
    log
}
