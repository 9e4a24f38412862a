//! `tpm-quote`, `tpm-verify`, `vtpm-attest`: a quote of this machine's TPM by the cloud's attestation key. Owns: making one, judging one by a
//! root that is named. Never: fetches a certificate or list; trusts a certificate that came with a quote.
//! Source: util and deploy reference §1; attestation reference §5.2.

use std::path::Path;

use anyhow::{Context as _, bail};
use dstack_attest::TrustRoots;
use dstack_attest::gcp::{chain_of_pem, verify_ak};
use dstack_attest::tpm::{Bank, PcrValues, Quote, Signature, verify_quote};
use dstack_attest::wire::{PcrValue, TpmPlatform, TpmQuote};
use dstack_attest::x509::{Revocation, Untrusted};
use dstack_protocol::UnixMillis;
use dstack_protocol::codec::sha256;
use dstack_tee::tpm::{AkKind, QUOTED_PCRS, Tpm};
use serde::Deserialize;
use serde_json::{Value, json};

use super::attestation::tpm_json;
use super::{hex_bytes, put};
use crate::files;

/// Largest file of a quote, and of a root.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A quote over 32 bytes.
///
/// # Errors
/// The TPM's.
pub fn quote(tpm: &Tpm, qualifying: [u8; 32]) -> anyhow::Result<TpmQuote> {
    let quoted = tpm.quote(&QUOTED_PCRS, qualifying, AkKind::Cloud)?;
    let value = |(index, value): (u32, [u8; 32])| PcrValue { index, algorithm: "sha256".to_owned(), value: value.to_vec() };
    Ok(TpmQuote {
        message: quoted.message,
        signature: quoted.signature,
        pcr_values: quoted.pcr_values.into_iter().map(value).collect(),
        ak_cert: quoted.certificate,
        platform: TpmPlatform::Gcp,
        event_log: Vec::new(),
    })
}

/// `tpm-quote`: hex of 32 bytes, or of up to 64 that `hash` brings down to 32.
///
/// # Errors
/// The arguments', the TPM's, the system's.
pub fn tpm_quote(tpm: &Tpm, data: Option<&str>, hash: &str, output: Option<&Path>) -> anyhow::Result<()> {
    let data = data.map_or_else(|| Ok(vec![0; 32]), |text| hex_bytes("the qualifying data", text))?;
    if data.len() > 64 {
        bail!("the qualifying data has {} bytes, at most 64 are taken", data.len());
    }
    let qualifying: [u8; 32] = match hash {
        "none" => data.try_into().ok().context("the qualifying data must have 32 bytes; or use --hash-algo sha256")?,
        "sha256" => sha256(&[&data]),
        other => bail!("unknown hash {other:?}: none and sha256 are known"),
    };
    put(output, serde_json::to_string_pretty(&tpm_json(&quote(tpm, qualifying)?))?.as_bytes(), "\n", 0o644)
}

#[derive(Deserialize)]
struct QuoteFile {
    message: String,
    signature: String,
    pcr_values: Vec<PcrFile>,
    ak_cert: String,
}

#[derive(Deserialize)]
struct PcrFile {
    index: u32,
    algorithm: String,
    value: String,
}

/// `tpm-verify`: a file of `tpm-quote`, by the CA certificates in a PEM file: the root last, those between before it. What was proven.
///
/// # Errors
/// The first check that fails.
pub fn tpm_verify(root_ca: &Path, file: &Path, now: UnixMillis) -> anyhow::Result<()> {
    let raw: QuoteFile = serde_json::from_slice(&files::read(file, FILE_BYTES_MAX)?).context("not a file of tpm-quote")?;
    let pcr_values = raw
        .pcr_values
        .into_iter()
        .map(|pcr| Ok(PcrValue { index: pcr.index, algorithm: pcr.algorithm, value: hex_bytes("a PCR's value", &pcr.value)? }));
    let quote = TpmQuote {
        message: hex_bytes("message", &raw.message)?,
        signature: hex_bytes("signature", &raw.signature)?,
        pcr_values: pcr_values.collect::<anyhow::Result<_>>()?,
        ak_cert: hex_bytes("ak_cert", &raw.ak_cert)?,
        platform: TpmPlatform::Gcp,
        event_log: Vec::new(),
    };
    let shown = judge(&quote, &files::read(root_ca, FILE_BYTES_MAX)?, now)?;
    put(None, serde_json::to_string_pretty(&shown)?.as_bytes(), "\n", 0o644)
}

/// Chain, signature, PCR values. Revocation lists are not asked for: there is no network here.
fn judge(evidence: &TpmQuote, authorities: &[u8], now: UnixMillis) -> anyhow::Result<Value> {
    let authorities = chain_of_pem(authorities).context("the CA file is no PEM")?;
    let (root, between) = authorities.split_last().context("the CA file holds no certificate")?;
    let roots = TrustRoots::none().with_software_root(root).context("the root")?;
    let untrusted = Untrusted { presented: &[], pinned: between, crls: &[] };
    let path =
        verify_ak(&evidence.ak_cert, &untrusted, &roots, now, Revocation::WhereGiven).context("the attestation key's certificate")?;
    let signature = Signature::parse(&evidence.signature).context("the signature")?;
    let quote: Quote<'_> = verify_quote(&evidence.message, &signature, path.key()?).context("the quote")?;
    let mut values = PcrValues::default();
    for pcr in &evidence.pcr_values {
        let bank = Bank::named(&pcr.algorithm).with_context(|| format!("a bank of hash {:?}", pcr.algorithm))?;
        values.add(bank, pcr.index, pcr.value.clone())?;
    }
    quote.require_values(&values).context("the PCR values")?;
    let pcrs = evidence.pcr_values.iter().map(|pcr| (format!("{}:{}", pcr.algorithm, pcr.index), Value::from(hex::encode(&pcr.value))));
    Ok(json!({
        "success": true,
        "ak_cert_verified": true,
        "quote_verified": true,
        "revocation_checked": false,
        "qualifying_data": hex::encode(quote.extra_data),
        "pcrs": pcrs.collect::<serde_json::Map<_, _>>(),
    }))
}

/// `vtpm-attest`: a quote over SHA-256 of the nonce, judged at once.
///
/// # Errors
/// The TPM's, or the first check that fails.
pub fn vtpm_attest(tpm: &Tpm, root_ca: &Path, nonce: &str, format: &str, now: UnixMillis) -> anyhow::Result<()> {
    let evidence = quote(tpm, sha256(&[nonce.as_bytes()]))?;
    let mut shown = judge(&evidence, &files::read(root_ca, FILE_BYTES_MAX)?, now)?;
    if let Some(members) = shown.as_object_mut() {
        members.insert("nonce".to_owned(), nonce.into());
    }
    match format {
        "json" => put(None, serde_json::to_string_pretty(&shown)?.as_bytes(), "\n", 0o644),
        "text" => put(None, format!("attestation key: verified\nquote: verified\nnonce: {nonce}\n").as_bytes(), "", 0o644),
        other => bail!("unknown format {other:?}: text and json are known"),
    }
}
