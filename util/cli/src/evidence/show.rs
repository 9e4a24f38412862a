//! `dstack evidence show`: what evidence claims. Owns: the list of claims by form. Never: verifies; the first line says so.

use dstack_attest::tdx::{self, Quote};
use dstack_attest::wire::{Attestation, PlatformEvidence, TdxEvent};
use dstack_attest::x509ext::{CertificateClaims, CertificateEvidence};
use dstack_attest::{AttestError, nitro};
use serde_json::{Map, Value, json};

use super::judge::legacy;
use super::report::plain;
use super::source::{Evidence, Form};
use crate::failure::{Done, Failure};

type Claims = Map<String, Value>;

pub(super) fn run(evidence: &str, as_json: bool) -> Done {
    let evidence = Evidence::read(evidence)?;
    let mut claims = Claims::new();
    claims.insert("form".to_owned(), json!(evidence.form.name()));
    claims.insert("size_bytes".to_owned(), json!(evidence.bytes.len()));
    let outcome = match evidence.form {
        Form::Versioned => versioned(&evidence.bytes, &mut claims),
        Form::Certificate => certificate(&evidence.bytes, &mut claims),
        Form::Legacy => legacy(&evidence.bytes).and_then(|(quote, log)| pair(quote, log, &mut claims)),
        Form::Quote => quote(&evidence.bytes, &mut claims),
        Form::Document => document(&evidence.bytes, &mut claims),
    };
    let text = match as_json {
        true => format!("{}\n", json!({"format": 1, "verified": false, "claims": claims})),
        false => format!("nothing here is verified\n{}", plain(&claims)),
    };
    match outcome {
        Ok(()) => Ok(text),
        Err(error) => Err(Failure::wrong(format!("{}: {error}", error.class()), error.explain().fix).with_stdout(text)),
    }
}

fn put(claims: &mut Claims, name: &str, value: Value) {
    claims.insert(name.to_owned(), value);
}

fn versioned(bytes: &[u8], claims: &mut Claims) -> Result<(), AttestError> {
    let attestation = Attestation::decode(bytes)?;
    put(claims, "encoding", json!(if bytes.first() == Some(&0) { "SCALE V0" } else { "msgpack V1" }));
    put(claims, "platform", json!(attestation.platform.platform().name()));
    put(claims, "report_data", json!(hex::encode(attestation.report_data)));
    put(claims, "config", json!(attestation.config));
    for event in &attestation.runtime_events {
        put(claims, &format!("event {}", event.event.escape_debug()), json!(hex::encode(&event.payload)));
    }
    match &attestation.platform {
        PlatformEvidence::Tdx(td) => td_evidence(&td.quote, &td.event_log, claims),
        PlatformEvidence::GcpTdx(td, tpm) => {
            put(claims, "tpm_message", json!(hex::encode(&tpm.message)));
            for pcr in &tpm.pcr_values {
                put(claims, &format!("pcr{} {}", pcr.index, pcr.algorithm.escape_debug()), json!(hex::encode(&pcr.value)));
            }
            put(claims, "tpm_events", json!(tpm.event_log.len()));
            td_evidence(&td.quote, &td.event_log, claims)
        }
        PlatformEvidence::NitroEnclave { nsm_quote } => document(nsm_quote, claims),
        PlatformEvidence::NitroTpm { attestation_doc } => document(attestation_doc, claims),
        PlatformEvidence::SevSnp { report, cert_chain, mr_config } => {
            put(claims, "certificates", json!(cert_chain.len()));
            put(claims, "mr_config", json!(mr_config));
            put(claims, "report", json!(hex::encode(report)));
            Ok(())
        }
    }
}

fn certificate(der: &[u8], claims: &mut Claims) -> Result<(), AttestError> {
    let certificate = CertificateClaims::read(der)?;
    put(claims, "spki", json!(hex::encode(&certificate.spki)));
    put(claims, "usage", json!(certificate.usage));
    put(claims, "certificate_app_id", json!(certificate.app_id.map(hex::encode)));
    match certificate.evidence {
        None => {
            put(claims, "evidence", Value::Null);
            Ok(())
        }
        Some(CertificateEvidence::Versioned(bytes)) => versioned(&bytes, claims),
        Some(CertificateEvidence::Legacy { quote, event_log }) => pair(&quote, &event_log, claims),
    }
}

fn pair(bytes: &[u8], event_log: &[u8], claims: &mut Claims) -> Result<(), AttestError> {
    td_evidence(bytes, &TdxEvent::parse_log(event_log)?, claims)
}

fn td_evidence(bytes: &[u8], event_log: &[TdxEvent], claims: &mut Claims) -> Result<(), AttestError> {
    put(claims, "log_events", json!(event_log.len()));
    quote(bytes, claims)
}

fn quote(bytes: &[u8], claims: &mut Claims) -> Result<(), AttestError> {
    let quote = Quote::parse(bytes)?;
    put(claims, "quote_version", json!(quote.version));
    put(claims, "mr_td", json!(hex::encode(quote.body.mr_td)));
    for (index, register) in quote.body.rtmr.iter().enumerate() {
        put(claims, &format!("rtmr{index}"), json!(hex::encode(register)));
    }
    put(claims, "td_attributes", json!(hex::encode(quote.body.td_attributes)));
    put(claims, "xfam", json!(hex::encode(quote.body.xfam)));
    put(claims, "mr_config_id", json!(hex::encode(quote.body.mr_config_id)));
    put(claims, "tee_tcb_svn", json!(hex::encode(quote.body.tee_tcb_svn)));
    put(claims, "quoted_report_data", json!(hex::encode(quote.body.report_data)));
    let pck = tdx::claimed_certificate(&quote)?;
    put(claims, "fmspc", json!(hex::encode(pck.platform.fmspc)));
    put(claims, "ppid", json!(hex::encode(pck.platform.ppid)));
    put(claims, "pck_issuer", json!(pck.issuer));
    put(claims, "pck_not_before_unix_ms", json!(pck.validity_ms.0));
    put(claims, "pck_not_after_unix_ms", json!(pck.validity_ms.1));
    Ok(())
}

fn document(bytes: &[u8], claims: &mut Claims) -> Result<(), AttestError> {
    let document = nitro::claims(bytes)?;
    put(claims, "module_id", json!(document.module_id));
    put(claims, "timestamp_unix_ms", json!(document.timestamp.0));
    for (index, value) in document.pcrs.iter() {
        put(claims, &format!("pcr{index}"), json!(hex::encode(value)));
    }
    put(claims, "user_data", json!(document.user_data.map(hex::encode)));
    put(claims, "nonce", json!(document.nonce.map(hex::encode)));
    put(claims, "public_key", json!(document.public_key.map(hex::encode)));
    put(claims, "certificates", json!(document.certificates));
    Ok(())
}
