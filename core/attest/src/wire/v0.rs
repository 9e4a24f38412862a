//! SCALE V0 of the versioned attestation. Owns: its layout. Source: dstack attestation reference, section 2.1.

use super::scale::{Reader, put_bytes, put_compact};
use super::{
    Attestation, EVENTS_MAX, EventVersion, ITEMS_MAX, PcrValue, PlatformEvidence, RuntimeEvent, TdxEvent, TdxEvidence, TpmEvent,
    TpmPlatform, TpmQuote,
};
use crate::AttestError;

pub(super) fn decode(bytes: &[u8]) -> Result<Attestation, AttestError> {
    let mut reader = Reader::new(bytes);
    let version = reader.u8("version")?;
    if version != 0 {
        return Err(AttestError::UnsupportedVersion { part: "attestation", got: version.into() });
    }
    let platform = platform(&mut reader)?;
    let runtime_events = reader.vec("runtime_events", EVENTS_MAX, 2, |r| {
        Ok(RuntimeEvent { event: r.text("event")?, payload: r.bytes("payload")?.to_vec(), version: EventVersion::V1 })
    })?;
    let report_data = reader.array("report_data")?;
    let config = reader.text("config")?;
    reader.end("attestation")?;
    Ok(Attestation { platform, report_data, runtime_events, config, report_data_payload: None })
}

fn platform(reader: &mut Reader<'_>) -> Result<PlatformEvidence, AttestError> {
    match reader.u8("platform")? {
        0 => Ok(PlatformEvidence::Tdx(tdx(reader)?)),
        1 => Ok(PlatformEvidence::GcpTdx(tdx(reader)?, tpm_quote(reader)?)),
        2 => Ok(PlatformEvidence::NitroEnclave { nsm_quote: reader.bytes("nsm_quote")?.to_vec() }),
        3 => Ok(PlatformEvidence::SevSnp {
            report: reader.bytes("report")?.to_vec(),
            cert_chain: reader.vec("cert_chain", ITEMS_MAX, 1, |r| r.bytes("certificate").map(<[u8]>::to_vec))?,
            mr_config: reader.text("mr_config")?,
        }),
        4 => Ok(PlatformEvidence::NitroTpm { attestation_doc: reader.bytes("attestation_doc")?.to_vec() }),
        got => Err(AttestError::UnsupportedVersion { part: "platform", got: got.into() }),
    }
}

fn tdx(reader: &mut Reader<'_>) -> Result<TdxEvidence, AttestError> {
    let quote = reader.bytes("quote")?.to_vec();
    let event_log = reader.vec("event_log", EVENTS_MAX, 11, |r| {
        Ok(TdxEvent {
            imr: r.u32("imr")?,
            event_type: r.u32("event_type")?,
            digest: r.bytes("digest")?.to_vec(),
            event: r.text("event")?,
            event_payload: r.bytes("event_payload")?.to_vec(),
            version: EventVersion::V1,
            preimage: None,
        })
    })?;
    Ok(TdxEvidence { quote, event_log })
}

fn tpm_quote(reader: &mut Reader<'_>) -> Result<TpmQuote, AttestError> {
    Ok(TpmQuote {
        message: reader.bytes("message")?.to_vec(),
        signature: reader.bytes("signature")?.to_vec(),
        pcr_values: reader.vec("pcr_values", ITEMS_MAX, 6, |r| {
            Ok(PcrValue { index: r.u32("index")?, algorithm: r.text("algorithm")?, value: r.bytes("value")?.to_vec() })
        })?,
        ak_cert: reader.bytes("ak_cert")?.to_vec(),
        platform: {
            let index = reader.u8("tpm platform")?;
            TpmPlatform::from_index(index.into()).ok_or(AttestError::UnsupportedVersion { part: "tpm platform", got: index.into() })?
        },
        event_log: reader.vec("tpm event_log", EVENTS_MAX, 5, |r| {
            Ok(TpmEvent { pcr_index: r.u32("pcr_index")?, digest: r.bytes("digest")?.to_vec() })
        })?,
    })
}

pub(super) fn encode(attestation: &Attestation) -> Vec<u8> {
    let mut out = vec![0];
    match &attestation.platform {
        PlatformEvidence::Tdx(evidence) => {
            out.push(0);
            put_tdx(&mut out, evidence);
        }
        PlatformEvidence::GcpTdx(evidence, quote) => {
            out.push(1);
            put_tdx(&mut out, evidence);
            put_tpm_quote(&mut out, quote);
        }
        PlatformEvidence::NitroEnclave { nsm_quote } => {
            out.push(2);
            put_bytes(&mut out, nsm_quote);
        }
        PlatformEvidence::SevSnp { report, cert_chain, mr_config } => {
            out.push(3);
            put_bytes(&mut out, report);
            put_compact(&mut out, cert_chain.len());
            cert_chain.iter().for_each(|certificate| put_bytes(&mut out, certificate));
            put_bytes(&mut out, mr_config.as_bytes());
        }
        PlatformEvidence::NitroTpm { attestation_doc } => {
            out.push(4);
            put_bytes(&mut out, attestation_doc);
        }
    }
    put_compact(&mut out, attestation.runtime_events.len());
    for event in &attestation.runtime_events {
        put_bytes(&mut out, event.event.as_bytes());
        put_bytes(&mut out, &event.payload);
    }
    out.extend_from_slice(&attestation.report_data);
    put_bytes(&mut out, attestation.config.as_bytes());
    out
}

fn put_tdx(out: &mut Vec<u8>, evidence: &TdxEvidence) {
    put_bytes(out, &evidence.quote);
    put_compact(out, evidence.event_log.len());
    for event in &evidence.event_log {
        out.extend_from_slice(&event.imr.to_le_bytes());
        out.extend_from_slice(&event.event_type.to_le_bytes());
        put_bytes(out, &event.digest);
        put_bytes(out, event.event.as_bytes());
        put_bytes(out, &event.event_payload);
    }
}

fn put_tpm_quote(out: &mut Vec<u8>, quote: &TpmQuote) {
    put_bytes(out, &quote.message);
    put_bytes(out, &quote.signature);
    put_compact(out, quote.pcr_values.len());
    for pcr in &quote.pcr_values {
        out.extend_from_slice(&pcr.index.to_le_bytes());
        put_bytes(out, pcr.algorithm.as_bytes());
        put_bytes(out, &pcr.value);
    }
    put_bytes(out, &quote.ak_cert);
    out.push(quote.platform as u8);
    put_compact(out, quote.event_log.len());
    for event in &quote.event_log {
        out.extend_from_slice(&event.pcr_index.to_le_bytes());
        put_bytes(out, &event.digest);
    }
}
