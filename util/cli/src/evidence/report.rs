//! How a judgement is printed. Owns: the lines and the JSON form (docs/evidence.schema.json). Never: judges.

use dstack_attest::nitro::VerifiedDocument;
use dstack_attest::tdx::VerifiedTd;
use dstack_attest::{AttestError, Check, VerifiedIdentity};
use dstack_protocol::UnixMillis;
use serde_json::{Map, Value, json};

use super::judge::Proven;
use super::source::Form;
use crate::failure::{Done, Failure};

/// Format of the JSON form; a change of meaning gets another number.
const FORMAT: u32 = 1;

/// What became of one piece of evidence.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) form: Form,
    pub(super) at: UnixMillis,
    /// Checks that were begun; the last one refused, if there was a refusal.
    pub(super) checks: Vec<&'static Check>,
    pub(super) outcome: Result<Proven, AttestError>,
}

impl Judged {
    /// As the program's answer.
    pub(super) fn done(&self, as_json: bool) -> Done {
        let text = if as_json { format!("{}\n", self.json()) } else { self.text() };
        match &self.outcome {
            Ok(_) => Ok(text),
            Err(error) => Err(Failure::wrong(format!("{}: {error}", error.class()), error.explain().fix).with_stdout(text)),
        }
    }

    fn failed(&self) -> Option<&'static Check> {
        self.outcome.as_ref().err().and(self.checks.last().copied())
    }

    /// Each check that was begun, and whether it passed.
    pub(super) fn steps(&self) -> impl Iterator<Item = (&'static Check, bool)> {
        let passed = if self.outcome.is_ok() { self.checks.len() } else { self.checks.len().saturating_sub(1) };
        self.checks.iter().enumerate().map(move |(at, check)| (*check, at < passed))
    }

    fn json(&self) -> Value {
        let checks: Vec<Value> = self
            .steps()
            .map(|(check, passed)| {
                let outcome = if passed { "passed" } else { "refused" };
                json!({"id": check.id, "what": check.what, "source": check.source, "outcome": outcome})
            })
            .collect();
        let refusal = self.outcome.as_ref().err().map(|error| {
            let words = error.explain();
            json!({
                "class": error.class().as_str(), "check": self.failed().map(|check| check.id), "detail": error.to_string(),
                "expected": words.expected, "got": words.got, "fix": words.fix,
            })
        });
        json!({
            "format": FORMAT,
            "result": if refusal.is_none() { "ok" } else { "reject" },
            "form": self.form.name(),
            "judged_at_unix_ms": self.at.0,
            "checks": checks,
            "refusal": refusal,
            "proven": self.outcome.as_ref().ok().map(|proven| Value::Object(fields(proven))),
        })
    }

    fn text(&self) -> String {
        let mut out = format!("result={}\n", if self.outcome.is_ok() { "ok" } else { "reject" });
        if let Err(error) = &self.outcome {
            let words = error.explain();
            out += &format!("class={}\n", error.class());
            out += &self.failed().map(|check| format!("check={}\n", check.id)).unwrap_or_default();
            out += &format!("expected={}\ngot={}\n", words.expected, words.got);
        }
        for (check, passed) in self.steps() {
            out += &format!("{} {}: {}\n", if passed { "passed " } else { "REFUSED" }, check.id, check.what);
        }
        let Ok(proven) = &self.outcome else { return out };
        let fields = fields(proven);
        out += &plain(&fields);
        if fields.get("software_root") == Some(&json!(true)) {
            out += "warning: the chain ends at a software root; no hardware stands behind this\n";
        }
        out
    }
}

/// `name=value` lines.
pub(super) fn plain(fields: &Map<String, Value>) -> String {
    let value = |value: &Value| match value {
        Value::String(text) => text.escape_debug().to_string(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    fields.iter().map(|(name, content)| format!("{name}={}\n", value(content))).collect()
}

fn fields(proven: &Proven) -> Map<String, Value> {
    let fields = match proven {
        Proven::Identity(identity) => of_identity(identity),
        Proven::Td(td) => of_td(td),
        Proven::Document(document) => of_document(document),
    };
    match fields {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

fn of_identity(identity: &VerifiedIdentity) -> Value {
    json!({
        "platform": identity.platform().name(),
        "software_root": identity.software_root(),
        "tcb_status": identity.tcb_status().name(),
        "advisory_ids": identity.advisory_ids(),
        "app_id": identity.app_id().map(|app| app.to_string()),
        "app_id_is_proven": identity.platform().binds_events(),
        "compose_hash": identity.compose_hash().map(hex::encode),
        "instance_id": hex::encode(identity.instance_id()),
        "os_image_hash": identity.os_image_hash().map(hex::encode),
        "measurement": hex::encode(identity.measurement()),
        "platform_identity": hex::encode(identity.platform_identity()),
        "device_id": hex::encode(identity.device_id()),
        "mr_aggregated": hex::encode(identity.mr_aggregated()),
        "mr_system": hex::encode(identity.mr_system()),
        "key_provider": String::from_utf8_lossy(identity.key_provider()),
        "report_data": hex::encode(identity.report_data()),
        "earliest_expiry_unix_ms": identity.earliest_expiry().0,
        "evidence_hash": hex::encode(identity.evidence_hash()),
    })
}

fn of_td(td: &VerifiedTd) -> Value {
    let body = td.body();
    json!({
        "quote_version": td.quote_version(),
        "software_root": td.software_root(),
        "tcb_status": td.tcb().overall.status.name(),
        "advisory_ids": td.tcb().overall.advisory_ids,
        "fmspc": hex::encode(td.pck().fmspc),
        "ppid": hex::encode(td.pck().ppid),
        "mr_td": hex::encode(body.mr_td),
        "rtmr": body.rtmr.map(hex::encode),
        "td_attributes": hex::encode(body.td_attributes),
        "report_data": hex::encode(body.report_data),
        "earliest_expiry_unix_ms": td.earliest_expiry_ms(),
    })
}

fn of_document(document: &VerifiedDocument) -> Value {
    let pcrs: Map<String, Value> = document.pcrs().iter().map(|(index, value)| (index.to_string(), json!(hex::encode(value)))).collect();
    json!({
        "module_id": document.module_id(),
        "software_root": document.software_root(),
        "timestamp_unix_ms": document.timestamp().0,
        "pcrs": pcrs,
        "user_data": document.user_data().map(hex::encode),
        "nonce": document.nonce().map(hex::encode),
        "public_key": document.public_key().map(hex::encode),
        "earliest_expiry_unix_ms": document.earliest_expiry().0,
    })
}
