//! What a PCK certificate says about its platform. Owns: the Intel SGX extension, OID 1.2.840.113741.1.13.1.
//! Source: Intel SGX PCK Certificate and CRL Profile Specification §1.3.5 and §1.3.6.

use crate::der;

/// One emulated platform: identity and security versions. The default is up to date against [`CollateralSpec`]'s default.
///
/// [`CollateralSpec`]: crate::tdx::CollateralSpec
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlatformSpec {
    /// Platform provisioning id: what a seat of the cluster is given to.
    pub ppid: [u8; 16],
    /// Platform instance id (multi-package platforms).
    pub platform_instance_id: [u8; 16],
    /// Family, model, stepping, platform type and SKU: selects the TCB info.
    pub fmspc: [u8; 6],
    /// SVN of each SGX TCB component.
    pub cpu_svn: [u8; 16],
    /// SVN of the provisioning certification enclave.
    pub pce_svn: u16,
    /// Id of the provisioning certification enclave.
    pub pce_id: [u8; 2],
    /// 0 standard, 1 scalable, 2 scalable with integrity.
    pub sgx_type: u8,
    /// SVN of the TDX module (byte 0), its major version (byte 1) and of the late microcode load (byte 2).
    pub tee_tcb_svn: [u8; 16],
    /// ISVSVN of the quoting enclave.
    pub qe_isv_svn: u16,
    /// MRSIGNER of the quoting enclave; the QE identity's is [`QE_MRSIGNER`](crate::tdx::CollateralSpec).
    pub qe_mrsigner: [u8; 32],
}

impl PlatformSpec {
    /// An up-to-date platform with the given ids.
    pub fn new(ppid: [u8; 16], platform_instance_id: [u8; 16]) -> Self {
        Self {
            ppid,
            platform_instance_id,
            fmspc: FMSPC,
            cpu_svn: CPU_SVN,
            pce_svn: PCE_SVN,
            pce_id: [0, 0],
            sgx_type: 1,
            tee_tcb_svn: TEE_TCB_SVN,
            qe_isv_svn: QE_ISV_SVN,
            qe_mrsigner: qe_mrsigner(),
        }
    }

    /// The same platform one TCB recovery behind: the default collateral calls it `OutOfDate`.
    pub fn out_of_date(mut self) -> Self {
        self.cpu_svn = OLD_CPU_SVN;
        self
    }

    /// The same platform at a TCB whose keys leaked: the default collateral calls it `Revoked`.
    pub fn revoked_tcb(mut self) -> Self {
        self.cpu_svn = [0; 16];
        self.pce_svn = 1;
        self
    }

    /// The content of the extension.
    pub(crate) fn sgx_extension(&self) -> Vec<u8> {
        let mut tcb = Vec::new();
        for (component, svn) in (1u64..).zip(self.cpu_svn) {
            tcb.push(entry(&[2, component], der::integer(u16::from(svn))));
        }
        tcb.push(entry(&[2, 17], der::integer(self.pce_svn)));
        tcb.push(entry(&[2, 18], der::octets(&self.cpu_svn)));
        der::sequence(&[
            entry(&[1], der::octets(&self.ppid)),
            entry(&[2], der::sequence(&tcb)),
            entry(&[3], der::octets(&self.pce_id)),
            entry(&[4], der::octets(&self.fmspc)),
            entry(&[5], der::enumerated(self.sgx_type)),
            entry(&[6], der::octets(&self.platform_instance_id)),
            entry(
                &[7],
                der::sequence(&[
                    entry(&[7, 1], der::boolean(true)),
                    entry(&[7, 2], der::boolean(true)),
                    entry(&[7, 3], der::boolean(true)),
                ]),
            ),
        ])
    }
}

fn entry(below: &[u64], value: Vec<u8>) -> Vec<u8> {
    der::sequence(&[der::oid(&[SGX_EXTENSION.as_slice(), below].concat()), value])
}

/// Measurement of the key that signs the software quoting enclave.
pub(crate) fn qe_mrsigner() -> [u8; 32] {
    use sha2::Digest as _;
    sha2::Sha256::digest(b"dstack software TEE 1: signer of the quoting enclave").into()
}

pub(crate) const SGX_EXTENSION: [u64; 7] = [1, 2, 840, 113741, 1, 13, 1];
/// Not an FMSPC Intel has given out: "d57ac" stands for dstack.
pub(crate) const FMSPC: [u8; 6] = [0xd5, 0x7a, 0xc0, 0, 0, 0];
pub(crate) const CPU_SVN: [u8; 16] = [3, 3, 2, 2, 4, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0];
pub(crate) const OLD_CPU_SVN: [u8; 16] = [2, 2, 2, 2, 3, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0];
pub(crate) const PCE_SVN: u16 = 13;
pub(crate) const TEE_TCB_SVN: [u8; 16] = [6, 1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
pub(crate) const QE_ISV_SVN: u16 = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_a_published_extension_byte_for_byte() {
        // The extension of a published PCK certificate (platform of family B0C06F), rebuilt from its values.
        let spec = PlatformSpec {
            fmspc: [0xb0, 0xc0, 0x6f, 0, 0, 0],
            cpu_svn: [3, 3, 2, 2, 4, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0],
            pce_svn: 11,
            ..PlatformSpec::new(
                hex::decode("811dca2a26b952e85bb6448b097ba4fd").unwrap().try_into().unwrap(),
                hex::decode("07828474603e7019dc930775ffe8cdd2").unwrap().try_into().unwrap(),
            )
        };
        let published = "30820226301e060a2a864886f84d010d01010410811dca2a26b952e85bb6448b097ba4fd30820163060a2a864886f84d010d\
            0102308201533010060b2a864886f84d010d0102010201033010060b2a864886f84d010d0102020201033010060b2a864886f84d010d0102\
            030201023010060b2a864886f84d010d0102040201023010060b2a864886f84d010d0102050201043010060b2a864886f84d010d01020602\
            01013010060b2a864886f84d010d0102070201003010060b2a864886f84d010d0102080201053010060b2a864886f84d010d010209020100\
            3010060b2a864886f84d010d01020a0201003010060b2a864886f84d010d01020b0201003010060b2a864886f84d010d01020c0201003010\
            060b2a864886f84d010d01020d0201003010060b2a864886f84d010d01020e0201003010060b2a864886f84d010d01020f0201003010060b\
            2a864886f84d010d0102100201003010060b2a864886f84d010d01021102010b301f060b2a864886f84d010d010212041003030202040100\
            0500000000000000003010060a2a864886f84d010d0103040200003014060a2a864886f84d010d01040406b0c06f000000300f060a2a8648\
            86f84d010d01050a0101301e060a2a864886f84d010d0106041007828474603e7019dc930775ffe8cdd23044060a2a864886f84d010d0107\
            30363010060b2a864886f84d010d0107010101ff3010060b2a864886f84d010d0107020101ff3010060b2a864886f84d010d0107030101ff";
        assert_eq!(hex::encode(spec.sgx_extension()), published);
    }
}
