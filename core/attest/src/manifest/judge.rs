//! Judges one vector as the product would: role files in, refusal or acceptance out. Owns: which checks a platform's vector takes.

use std::{collections::BTreeMap, sync::Arc};

use dstack_protocol::UnixMillis;

use super::{Vector, facts, vtpm};
use crate::{
    AttestError, CollateralBundle, TcbPolicy, TdxCollateral, Trace, TrustRoots, VerifyContext, azure, eventlog,
    eventlog::ccel,
    nitro, pem,
    snp::{self, Endorsement},
    tdx::{self, TcbVerdict},
    tpm::{self, Bank, PcrValues},
    x509::Key,
};

/// What the verifiers said of one vector.
pub(super) struct Judged {
    pub(super) result: Result<(), AttestError>,
    /// TCB status, where a quote was verified so far.
    pub(super) tcb: Option<TcbVerdict>,
    /// The first identity fact that is not the manifest's.
    pub(super) difference: Option<String>,
}

impl From<Result<(), AttestError>> for Judged {
    fn from(result: Result<(), AttestError>) -> Self {
        Self { result, tcb: None, difference: None }
    }
}

pub(super) type Contents<'a> = BTreeMap<&'a str, Vec<u8>>;

/// Judges `vector`; the error is a line about the manifest, not about the evidence.
pub(super) fn judge(vector: &Vector, contents: &Contents<'_>, pool: &[Vec<u8>]) -> Result<Judged, String> {
    match vector.platform.as_str() {
        "nitro" => judge_document(vector, contents, "pcrs", nitro::verify),
        "nitro-tpm" => judge_nitro_tpm(vector, contents),
        "gcp-tpm" => vtpm::judge_quote(vector, contents),
        "gce-tpm" => vtpm::judge_gce(vector, contents, pool),
        "gce-ak-cert" => vtpm::judge_certificate(vector, contents, pool),
        "tpm-log" => vtpm::judge_log(vector, contents),
        "sev-snp" => judge_snp(vector, contents),
        "azure-tdx" => judge_azure(vector, contents),
        "ccel" => judge_log(vector, contents),
        _ => judge_td(vector, contents),
    }
}

fn judge_td(vector: &Vector, contents: &Contents<'_>) -> Result<Judged, String> {
    let quote = role(contents, "quote")?;
    let now_ms = valid_at(vector)?;
    let roots = roots(vector, contents)?;
    let collateral = TdxCollateral::parse(role(contents, "collateral")?);
    let difference = vector.identity.as_ref().and_then(|identity| facts::td_difference(identity, quote));
    let verified = collateral.and_then(|collateral| every_way(quote, collateral, now_ms, &roots));
    let verified = match verified {
        Ok(verified) => verified,
        // An SGX quote is refused before its identity can be read; `identity` then speaks of another kind of report.
        Err(error @ AttestError::WrongTee { .. }) => return Ok(Judged::from(Err(error))),
        Err(error) => return Ok(Judged { result: Err(error), tcb: None, difference }),
    };
    let result = check_expected(vector, contents, &verified)?.and_then(|()| check_logs(contents, &verified));
    let result = result.and_then(|()| TcbPolicy::default().check(verified.tcb().overall.status));
    Ok(Judged { result, tcb: Some(verified.tcb().clone()), difference })
}

/// Judged as the product does it, against collateral checked now, collateral checked before, and with the quote's chain remembered, and by
/// the second implementation.
fn every_way(quote: &[u8], collateral: TdxCollateral, now_ms: u64, roots: &TrustRoots) -> Result<tdx::VerifiedTd, AttestError> {
    let fresh = tdx::verify_quote(quote, &collateral, now_ms, roots);
    if let Ok(verified) = &fresh {
        tdx::second_opinion(quote, &collateral, now_ms, roots, verified)?;
    }
    if tdx::verify_quote_remembered(quote, &collateral, now_ms, roots).is_some_and(|remembered| remembered != fresh) {
        return Err(AttestError::SecondVerifier { detail: "a remembered chain leads to another verdict".to_owned() });
    }
    let checked = tdx::verify_quote_checked(quote, &tdx::CheckedCollateral::new(Arc::new(collateral), roots), now_ms, roots);
    match checked == fresh {
        true => checked,
        false => Err(AttestError::SecondVerifier { detail: "checked collateral leads to another verdict".to_owned() }),
    }
}

/// What the caller of the vector compares beside the verifier.
fn check_expected(vector: &Vector, contents: &Contents<'_>, td: &tdx::VerifiedTd) -> Result<Result<(), AttestError>, String> {
    let body = td.body();
    if contents.get("report_data").is_some_and(|expected| *expected != body.report_data) {
        return Ok(Err(AttestError::ReportData));
    }
    for (name, value) in expected(vector) {
        let value = hex::decode(value).map_err(|_| format!("expected {name} is not hex"))?;
        match name.as_str() {
            "report_data" if value != body.report_data => return Ok(Err(AttestError::ReportData)),
            "mr_td" if value != body.mr_td => return Ok(Err(AttestError::Measurement { register: "mr_td" })),
            "report_data" | "mr_td" => {}
            _ => return Err(format!("expected {name} is not known for this platform")),
        }
    }
    Ok(Ok(()))
}

fn check_logs(contents: &Contents<'_>, td: &tdx::VerifiedTd) -> Result<(), AttestError> {
    if let Some(log) = contents.get("event_log") {
        eventlog::prove_json(log, &td.body().rtmr)?;
    }
    match contents.get("ccel") {
        Some(area) => ccel::replay(area)?.check(&td.body().rtmr),
        None => Ok(()),
    }
}

/// A NitroTPM's document; where the TPM's own quote is there, it is signed by the key that the document certifies.
fn judge_nitro_tpm(vector: &Vector, contents: &Contents<'_>) -> Result<Judged, String> {
    let judged = judge_document(vector, contents, "nitrotpm_pcrs", nitro::tpm::verify)?;
    let (Ok(()), Some(message), Some(signature)) = (&judged.result, contents.get("tpm_message"), contents.get("tpm_signature")) else {
        return Ok(judged);
    };
    let document = match nitro::tpm::verify(role(contents, "document")?, &roots(vector, contents)?, UnixMillis(valid_at(vector)?)) {
        Ok(document) => document,
        Err(error) => return Ok(Judged::from(Err(error))),
    };
    let certified = || -> Result<(), AttestError> {
        let wrong = AttestError::Field { field: "public_key", why: "not a point on P-256" };
        let key = document.public_key().and_then(Key::of_p256_point).ok_or(wrong)?;
        let quote = tpm::verify_quote(message, &tpm::Signature::EcdsaDer(signature), key)?;
        if document.nonce() != Some(quote.extra_data) {
            return Err(AttestError::Nonce);
        }
        let mut values = tpm::PcrValues::default();
        for (index, pcr) in document.pcrs().iter() {
            values.add(tpm::Bank::Sha384, index.into(), pcr.to_vec())?;
        }
        quote.require_values(&values)
    };
    match certified() {
        Ok(()) => Ok(judged),
        Err(error) => Ok(Judged::from(Err(error))),
    }
}

/// Verifies a document of either kind.
type VerifyDocument = fn(&[u8], &TrustRoots, UnixMillis) -> Result<nitro::VerifiedDocument, AttestError>;

fn judge_document(vector: &Vector, contents: &Contents<'_>, pcr_map: &str, verify: VerifyDocument) -> Result<Judged, String> {
    let now = UnixMillis(valid_at(vector)?);
    let verified = match verify(role(contents, "document")?, &roots(vector, contents)?, now) {
        Ok(verified) => verified,
        Err(error) => return Ok(Judged::from(Err(error))),
    };
    for (name, value) in expected(vector) {
        let value = hex::decode(value).map_err(|_| format!("expected {name} is not hex"))?;
        match name.as_str() {
            "user_data" if verified.user_data() != Some(&value) => return Ok(Judged::from(Err(AttestError::UserData))),
            "nonce" if verified.nonce() != Some(&value) => return Ok(Judged::from(Err(AttestError::Nonce))),
            "report_data" if verified.user_data() != Some(&value) => return Ok(Judged::from(Err(AttestError::ReportData))),
            "user_data" | "nonce" | "report_data" => {}
            _ => return Err(format!("expected {name} is not known for this platform")),
        }
    }
    let difference = vector.identity.as_ref().and_then(|identity| facts::document_difference(identity, &verified, pcr_map));
    Ok(Judged { result: Ok(()), tcb: None, difference })
}

/// The vectors' policy: a VLEK is as good as a VCEK, any privilege level and TCB status, no revocation lists.
fn judge_snp(vector: &Vector, contents: &Contents<'_>) -> Result<Judged, String> {
    let (roots, now) = (roots(vector, contents)?, UnixMillis(valid_at(vector)?));
    let tcb = TcbPolicy::default().accepting_vlek().accepting_missing_crl();
    let context = VerifyContext { now, roots: &roots, collateral: &CollateralBundle::empty(), tcb: &tcb };
    let (report, vek) = (role(contents, "report")?, role(contents, "vek")?);
    let issuers = match pem::certificates(role(contents, "ca_chain")?, "ca_chain") {
        Ok(issuers) => issuers,
        Err(error) => return Ok(Judged::from(Err(error))),
    };
    let endorsement = Endorsement::with_chain(vek, &issuers, &roots);
    let verified = endorsement.and_then(|endorsement| snp::verify(report, &endorsement, &context, &Trace::new()));
    let difference = vector.identity.as_ref().and_then(|identity| facts::snp_difference(identity, report, vek, &issuers));
    let verified = match verified {
        Ok(verified) => verified,
        Err(error) => return Ok(Judged { result: Err(error), tcb: None, difference }),
    };
    for (name, value) in expected(vector) {
        let value = hex::decode(value).map_err(|_| format!("expected {name} is not hex"))?;
        match name.as_str() {
            "report_data" if value != verified.report().report_data => return Ok(Judged::from(Err(AttestError::ReportData))),
            "measurement" if value != verified.report().measurement => {
                return Ok(Judged::from(Err(AttestError::Measurement { register: "measurement" })));
            }
            "report_data" | "measurement" => {}
            _ => return Err(format!("expected {name} is not known for this platform")),
        }
    }
    Ok(Judged { result: Ok(()), tcb: None, difference })
}

fn judge_azure(vector: &Vector, contents: &Contents<'_>) -> Result<Judged, String> {
    let (roots, now) = (roots(vector, contents)?, UnixMillis(valid_at(vector)?));
    let context = VerifyContext { now, roots: &roots, collateral: &CollateralBundle::empty(), tcb: &TcbPolicy::default() };
    let quote = role(contents, "quote")?;
    let difference = vector.identity.as_ref().and_then(|identity| facts::td_difference(identity, quote));
    let pcrs = pcrs(role(contents, "pcrs")?)?;
    let verify = || {
        let collateral = TdxCollateral::parse(contents.get("collateral").map(Vec::as_slice).unwrap_or_default())?;
        let certificate = contents.get("ak_cert").map(|pem| pem::certificates(pem, "ak_cert")).transpose()?;
        let ak_intermediates = contents.get("ak_intermediates").map(|pem| pem::certificates(pem, "ak_intermediates")).transpose()?;
        let parts = azure::Parts {
            quote,
            hcl_report: contents.get("hcl_report").map(Vec::as_slice).unwrap_or_default(),
            tpm_message: contents.get("tpm_message").map(Vec::as_slice).unwrap_or_default(),
            tpm_signature: contents.get("tpm_signature").map(Vec::as_slice).unwrap_or_default(),
            pcrs: &pcrs,
            ak_certificate: certificate.as_ref().and_then(|ders| ders.first()).map(Vec::as_slice),
            ak_intermediates: ak_intermediates.as_deref().unwrap_or_default(),
        };
        azure::verify(&parts, &collateral, &context, &Trace::new())
    };
    let verified = match verify() {
        Ok(verified) => verified,
        Err(error) => return Ok(Judged { result: Err(error), tcb: None, difference }),
    };
    let tcb = verified.td().tcb().clone();
    Ok(Judged { result: context.tcb.check(tcb.overall.status), tcb: Some(tcb), difference })
}

/// `{"sha256":{"0":"<hex>",…}}`.
fn pcrs(json: &[u8]) -> Result<PcrValues, String> {
    let banks: BTreeMap<String, BTreeMap<u32, String>> = serde_json::from_slice(json).map_err(|error| format!("pcrs: {error}"))?;
    let mut values = PcrValues::default();
    for (name, pcrs) in banks {
        let bank = Bank::named(&name).ok_or_else(|| format!("pcrs: no bank {name}"))?;
        for (index, value) in pcrs {
            let value = hex::decode(value).map_err(|error| format!("pcr {index}: {error}"))?;
            values.add(bank, index, value).map_err(|error| format!("pcr {index}: {error}"))?;
        }
    }
    Ok(values)
}

fn judge_log(vector: &Vector, contents: &Contents<'_>) -> Result<Judged, String> {
    let replay = match ccel::replay(role(contents, "ccel")?) {
        Ok(replay) => replay,
        Err(error) => return Ok(Judged::from(Err(error))),
    };
    let difference = vector.identity.as_ref().and_then(|identity| facts::log_difference(identity, &replay));
    Ok(Judged { result: Ok(()), tcb: None, difference })
}

pub(super) fn role<'c>(contents: &'c Contents<'_>, role: &str) -> Result<&'c [u8], String> {
    contents.get(role).map(Vec::as_slice).ok_or_else(|| format!("no file of role {role}"))
}

pub(super) fn valid_at(vector: &Vector) -> Result<u64, String> {
    let text = vector.valid_at.as_deref().ok_or("no valid_at")?;
    tdx::ms_of_rfc3339(text, "valid_at").map_err(|error| error.to_string())
}

pub(super) fn expected(vector: &Vector) -> impl Iterator<Item = (&String, &String)> {
    vector.context.iter().filter_map(|context| context.expected.as_ref()).flatten()
}

/// The vendors' roots, or the vector's own in their place.
pub(super) fn roots(vector: &Vector, contents: &Contents<'_>) -> Result<TrustRoots, String> {
    let replaced = vector.context.as_ref().is_some_and(|context| context.trust_root.is_some());
    if !replaced {
        return Ok(TrustRoots::production());
    }
    TrustRoots::none().with_software_root(role(contents, "trust_root")?).map_err(|error| format!("trust root: {error}"))
}
