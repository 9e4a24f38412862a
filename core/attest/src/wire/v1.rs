//! msgpack V1 of the versioned attestation: named maps. Owns: its members and their byte forms. A reader takes members
//! in any order, ignores unknown ones (as dstack's own does) and reads either byte form.
//! Source: dstack attestation reference, section 2.2.

use super::msgpack::{Map, Reader, put_array, put_bin, put_int_array, put_map, put_text, put_unsigned};
use super::{
    Attestation, EVENTS_MAX, EventVersion, ITEMS_MAX, PcrValue, PlatformEvidence, RuntimeEvent, TdxEvent, TdxEvidence, TpmEvent,
    TpmPlatform, TpmQuote,
};
use crate::AttestError;
use sha2::{Digest, Sha512};

pub(super) fn decode(bytes: &[u8]) -> Result<Attestation, AttestError> {
    let mut reader = Reader::new(bytes);
    let top = reader.map("attestation")?;
    reader.end("attestation")?;
    let version = top.member("version")?.unsigned("version")?;
    if version != 1 {
        return Err(AttestError::UnsupportedVersion { part: "attestation", got: version });
    }
    let platform = platform(&top.member("platform")?.map("platform")?)?;
    let stack = top.member("stack")?.map("stack")?;
    let data = stack.member("data")?.map("stack data")?;
    let report_data = data.member("report_data")?.bytes("report_data")?;
    let report_data = <[u8; 64]>::try_from(report_data).map_err(|_| AttestError::Field { field: "report_data", why: "not 64 bytes" })?;
    let runtime_events = data.member("runtime_events")?.array("runtime_events", EVENTS_MAX, runtime_event)?;
    let config = data.member("config")?.text("config")?.to_owned();
    let report_data_payload = match stack.member("kind")?.text("stack kind")? {
        "dstack" => None,
        "dstack-pod" => {
            let payload = data.member("report_data_payload")?.text("report_data_payload")?;
            // section 2.2: stack `dstack-pod` requires report_data == H512("app-data:" ‖ payload)
            if Sha512::new().chain_update(b"app-data:").chain_update(payload).finalize().as_slice() != report_data.as_slice() {
                return Err(AttestError::ReportData);
            }
            Some(payload.to_owned())
        }
        _ => return Err(AttestError::Field { field: "stack kind", why: "neither dstack nor dstack-pod" }),
    };
    Ok(Attestation { platform, report_data, runtime_events, config, report_data_payload })
}

fn platform(map: &Map<'_>) -> Result<PlatformEvidence, AttestError> {
    let data = map.member("data")?.map("platform data")?;
    match map.member("kind")?.text("platform kind")? {
        "tdx" => Ok(PlatformEvidence::Tdx(tdx(&data)?)),
        "gcp-tdx" => Ok(PlatformEvidence::GcpTdx(tdx(&data)?, tpm_quote(&data.member("tpm_quote")?.map("tpm_quote")?)?)),
        "nitro-enclave" => Ok(PlatformEvidence::NitroEnclave { nsm_quote: data.member("nsm_quote")?.bytes("nsm_quote")? }),
        "aws-nitro-tpm" => Ok(PlatformEvidence::NitroTpm { attestation_doc: data.member("attestation_doc")?.bytes("attestation_doc")? }),
        "sev-snp" => Ok(PlatformEvidence::SevSnp {
            report: data.member("report")?.bytes("report")?,
            cert_chain: data.member("cert_chain")?.array("cert_chain", ITEMS_MAX, |r| r.bytes("certificate"))?,
            mr_config: data.member("mr_config")?.text("mr_config")?.to_owned(),
        }),
        _ => Err(AttestError::Field { field: "platform kind", why: "not a known platform" }),
    }
}

fn event_version(map: &Map<'_>) -> Result<EventVersion, AttestError> {
    let Some(mut reader) = map.optional("version") else { return Ok(EventVersion::V1) };
    match reader.unsigned("event version")? {
        1 => Ok(EventVersion::V1),
        2 => Ok(EventVersion::V2),
        got => Err(AttestError::UnsupportedVersion { part: "runtime event", got }),
    }
}

fn runtime_event(reader: &mut Reader<'_>) -> Result<RuntimeEvent, AttestError> {
    let map = reader.map("runtime event")?;
    Ok(RuntimeEvent {
        event: map.member("event")?.text("event")?.to_owned(),
        payload: map.member("payload")?.bytes("payload")?,
        version: event_version(&map)?,
    })
}

fn tdx(data: &Map<'_>) -> Result<TdxEvidence, AttestError> {
    let quote = data.member("quote")?.bytes("quote")?;
    let event_log = data.member("event_log")?.array("event_log", EVENTS_MAX, |reader| {
        let map = reader.map("event")?;
        let preimage = match map.optional("preimage") {
            Some(mut reader) => preimage(&mut reader)?,
            None => None,
        };
        Ok(TdxEvent {
            imr: map.member("imr")?.u32("imr")?,
            event_type: map.member("event_type")?.u32("event_type")?,
            digest: map.member("digest")?.bytes("digest")?,
            event: map.member("event")?.text("event")?.to_owned(),
            event_payload: map.member("event_payload")?.bytes("event_payload")?,
            version: event_version(&map)?,
            preimage,
        })
    })?;
    Ok(TdxEvidence { quote, event_log })
}

/// Hex text, or nil.
fn preimage(reader: &mut Reader<'_>) -> Result<Option<Vec<u8>>, AttestError> {
    if reader.nil() {
        return Ok(None);
    }
    let bytes = hex::decode(reader.text("preimage")?);
    bytes.map(Some).map_err(|_| AttestError::Field { field: "preimage", why: "not hex" })
}

fn tpm_quote(map: &Map<'_>) -> Result<TpmQuote, AttestError> {
    Ok(TpmQuote {
        message: map.member("message")?.bytes("message")?,
        signature: map.member("signature")?.bytes("signature")?,
        pcr_values: map.member("pcr_values")?.array("pcr_values", ITEMS_MAX, |reader| {
            let pcr = reader.map("pcr value")?;
            Ok(PcrValue {
                index: pcr.member("index")?.u32("index")?,
                algorithm: pcr.member("algorithm")?.text("algorithm")?.to_owned(),
                value: pcr.member("value")?.bytes("value")?,
            })
        })?,
        ak_cert: map.member("ak_cert")?.bytes("ak_cert")?,
        platform: {
            let named = map.member("platform")?.text("tpm platform").map(TpmPlatform::from_name);
            let platform = match named {
                Ok(platform) => platform,
                Err(_) => TpmPlatform::from_index(map.member("platform")?.unsigned("tpm platform")?),
            };
            platform.ok_or(AttestError::Field { field: "tpm platform", why: "not a known platform" })?
        },
        event_log: map.member("event_log")?.array("tpm event_log", EVENTS_MAX, |reader| {
            let event = reader.map("tpm event")?;
            Ok(TpmEvent { pcr_index: event.member("pcr_index")?.u32("pcr_index")?, digest: event.member("digest")?.bytes("digest")? })
        })?,
    })
}

pub(super) fn encode(attestation: &Attestation) -> Vec<u8> {
    let out = &mut Vec::new();
    put_map(out, 3);
    put_text(out, "version");
    put_unsigned(out, 1);
    put_text(out, "platform");
    put_platform(out, &attestation.platform);
    put_text(out, "stack");
    put_stack(out, attestation);
    std::mem::take(out)
}

fn put_kind(out: &mut Vec<u8>, kind: &str, members: usize) {
    put_map(out, 2);
    put_text(out, "kind");
    put_text(out, kind);
    put_text(out, "data");
    put_map(out, members);
}

fn put_stack(out: &mut Vec<u8>, attestation: &Attestation) {
    match attestation.report_data_payload {
        None => put_kind(out, "dstack", 3),
        Some(_) => put_kind(out, "dstack-pod", 4),
    }
    put_text(out, "report_data");
    put_int_array(out, &attestation.report_data);
    put_text(out, "runtime_events");
    put_array(out, attestation.runtime_events.len());
    for event in &attestation.runtime_events {
        put_map(out, if event.version == EventVersion::V2 { 3 } else { 2 });
        put_text(out, "event");
        put_text(out, &event.event);
        put_text(out, "payload");
        put_bin(out, &event.payload);
        put_event_version(out, event.version);
    }
    put_text(out, "config");
    put_text(out, &attestation.config);
    if let Some(payload) = &attestation.report_data_payload {
        put_text(out, "report_data_payload");
        put_text(out, payload);
    }
}

fn put_event_version(out: &mut Vec<u8>, version: EventVersion) {
    if version == EventVersion::V2 {
        put_text(out, "version");
        put_unsigned(out, 2);
    }
}

fn put_platform(out: &mut Vec<u8>, platform: &PlatformEvidence) {
    match platform {
        PlatformEvidence::Tdx(evidence) => {
            put_kind(out, "tdx", 2);
            put_tdx(out, evidence);
        }
        PlatformEvidence::GcpTdx(evidence, quote) => {
            put_kind(out, "gcp-tdx", 3);
            put_tdx(out, evidence);
            put_text(out, "tpm_quote");
            put_tpm_quote(out, quote);
        }
        PlatformEvidence::NitroEnclave { nsm_quote } => {
            put_kind(out, "nitro-enclave", 1);
            put_text(out, "nsm_quote");
            put_int_array(out, nsm_quote);
        }
        PlatformEvidence::NitroTpm { attestation_doc } => {
            put_kind(out, "aws-nitro-tpm", 1);
            put_text(out, "attestation_doc");
            put_int_array(out, attestation_doc);
        }
        PlatformEvidence::SevSnp { report, cert_chain, mr_config } => {
            put_kind(out, "sev-snp", 3);
            put_text(out, "report");
            put_int_array(out, report);
            put_text(out, "cert_chain");
            put_array(out, cert_chain.len());
            cert_chain.iter().for_each(|certificate| put_int_array(out, certificate));
            put_text(out, "mr_config");
            put_text(out, mr_config);
        }
    }
}

fn put_tdx(out: &mut Vec<u8>, evidence: &TdxEvidence) {
    put_text(out, "quote");
    put_int_array(out, &evidence.quote);
    put_text(out, "event_log");
    put_array(out, evidence.event_log.len());
    for event in &evidence.event_log {
        let extra = usize::from(event.version == EventVersion::V2).saturating_add(usize::from(event.preimage.is_some()));
        put_map(out, extra.saturating_add(5));
        put_text(out, "imr");
        put_unsigned(out, event.imr.into());
        put_text(out, "event_type");
        put_unsigned(out, event.event_type.into());
        put_text(out, "digest");
        put_bin(out, &event.digest);
        put_text(out, "event");
        put_text(out, &event.event);
        put_text(out, "event_payload");
        put_bin(out, &event.event_payload);
        put_event_version(out, event.version);
        if let Some(preimage) = &event.preimage {
            put_text(out, "preimage");
            put_text(out, &hex::encode(preimage));
        }
    }
}

fn put_tpm_quote(out: &mut Vec<u8>, quote: &TpmQuote) {
    put_map(out, 6);
    put_text(out, "message");
    put_bin(out, &quote.message);
    put_text(out, "signature");
    put_bin(out, &quote.signature);
    put_text(out, "pcr_values");
    put_array(out, quote.pcr_values.len());
    for pcr in &quote.pcr_values {
        put_map(out, 3);
        put_text(out, "index");
        put_unsigned(out, pcr.index.into());
        put_text(out, "algorithm");
        put_text(out, &pcr.algorithm);
        put_text(out, "value");
        put_bin(out, &pcr.value);
    }
    put_text(out, "ak_cert");
    put_bin(out, &quote.ak_cert);
    put_text(out, "platform");
    put_text(out, quote.platform.name());
    put_text(out, "event_log");
    put_array(out, quote.event_log.len());
    for event in &quote.event_log {
        put_map(out, 2);
        put_text(out, "pcr_index");
        put_unsigned(out, event.pcr_index.into());
        put_text(out, "digest");
        put_bin(out, &event.digest);
    }
}
