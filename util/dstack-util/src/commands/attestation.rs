//! `attest`, `quote-report`, `attest-info`, `attest-json`, `attest-strip`. Owns: files of versioned evidence. Never: verifies one (`dstack
//! evidence verify` does). Evidence is made whole, with its event log and the host's VmConfig; `attest-strip` makes of it what certificates
//! carry.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use dstack_attest::wire::{ATTESTATION_BYTES_MAX, Attestation, Encoding, PlatformEvidence, TdxEvent};
use dstack_protocol::Platform;
use dstack_tee::Boot;
use dstack_tee::software::protocol::{HexArray, HexBytes};
use serde_json::{Value, json};

use super::{hex_bytes, put, report_data};
use crate::files;
use crate::machine::Machine;
use crate::setup::host_shared::{SYS_CONFIG, SysConfig};

/// Where evidence is, if nothing else is said.
pub const DEFAULT_FILE: &str = "attestation.bin";
/// Where stripped evidence goes, if nothing else is said.
pub const DEFAULT_STRIPPED: &str = "attestation.strip.bin";

/// Evidence over `data`. `app_id`: what an enclave claims; elsewhere the id is measured and this is ignored. `sys_config`: the host's file,
/// whose VmConfig goes along where the device has none.
///
/// # Errors
/// The device's, the file's, or an id that is not of 20 bytes.
pub fn evidence(machine: &Machine, data: Option<&str>, app_id: Option<&str>, sys_config: &Path) -> anyhow::Result<Vec<u8>> {
    let report_data = report_data(data)?;
    let vm_config = match files::read_if_there(sys_config, SYS_CONFIG.limit_bytes)? {
        Some(bytes) => SysConfig::parse(&bytes)?.vm_config,
        None => String::new(),
    };
    if let Some(text) = app_id {
        let id: [u8; 20] = hex_bytes("app_id", text)?.try_into().ok().context("app_id must be exactly 20 bytes (40 hex characters)")?;
        if machine.device().platform() == Platform::Nitro {
            let boot = Boot { compose: HexBytes(Vec::new()), app_id: Some(HexArray(id)), instance_seed: None, key_provider: None };
            machine.device().boot_app(boot)?;
        }
    }
    Ok(dstack_tee::with_vm_config(machine.device().whole_evidence(report_data)?, &vm_config)?)
}

/// `attest`: a file, or hex.
///
/// # Errors
/// The system's.
pub fn attest(evidence: &[u8], output: Option<PathBuf>, as_hex: bool) -> anyhow::Result<()> {
    if as_hex {
        return put(output.as_deref(), hex::encode(evidence).as_bytes(), "\n", 0o644);
    }
    put(Some(&output.unwrap_or_else(|| DEFAULT_FILE.into())), evidence, "", 0o644)
}

/// `quote-report`: the question of dstack's verifier.
///
/// # Errors
/// The system's.
pub fn quote_report(evidence: &[u8], output: Option<&Path>) -> anyhow::Result<()> {
    let question = json!({ "attestation": hex::encode(evidence) });
    put(output, serde_json::to_string_pretty(&question)?.as_bytes(), "\n", 0o644)
}

fn read(input: Option<PathBuf>) -> anyhow::Result<(PathBuf, Vec<u8>, Attestation)> {
    let input = input.unwrap_or_else(|| DEFAULT_FILE.into());
    let bytes = files::read(&input, ATTESTATION_BYTES_MAX as u64)?;
    let attestation = Attestation::decode(&bytes).with_context(|| format!("{} is no evidence", input.display()))?;
    Ok((input, bytes, attestation))
}

/// `attest-info`: what it is made of, by size.
///
/// # Errors
/// The file's.
pub fn info(input: Option<PathBuf>) -> anyhow::Result<()> {
    let (input, bytes, attestation) = read(input)?;
    put(None, described(&input, &bytes, &attestation)?.as_bytes(), "", 0o644)
}

fn described(input: &Path, bytes: &[u8], attestation: &Attestation) -> anyhow::Result<String> {
    let version = match Encoding::of(bytes)? {
        Encoding::ScaleV0 => "V0",
        Encoding::MsgpackV1 => "V1",
    };
    let (quote, log, tpm) = match &attestation.platform {
        PlatformEvidence::Tdx(td) => (td.quote.len(), td.event_log.as_slice(), 0),
        PlatformEvidence::GcpTdx(td, tpm) => {
            (td.quote.len(), td.event_log.as_slice(), tpm.message.len().saturating_add(tpm.signature.len()))
        }
        _ => (0, &[][..], 0),
    };
    let log_bytes = if log.is_empty() { 0 } else { TdxEvent::log_to_json(log).len() };
    Ok(format!(
        "file: {}\ntotal_bytes: {}\nversion: {version}\nmode: {}\nconfig_bytes: {}\ntdx_quote_bytes: {quote}\nevent_log_entries: {}\n\
         event_log_json_bytes: {log_bytes}\ntpm_quote_bytes: {tpm}\nruntime_events: {}\n",
        input.display(),
        bytes.len(),
        attestation.platform.platform().name(),
        attestation.config.len(),
        log.len(),
        attestation.runtime_events.len(),
    ))
}

/// `attest-json`: all of it as JSON.
///
/// # Errors
/// The file's, and the system's.
pub fn to_json(input: Option<PathBuf>, output: Option<&Path>) -> anyhow::Result<()> {
    let (_, bytes, attestation) = read(input)?;
    put(output, serde_json::to_string_pretty(&json_of(&bytes, &attestation)?)?.as_bytes(), "\n", 0o644)
}

fn json_of(bytes: &[u8], attestation: &Attestation) -> anyhow::Result<Value> {
    let log = |log: &[TdxEvent]| serde_json::from_str::<Value>(&TdxEvent::log_to_json(log));
    let (mut tdx_quote, mut tpm_quote, mut document) = (Value::Null, Value::Null, Value::Null);
    match &attestation.platform {
        PlatformEvidence::Tdx(td) => tdx_quote = json!({ "quote": hex::encode(&td.quote), "event_log": log(&td.event_log)? }),
        PlatformEvidence::GcpTdx(td, tpm) => {
            tdx_quote = json!({ "quote": hex::encode(&td.quote), "event_log": log(&td.event_log)? });
            tpm_quote = tpm_json(tpm);
        }
        PlatformEvidence::NitroEnclave { nsm_quote } => document = hex::encode(nsm_quote).into(),
        PlatformEvidence::NitroTpm { attestation_doc } => document = hex::encode(attestation_doc).into(),
        PlatformEvidence::SevSnp { report, .. } => document = hex::encode(report).into(),
    }
    let version = match Encoding::of(bytes)? {
        Encoding::ScaleV0 => "V0",
        Encoding::MsgpackV1 => "V1",
    };
    let events = attestation.runtime_events.iter().map(|event| json!({ "event": event.event, "payload": hex::encode(&event.payload) }));
    Ok(json!({
        "version": version,
        "mode": attestation.platform.platform().name(),
        "config": attestation.config,
        "report_data": hex::encode(attestation.report_data),
        "runtime_events": events.collect::<Vec<_>>(),
        "tdx_quote": tdx_quote,
        "tpm_quote": tpm_quote,
        "document": document,
    }))
}

/// A TPM quote as JSON, bytes as hex.
#[must_use]
pub fn tpm_json(tpm: &dstack_attest::wire::TpmQuote) -> Value {
    let pcrs = tpm.pcr_values.iter();
    let pcrs = pcrs.map(|pcr| json!({ "index": pcr.index, "algorithm": pcr.algorithm, "value": hex::encode(&pcr.value) }));
    let events = tpm.event_log.iter().map(|event| json!({ "pcr_index": event.pcr_index, "digest": hex::encode(&event.digest) }));
    json!({
        "message": hex::encode(&tpm.message),
        "signature": hex::encode(&tpm.signature),
        "pcr_values": pcrs.collect::<Vec<_>>(),
        "ak_cert": hex::encode(&tpm.ak_cert),
        "platform": format!("{:?}", tpm.platform),
        "event_log": events.collect::<Vec<_>>(),
    })
}

/// `attest-strip`: for a certificate.
///
/// # Errors
/// The file's, and the system's.
pub fn strip(input: Option<PathBuf>, output: Option<PathBuf>) -> anyhow::Result<()> {
    let (_, _, attestation) = read(input)?;
    put(Some(&output.unwrap_or_else(|| DEFAULT_STRIPPED.into())), &attestation.stripped().encode(), "", 0o644)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_evidence_is_described_and_turned_to_json() {
        let mut world = dstack_testkit::World::new().unwrap();
        let text = world.tdx("m").unwrap();
        let log = world.dir().join("events");
        let machine = Machine::open(Some(&text), Some(&log)).unwrap();
        machine.measure(&crate::machine::event("app-id", &[1; 20])).unwrap();
        let (file, sys_config) = (world.dir().join("attestation.bin"), world.dir().join(".sys-config.json"));
        std::fs::write(&sys_config, r#"{"vm_config":"{\"cpu_count\":7}"}"#).unwrap();
        let made = evidence(&machine, Some("ab"), Some(&"11".repeat(20)), &sys_config).unwrap();
        attest(&made, Some(file.clone()), false).unwrap();
        let (_, bytes, attestation) = read(Some(file.clone())).unwrap();
        assert_eq!(attestation.report_data[0], 0xab);
        let text = described(&file, &bytes, &attestation).unwrap();
        assert!(text.contains("version: V0\nmode: ") && text.contains("runtime_events: 1\n"), "{text}");
        let json = json_of(&bytes, &attestation).unwrap();
        assert_eq!(json["runtime_events"][0]["event"], "app-id");
        assert_eq!(json["tdx_quote"]["event_log"][0]["digest"].as_str().unwrap().len(), 96, "whole, as dstack's attest makes it");
        let own = Attestation::decode(&machine.device().evidence([0; 64]).unwrap()).unwrap().config;
        assert_eq!(json["config"], if own.is_empty() { r#"{"cpu_count":7}"#.to_owned() } else { own }, "the host's where there is none");
        let stripped = world.dir().join("stripped");
        strip(Some(file.clone()), Some(stripped.clone())).unwrap();
        let stripped = std::fs::read(stripped).unwrap();
        assert!(json_of(&stripped, &Attestation::decode(&stripped).unwrap()).unwrap()["tdx_quote"]["event_log"][0]["digest"] == "");
        for evidence in [&bytes, &stripped] {
            world.verify(evidence).unwrap();
        }
        assert!(evidence(&machine, None, Some("11"), &sys_config).unwrap_err().to_string().contains("20 bytes"));
        std::fs::write(&sys_config, "[]").unwrap();
        assert!(evidence(&machine, None, None, &sys_config).unwrap_err().to_string().contains(".sys-config.json"));
        std::fs::write(&file, b"\0\0").unwrap();
        assert!(info(Some(file)).is_err());
    }
}
