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

/// Judges the attributes and service TDs of `body`, whose signature was verified.
pub(crate) fn check(body: &TdBody) -> Result<(), AttestError> {
    check_attributes(u64::from_le_bytes(body.td_attributes))?;
    check_service_td(body)
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
pub(crate) fn check_module(body: &TdBody, tcb_info: &TcbInfo) -> Result<(), AttestError> {
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

    #[test]
    fn a_module_that_is_not_intels_is_refused() {
        let zero_signer = "0".repeat(96);
        let base = format!(r#""mrsigner":"{zero_signer}","attributes":"0000000000000000","attributesMask":"FFFFFFFFFFFFFFFF""#);
        let head =
            r#""id":"TDX","version":3,"issueDate":"","nextUpdate":"","fmspc":"","pceId":"","tcbType":0,"tcbEvaluationDataNumber":17"#;
        let tcb_info: TcbInfo = serde_json::from_str(&format!(
            r#"{{{head},"tdxModule":{{{base}}},"tdxModuleIdentities":[{{"id":"TDX_01",{base},"tcbLevels":[]}}],"tcbLevels":[]}}"#
        ))
        .unwrap();
        let module = |version: u8, signer: [u8; 48], attributes: [u8; 8]| {
            let mut tee_tcb_svn = [0; 16];
            tee_tcb_svn[1] = version;
            let body = TdBody {
                tee_tcb_svn,
                mr_seam: [0; 48],
                mr_signer_seam: signer,
                seam_attributes: attributes,
                td_attributes: [0; 8],
                xfam: [0; 8],
                mr_td: [0; 48],
                mr_config_id: [0; 48],
                mr_owner: [0; 48],
                mr_owner_config: [0; 48],
                rtmr: [[0; 48]; 4],
                report_data: [0; 64],
                td15: None,
            };
            check_module(&body, &tcb_info)
        };
        assert_eq!(module(0, [0; 48], [0; 8]), Ok(()));
        assert_eq!(module(1, [0; 48], [0; 8]), Ok(()));
        for version in [0, 1] {
            assert_eq!(module(version, [1; 48], [0; 8]), Err(AttestError::Measurement { register: "mr_signer_seam" }));
            let attributes = module(version, [0; 48], [1, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(attributes, Err(AttestError::Measurement { register: "seam_attributes" }));
        }
        assert_eq!(module(9, [0; 48], [0; 8]), Err(AttestError::NoTcbLevel { part: "tdx module identity" }));
    }
}
