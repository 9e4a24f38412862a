//! A TD whose registers can be extended. Owns: its report, the quoting enclave that signs it. Never: serves a file.

use sha2::{Digest as _, Sha384};

use crate::error::TestkitError;
use crate::measure::Measured;
use crate::roots::SoftwareRoots;
use crate::tdx::{QuoteFormat, QuotingEnclave, TdReport};

/// A TD on the emulated machine of one name.
pub struct SoftwareTd {
    enclave: QuotingEnclave,
    format: QuoteFormat,
    report: TdReport,
}

impl SoftwareTd {
    /// A TD right after its firmware has handed over: boot registers as `measured` says, RTMR3 zero.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`].
    pub fn new(name: &str, roots: &SoftwareRoots, measured: &Measured) -> Result<Self, TestkitError> {
        let enclave = roots.quoting_enclave(name, roots.platform(name), roots.validity())?;
        let registers = measured.td_registers();
        let [rtmr0, rtmr1, rtmr2, _] = registers.rtmr;
        let mut report = enclave.report();
        report.mrtd = registers.mrtd;
        report.rtmr = [rtmr0, rtmr1, rtmr2, [0; 48]];
        Ok(Self { enclave, format: QuoteFormat::V4, report })
    }

    /// With other boot registers RTMR0 to RTMR2, those of a firmware log for one.
    #[must_use]
    pub fn booted(mut self, registers: [[u8; 48]; 3]) -> Self {
        let [rtmr0, rtmr1, rtmr2] = registers;
        let [_, _, _, rtmr3] = self.report.rtmr;
        self.report.rtmr = [rtmr0, rtmr1, rtmr2, rtmr3];
        self
    }

    /// What the TDX module reports.
    #[must_use]
    pub fn report(&self) -> &TdReport {
        &self.report
    }

    /// Extends a runtime register; false for one that does not exist.
    pub(super) fn extend(&mut self, register: usize, digest: &[u8; 48]) -> bool {
        match self.report.rtmr.get_mut(register) {
            Some(value) => {
                *value = Sha384::new().chain_update(*value).chain_update(digest).finalize().into();
                true
            }
            None => false,
        }
    }

    /// A quote over `report_data`.
    pub(super) fn quote(&self, report_data: [u8; 64]) -> Vec<u8> {
        self.enclave.quote(&TdReport { report_data, ..self.report.clone() }, self.format)
    }
}
