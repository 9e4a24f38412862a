//! What a TD's own registers must say before it is served: no debug, no profiling, no migration, no service TD, an Intel module.
//! Owns: the attribute rules. Never: looks at measurements of the guest.
//! Source: Intel TDX Module ABI specification, ATTRIBUTES table; the policy of the vectors' README.

use dcap_qvl::TcbInfo;

use super::quote::TdBody;
use crate::AttestError;

const DEBUG: u64 = 1;
const SERVTD_EXT: u64 = 1 << 17;
const SEPT_VE_DISABLE: u64 = 1 << 28;
const MIGRATABLE: u64 = 1 << 29;
/// ICSSD, LASS, SEPT_VE_DISABLE, PKS, KL, PERFMON: what a workload may have. Every other bit is refused, known or not.
const ALLOWED: u64 = 1 << 16 | 1 << 27 | SEPT_VE_DISABLE | 1 << 30 | 1 << 31 | 1 << 63;

/// Judges `body`, whose signature was verified, beside `tcb_info` for the module's signer.
pub(crate) fn check(body: &TdBody, tcb_info: &TcbInfo) -> Result<(), AttestError> {
    check_attributes(u64::from_le_bytes(body.td_attributes))?;
    check_service_td(body)?;
    check_module(body, tcb_info)
}

fn check_attributes(attributes: u64) -> Result<(), AttestError> {
    if attributes & DEBUG != 0 {
        return Err(AttestError::Debug);
    }
    if attributes & SERVTD_EXT != 0 {
        return Err(AttestError::ServiceTd);
    }
    if attributes & MIGRATABLE != 0 {
        return Err(AttestError::TdAttributes { why: "the td can be migrated" });
    }
    if attributes & SEPT_VE_DISABLE == 0 {
        return Err(AttestError::TdAttributes { why: "sept_ve_disable is off" });
    }
    if attributes & !ALLOWED != 0 {
        return Err(AttestError::TdAttributes { why: "a reserved or profiling bit is set" });
    }
    Ok(())
}

fn check_service_td(body: &TdBody) -> Result<(), AttestError> {
    let Some(td15) = &body.td15 else {
        return Ok(());
    };
    let bound = match &td15.service_td_ex {
        Some(ex) => [&ex.initial, &ex.current].iter().any(|(hash, attributes)| *hash != [0; 48] || *attributes != [0; 8]),
        None => false,
    };
    match bound || td15.mr_service_td != [0; 48] {
        true => Err(AttestError::ServiceTd),
        false => Ok(()),
    }
}

/// Intel signs its modules with the all-zero signer, so anything else is not Intel's; attributes outside the mask are refused.
fn check_module(body: &TdBody, tcb_info: &TcbInfo) -> Result<(), AttestError> {
    let malformed = AttestError::Malformed { part: "tcb info", why: "a tdx module member is not hex of its size" };
    if body.mr_signer_seam != [0; 48] {
        return Err(AttestError::Measurement { register: "mr_signer_seam" });
    }
    let identity = tcb_info.tdx_module_identity(&body.tee_tcb_svn).map_err(|_| AttestError::NoTcbLevel { part: "tdx module identity" })?;
    let base = tcb_info.tdx_module.as_ref().ok_or(AttestError::Malformed { part: "tcb info", why: "no tdx module" })?;
    let (signer, attributes, mask) = match identity {
        Some(identity) => (&identity.mrsigner, &identity.attributes, &identity.attributes_mask),
        None => (&base.mrsigner, &base.attributes, &base.attributes_mask),
    };
    let (mut expected_signer, mut expected, mut masked) = ([0; 48], [0; 8], [0; 8]);
    let decoded = hex::decode_to_slice(signer, &mut expected_signer)
        .and_then(|()| hex::decode_to_slice(attributes, &mut expected))
        .and_then(|()| hex::decode_to_slice(mask, &mut masked));
    decoded.map_err(|_| malformed)?;
    if body.mr_signer_seam != expected_signer {
        return Err(AttestError::Measurement { register: "mr_signer_seam" });
    }
    let (actual, expected, mask) = (u64::from_le_bytes(body.seam_attributes), u64::from_le_bytes(expected), u64::from_le_bytes(masked));
    if actual & mask != expected & mask || actual & !mask != 0 {
        return Err(AttestError::Measurement { register: "seam_attributes" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bit_has_its_refusal() {
        assert_eq!(check_attributes(SEPT_VE_DISABLE), Ok(()));
        assert_eq!(check_attributes(SEPT_VE_DISABLE | 1 << 30 | 1 << 63), Ok(()));
        assert_eq!(check_attributes(SEPT_VE_DISABLE | DEBUG), Err(AttestError::Debug));
        assert_eq!(check_attributes(SEPT_VE_DISABLE | SERVTD_EXT), Err(AttestError::ServiceTd));
        assert_eq!(check_attributes(0), Err(AttestError::TdAttributes { why: "sept_ve_disable is off" }));
        for bit in (1..16).chain(18..27).chain([29]).chain(32..63) {
            let refused = matches!(check_attributes(SEPT_VE_DISABLE | 1 << bit), Err(AttestError::TdAttributes { .. }));
            assert!(refused, "bit {bit}");
        }
    }
}
