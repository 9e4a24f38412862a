//! Compares what a verifier read out of evidence with the manifest's `identity`, member by member. A member that is not known here
//! is a difference: nothing the manifest states goes unchecked.

use serde_json::{Map, Value};

use super::{Expect, StatusAndAdvisories};
use crate::{
    eventlog::ccel,
    nitro::VerifiedDocument,
    snp::{SignedReport, SigningKey, policy},
    tdx::{self, LevelVerdict, Quote, TcbVerdict, TdBody},
    x509,
};

type Identity = Map<String, Value>;

/// TDX facts. They are read from the quote as parsed, so that refused quotes are compared as well.
pub(super) fn td_difference(identity: &Identity, bytes: &[u8]) -> Option<String> {
    let quote = match Quote::parse(bytes) {
        Ok(quote) => quote,
        Err(error) => return Some(format!("identity cannot be read: {error}")),
    };
    let certificate = match tdx::claimed_certificate(&quote) {
        Ok(certificate) => certificate,
        Err(error) => return Some(format!("pck certificate cannot be read: {error}")),
    };
    identity.iter().find_map(|(name, expected)| {
        let got = match name.as_str() {
            "quote_version" => Value::from(quote.version),
            "attestation_key_type" => Value::from(2),
            "tee_type" => Value::from("0x00000081"),
            "body_type" => Value::from(quote.body_type?),
            "body_size" => Value::from(quote.signed.len().saturating_sub(48 + 6)),
            "trailing_bytes" => Value::from(quote.trailing.len()),
            "cert_data_type" => Value::from(5),
            "fmspc" => Value::from(hex::encode(certificate.platform.fmspc)),
            "pck" => {
                let date = |name| expected.get(name).and_then(Value::as_str).and_then(|text| tdx::ms_of_rfc3339(text, "pck validity").ok());
                let same = expected.get("fmspc").and_then(Value::as_str) == Some(hex::encode(certificate.platform.fmspc).as_str())
                    && expected.get("issuer").and_then(Value::as_str) == Some(certificate.issuer.as_str())
                    && date("not_before") == Some(certificate.validity_ms.0)
                    && date("not_after") == Some(certificate.validity_ms.1);
                return (!same).then(|| format!("identity.pck is {certificate:?}, expected {expected}"));
            }
            "td_attributes_flags" => Value::from(flags(&quote.body)),
            "debug" => Value::from(flags(&quote.body).contains(&"DEBUG")),
            register => match register_of(&quote.body, register) {
                Some(bytes) => Value::from(hex::encode(bytes)),
                None => return Some(format!("identity.{register} is not known")),
            },
        };
        differs(name, &got, expected)
    })
}

fn register_of<'b>(body: &'b TdBody, name: &str) -> Option<&'b [u8]> {
    let [rtmr0, rtmr1, rtmr2, rtmr3] = &body.rtmr;
    Some(match name {
        "tee_tcb_svn" => &body.tee_tcb_svn,
        "mr_seam" => &body.mr_seam,
        "mr_signer_seam" => &body.mr_signer_seam,
        "seam_attributes" => &body.seam_attributes,
        "td_attributes" => &body.td_attributes,
        "xfam" => &body.xfam,
        "mr_td" => &body.mr_td,
        "mr_config_id" => &body.mr_config_id,
        "mr_owner" => &body.mr_owner,
        "mr_owner_config" => &body.mr_owner_config,
        "rtmr0" => rtmr0,
        "rtmr1" => rtmr1,
        "rtmr2" => rtmr2,
        "rtmr3" => rtmr3,
        "report_data" => &body.report_data,
        "tee_tcb_svn2" => &body.td15.as_ref()?.tee_tcb_svn2,
        "mr_service_td" => &body.td15.as_ref()?.mr_service_td,
        _ => return None,
    })
}

/// Names of the attribute bits that are set, lowest first.
fn flags(body: &TdBody) -> Vec<&'static str> {
    const NAMES: [(u32, &str); 10] = [
        (0, "DEBUG"),
        (16, "ICSSD"),
        (17, "SERVTD_EXT"),
        (27, "LASS"),
        (28, "SEPT_VE_DISABLE"),
        (29, "MIGRATABLE"),
        (30, "PKS"),
        (31, "KL"),
        (62, "TPA"),
        (63, "PERFMON"),
    ];
    let attributes = u64::from_le_bytes(body.td_attributes);
    NAMES.iter().filter(|(bit, _)| attributes >> bit & 1 == 1).map(|(_, name)| *name).collect()
}

/// Facts of an NSM's or NitroTPM's document, whose verifier takes its PCRs from the member `pcr_map` only. The leaf's subject and dates, the number of certificates and the COSE tag are facts of the encoding
/// that its verifier does not report.
pub(super) fn document_difference(identity: &Identity, document: &VerifiedDocument, pcr_map: &str) -> Option<String> {
    let bytes = |bytes: Option<&[u8]>| bytes.map_or(Value::Null, |bytes| Value::from(hex::encode(bytes)));
    identity.iter().find_map(|(name, expected)| {
        let got = match name.as_str() {
            "module_id" => Value::from(document.module_id()),
            "digest" => Value::from("SHA384"),
            "timestamp_ms" => Value::from(document.timestamp().0),
            "timestamp" => {
                let whole_seconds = expected.as_str().and_then(|text| tdx::ms_of_rfc3339(text, "timestamp").ok());
                let same = whole_seconds == Some(document.timestamp().0 / 1000 * 1000);
                return (!same).then(|| format!("identity.timestamp is {}, expected {expected}", document.timestamp()));
            }
            "pcr_map" => Value::from(pcr_map),
            "pcrs" => {
                document.pcrs().iter().map(|(index, pcr)| (index.to_string(), Value::from(hex::encode(pcr)))).collect::<Identity>().into()
            }
            "user_data" => bytes(document.user_data()),
            "nonce" => bytes(document.nonce()),
            "public_key" => bytes(document.public_key()),
            "debug" => Value::from(false),
            "cabundle_len" | "doc_bytes" | "cose_tagged" | "leaf_subject" | "leaf_not_before" | "leaf_not_after" => return None,
            other => return Some(format!("identity.{other} is not known")),
        };
        differs(name, &got, expected)
    })
}

/// Facts of a bare firmware log.
pub(super) fn log_difference(identity: &Identity, replay: &ccel::Replay) -> Option<String> {
    identity.iter().find_map(|(name, expected)| {
        let got = match name.as_str() {
            "events" => Value::from(replay.event_count),
            "replay" => {
                let registers = (0..4).zip(replay.registers.iter().zip(replay.extended)).filter(|(_, (_, extended))| *extended);
                registers.map(|(index, (value, _))| (format!("rtmr{index}"), Value::from(hex::encode(value)))).collect::<Identity>().into()
            }
            other => return Some(format!("identity.{other} is not known")),
        };
        differs(name, &got, expected)
    })
}

/// The TCB facts of `expect`, each where it is stated.
pub(super) fn tcb_difference(expect: &Expect, tcb: &TcbVerdict) -> Option<String> {
    let status = expect.tcb_status.as_ref().filter(|status| *status != tcb.overall.status.name());
    if let Some(status) = status {
        return Some(format!("tcb status is {}, expected {status}", tcb.overall.status.name()));
    }
    let advisories = expect.advisory_ids.as_ref().filter(|ids| **ids != tcb.overall.advisory_ids);
    if let Some(ids) = advisories {
        return Some(format!("advisories are {:?}, expected {ids:?}", tcb.overall.advisory_ids));
    }
    let level = |name: &str, expected: &Option<StatusAndAdvisories>, got: &LevelVerdict| {
        let expected = expected.as_ref()?;
        let same = expected.status == got.status.name() && expected.advisory_ids == got.advisory_ids;
        (!same).then(|| format!("{name} is {got:?}, expected {} {:?}", expected.status, expected.advisory_ids))
    };
    level("platform status", &expect.platform_status, &tcb.platform).or_else(|| level("qe status", &expect.qe_status, &tcb.qe))
}

fn differs(name: &str, got: &Value, expected: &Value) -> Option<String> {
    (got != expected).then(|| format!("identity.{name} is {got}, expected {expected}"))
}

/// Facts of a SEV-SNP report as parsed, so that refused ones are compared as well. Names come from the certificates beside it.
pub(super) fn snp_difference(identity: &Identity, report: &[u8], vek: &[u8], issuers: &[Vec<u8>]) -> Option<String> {
    let report = match SignedReport::parse(report) {
        Ok(signed) => signed.report,
        Err(error) => return Some(format!("identity cannot be read: {error}")),
    };
    let hex = |bytes: &[u8]| Value::from(hex::encode(bytes));
    let name = |der: &[u8]| {
        let certificate = x509::parse(der, "certificate").ok()?;
        certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok()).map(str::to_owned)
    };
    identity.iter().find_map(|(fact, expected)| {
        let got = match fact.as_str() {
            "report_version" => Value::from(report.version),
            "guest_svn" => Value::from(report.guest_svn),
            "policy" => Value::from(format!("{:#018x}", report.policy)),
            "debug" => Value::from(report.policy & policy::DEBUG != 0),
            "smt" => Value::from(report.policy & policy::SMT != 0),
            "migrate_ma" => Value::from(report.policy & policy::MIGRATE_MA != 0),
            "family_id" => hex(&report.family_id),
            "image_id" => hex(&report.image_id),
            "vmpl" => Value::from(report.vmpl),
            "sig_algo" => Value::from(1),
            "current_tcb" => hex(&report.current_tcb),
            "reported_tcb" => hex(&report.reported_tcb),
            "committed_tcb" => hex(&report.committed_tcb),
            "platform_info" => Value::from(format!("{:#018x}", report.platform_info)),
            "author_key_en" => Value::from(report.key_info & policy::AUTHOR_KEY != 0),
            "mask_chip_key" => Value::from(report.key_info & policy::MASK_CHIP_KEY != 0),
            "signing_key" => Value::from(SigningKey::of(&report)?.name()),
            "report_data" => hex(&report.report_data),
            "measurement" => hex(&report.measurement),
            "host_data" => hex(&report.host_data),
            "id_key_digest" => hex(&report.id_key_digest),
            "author_key_digest" => hex(&report.author_key_digest),
            "report_id" => hex(&report.report_id),
            "chip_id" => hex(&report.chip_id),
            "trailing_bytes" => Value::from(0),
            "vek_subject" => name(vek).map_or(Value::Null, |name| Value::from(format!("CN={name}"))),
            "chain" => issuers.iter().map(|der| name(der)).collect::<Vec<_>>().into(),
            other => return Some(format!("identity.{other} is not known")),
        };
        differs(fact, &got, expected)
    })
}
