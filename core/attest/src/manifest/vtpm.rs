//! Judges the vectors of TPMs: Google's quotes and certificates, firmware logs. Owns: which checks such a vector takes and the facts
//! compared. Never: judges a TD half; `gcp-bound` vectors are given no collateral for it.
//! Source: the vectors' README (roles of `gcp-tpm`, `gce-tpm`, `gce-ak-cert`, `tpm-log`; "The `gcp-bound/*` vectors").

use std::collections::BTreeMap;

use dstack_protocol::UnixMillis;
use serde_json::{Map, Value};
use x509_parser::x509::X509Name;

use super::{
    Vector,
    judge::{Contents, Judged, expected, role, roots, valid_at},
};
use crate::{
    AttestError,
    eventlog::tpm,
    gcp,
    tpm::{Bank, PcrValues, Quote, Signature, verify_quote},
    x509::{Path, Revocation, Untrusted},
};

type Identity = Map<String, Value>;

/// GCE's instance facts, as an extension of attestation key certificates.
const INSTANCE_EXTENSION: &str = "1.3.6.1.4.1.11129.2.1.21";

/// `gcp-tpm`: a quote of ours to ask for, its attestation key's whole path beside it.
pub(super) fn judge_quote(vector: &Vector, contents: &Contents<'_>) -> Result<Judged, String> {
    let (roots, now) = (roots(vector, contents)?, UnixMillis(valid_at(vector)?));
    let (message, signature) = (role(contents, "message")?, role(contents, "signature")?);
    let values = json_of(role(contents, "pcrs")?)?;
    let nonce = match expected(vector).find(|(name, _)| *name == "nonce") {
        Some((_, nonce)) => Some(nonce.clone()),
        None => {
            contents.get("envelope").map(|text| json_of(text)).transpose()?.and_then(|json| Some(json.get("nonce")?.as_str()?.to_owned()))
        }
    };
    if let Some((other, _)) = expected(vector).find(|(name, _)| *name != "nonce") {
        return Err(format!("expected {other} is not known for this platform"));
    }
    let nonce = nonce.map(|nonce| hex::decode(nonce).map_err(|_| "a nonce is not hex".to_owned())).transpose()?;
    let chain = match gcp::chain_of_pem(role(contents, "ak_chain")?) {
        Ok(chain) => chain,
        Err(error) => return Ok(Judged::from(Err(error))),
    };
    let judged = || -> Result<(Quote<'_>, Path<'_, '_>), AttestError> {
        Quote::parse(message)?;
        // a SEQUENCE is the DER form; a TPMT_SIGNATURE begins with its scheme
        let signature = match signature.first() {
            Some(0x30) => Signature::EcdsaDer(signature),
            _ => Signature::parse(signature)?,
        };
        let path = gcp::chain::walk_ak(&chain, &roots, now)?;
        let quote = verify_quote(message, &signature, path.key()?)?;
        if nonce.is_some_and(|nonce| nonce != quote.extra_data) {
            return Err(AttestError::Nonce);
        }
        if let Some(td_quote) = contents.get("quote") {
            gcp::require_bound(&quote, td_quote)?;
            quote.require_selection(gcp::QUOTED)?;
        }
        let mut given = PcrValues::default();
        for (name, values) in values.as_object().into_iter().flatten() {
            let bank = Bank::named(name).ok_or(AttestError::PcrSelection { why: "a bank of an unknown hash" })?;
            add(&mut given, bank, values)?;
        }
        quote.require_values(&given)?;
        Ok((quote, path))
    };
    match judged() {
        Ok((quote, path)) => {
            let difference = vector.identity.as_ref().and_then(|identity| quote_difference(identity, &quote, &path, &|_| None));
            Ok(Judged { result: Ok(()), tcb: None, difference })
        }
        Err(error) => Ok(Judged::from(Err(error))),
    }
}

/// `gce-tpm`: one quote per bank, and the firmware log that leads to their PCRs.
pub(super) fn judge_gce(vector: &Vector, contents: &Contents<'_>, pool: &[Vec<u8>]) -> Result<Judged, String> {
    let (roots, now) = (roots(vector, contents)?, UnixMillis(valid_at(vector)?));
    let (leaf, log) = (role(contents, "ak_cert")?, role(contents, "event_log")?);
    let untrusted = Untrusted { pinned: pool, ..Untrusted::default() };
    let path = match gcp::verify_ak(leaf, &untrusted, &roots, now, Revocation::WhereGiven) {
        Ok(path) => path,
        Err(error) => return Ok(Judged::from(Err(error))),
    };
    let (mut banks, mut differing, mut newest) = (Vec::new(), Vec::new(), None);
    for bank in Bank::ALL {
        let Some(message) = contents.get(format!("message_{}", bank.name()).as_str()) else { continue };
        let signature = role(contents, &format!("signature_{}", bank.name()))?;
        let values = json_of(role(contents, &format!("pcrs_{}", bank.name()))?)?;
        let mut judged = || -> Result<Quote<'_>, AttestError> {
            let quote = verify_quote(message, &Signature::parse(signature)?, path.key()?)?;
            let mut given = PcrValues::default();
            add(&mut given, bank, &values)?;
            quote.require_values(&given)?;
            let replayed = tpm::replay(log, bank)?.pcrs;
            differing.extend(replayed.into_iter().filter(|(index, pcr)| given.get(bank, *index) != Some(pcr)).map(|(index, _)| index));
            Ok(quote)
        };
        match judged() {
            Ok(quote) => {
                banks.push(bank.name());
                if bank == Bank::Sha256 {
                    newest = Some(quote);
                }
            }
            Err(error) => return Ok(Judged::from(Err(error))),
        }
    }
    let Some(quote) = newest else { return Err("no quote over the bank sha256".to_owned()) };
    if let Some(register) = differing.first() {
        return Ok(Judged::from(Err(AttestError::ReplayMismatch { register: *register })));
    }
    let more = |name: &str| match name {
        "banks" => Some(Value::from(banks.clone())),
        "event_log_pcr_mismatch" => Some(Value::from(differing.clone())),
        _ => None,
    };
    let difference = vector.identity.as_ref().and_then(|identity| quote_difference(identity, &quote, &path, &more));
    Ok(Judged { result: Ok(()), tcb: None, difference })
}

/// `gce-ak-cert`: an attestation key's certificate alone.
pub(super) fn judge_certificate(vector: &Vector, contents: &Contents<'_>, pool: &[Vec<u8>]) -> Result<Judged, String> {
    let (roots, now) = (roots(vector, contents)?, UnixMillis(valid_at(vector)?));
    let untrusted = Untrusted { pinned: pool, ..Untrusted::default() };
    let certificates = match gcp::chain_of_pem(role(contents, "cert")?) {
        Ok(certificates) => certificates,
        Err(error) => return Ok(Judged::from(Err(error))),
    };
    let [leaf] = &certificates[..] else { return Err("not one certificate".to_owned()) };
    let path = match gcp::verify_ak(leaf, &untrusted, &roots, now, Revocation::WhereGiven) {
        Ok(path) => path,
        Err(error) => return Ok(Judged::from(Err(error))),
    };
    let difference = vector.identity.as_ref().and_then(|identity| {
        let instance = path.leaf().extensions().iter().find(|extension| extension.oid.to_id_string() == INSTANCE_EXTENSION);
        identity.iter().find_map(|(name, expected)| {
            let got = match name.as_str() {
                "subject" => Value::from(text_of(path.leaf().subject())),
                "issuer" => Value::from(text_of(path.leaf().issuer())),
                "instance_extension" => instance.map_or(Value::Null, |extension| Value::from(hex::encode(extension.value))),
                // how the publisher found the path: as long as ours
                "chain_tried" => {
                    let same = expected.as_array().is_some_and(|tried| tried.len() == path.intermediates().saturating_add(1));
                    return (!same)
                        .then(|| format!("identity.chain_tried is {} certificates long", path.intermediates().saturating_add(1)));
                }
                other => return Some(format!("identity.{other} is not known")),
            };
            differs(name, &got, expected)
        })
    });
    Ok(Judged { result: Ok(()), tcb: None, difference })
}

/// `tpm-log`: a firmware log alone.
pub(super) fn judge_log(vector: &Vector, contents: &Contents<'_>) -> Result<Judged, String> {
    let replay = match tpm::replay(role(contents, "event_log")?, Bank::Sha256) {
        Ok(replay) => replay,
        Err(error) => return Ok(Judged::from(Err(error))),
    };
    let difference = vector.identity.as_ref().and_then(|identity| {
        identity.iter().find_map(|(name, expected)| {
            let got = match name.as_str() {
                "events" => Value::from(replay.event_count),
                "replay_sha256" => {
                    replay.pcrs.iter().map(|(index, pcr)| (index.to_string(), Value::from(hex::encode(pcr)))).collect::<Identity>().into()
                }
                other => return Some(format!("identity.{other} is not known")),
            };
            differs(name, &got, expected)
        })
    });
    Ok(Judged { result: Ok(()), tcb: None, difference })
}

/// Facts of a quote and of the key that signed it; `more` knows those of one platform.
fn quote_difference(identity: &Identity, quote: &Quote<'_>, path: &Path<'_, '_>, more: &dyn Fn(&str) -> Option<Value>) -> Option<String> {
    identity.iter().find_map(|(name, expected)| {
        let got = match name.as_str() {
            "qualified_signer" => Value::from(hex::encode(quote.qualified_signer)),
            "extra_data" | "nonce" => Value::from(hex::encode(quote.extra_data)),
            "clock" => Value::from(quote.clock_ms),
            "reset_count" => Value::from(quote.reset_count),
            "restart_count" => Value::from(quote.restart_count),
            "safe" => Value::from(u8::from(quote.safe)),
            "firmware_version" => Value::from(format!("{:016x}", quote.firmware_version)),
            "selections" => {
                let set =
                    |set: &crate::tpm::PcrSet| serde_json::json!({ "alg": set.bank().name(), "pcrs": set.indices().collect::<Vec<_>>() });
                Value::from(quote.selections.iter().map(set).collect::<Vec<_>>())
            }
            "pcr_digest" => Value::from(hex::encode(quote.pcr_digest)),
            "trailing" => Value::from(0),
            "ak_subject" => Value::from(text_of(path.leaf().subject())),
            "ak_issuer" => Value::from(text_of(path.leaf().issuer())),
            "root_sha256" => Value::from(hex::encode(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, path.root().der()))),
            "signature_encoding" => Value::from("DER ECDSA P-256/SHA-256"),
            // names of the publisher's files: as many as ours
            "chain" => {
                let same = expected.as_str().is_some_and(|files| files.split(',').count() == path.intermediates().saturating_add(1));
                return (!same).then(|| format!("identity.chain is {} certificates long", path.intermediates().saturating_add(1)));
            }
            other => match more(other) {
                Some(value) => value,
                None => return Some(format!("identity.{other} is not known")),
            },
        };
        differs(name, &got, expected)
    })
}

fn differs(name: &str, got: &Value, expected: &Value) -> Option<String> {
    (got != expected).then(|| format!("identity.{name} is {got}, expected {expected}"))
}

fn json_of(bytes: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("not JSON: {error}"))
}

/// Adds the values of an object `{"0": "<hex>", …}`.
fn add(values: &mut PcrValues, bank: Bank, object: &Value) -> Result<(), AttestError> {
    let field = AttestError::Field { field: "pcrs", why: "not an object of index and hex" };
    let by_index: BTreeMap<&String, &Value> = object.as_object().ok_or(field.clone())?.iter().collect();
    for (index, value) in by_index {
        let index = index.parse().map_err(|_| field.clone())?;
        let value = value.as_str().and_then(|text| hex::decode(text).ok()).ok_or(field.clone())?;
        values.add(bank, index, value)?;
    }
    Ok(())
}

/// A name in RFC 4514's form: last part first, commas inside a value escaped.
fn text_of(name: &X509Name<'_>) -> String {
    let part = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| {
        let oid = attribute.attr_type();
        let kind =
            x509_parser::objects::oid2abbrev(oid, x509_parser::objects::oid_registry()).map_or_else(|_| oid.to_id_string(), str::to_owned);
        let mut value = String::new();
        for character in attribute.as_str().unwrap_or_default().chars() {
            if matches!(character, ',' | '+' | '"' | '\\' | '<' | '>' | ';') {
                value.push('\\');
            }
            value.push(character);
        }
        format!("{kind}={value}")
    };
    let parts: Vec<String> = name.iter_rdn().map(|rdn| rdn.iter().map(part).collect::<Vec<_>>().join("+")).collect();
    parts.into_iter().rev().collect::<Vec<_>>().join(",")
}
