//! `Tappd`, the legacy API, and what `Worker` has beyond `Info` and `Version`. Owns: their rules. Never: HTTP.
//! Source: guest API reference §4, §5.

use std::sync::Arc;

use dstack_attest::wire::CertificateConfig;
use dstack_prpc::guest::{
    DeriveK256KeyResponse, DeriveKeyArgs, GetAttestationForAppKeyRequest, GetKeyArgs, GetQuoteResponse, GetTlsKeyResponse, RawQuoteArgs,
    TdxQuoteArgs, TdxQuoteResponse,
};

use crate::api::{ApiError, app_key, td_quote, tls_key_response};
use crate::app_key::{Algorithm, AppKeyError, TEXT_BYTES_MAX, derive, kdf};
use crate::certify::{certify, fresh_scalar};
use crate::guest::Guest;
use crate::report_data::{of_app_key, tagged, whole};
use crate::signing;

/// `DeriveKey`: the same bytes as `GetKey` of that path, used as a P-256 scalar.
pub(crate) async fn derive_key(guest: &Arc<Guest>, args: DeriveKeyArgs) -> Result<GetTlsKeyResponse, ApiError> {
    if args.path.len() > TEXT_BYTES_MAX {
        return Err(AppKeyError::TooLong { field: "path", have_bytes: args.path.len() }.into());
    }
    let scalar = if args.random_seed {
        fresh_scalar()?.expose(|seed| kdf(seed, args.path.as_bytes()))
    } else {
        app_key(guest)?.expose(|ikm| kdf(ikm, args.path.as_bytes()))
    };
    let config = CertificateConfig {
        subject: args.subject,
        alt_names: args.alt_names,
        usage_server_auth: args.usage_server_auth,
        usage_client_auth: args.usage_client_auth,
        ext_quote: args.usage_ra_tls,
        ..CertificateConfig::default()
    };
    Ok(tls_key_response(certify(guest, &scalar, config).await?))
}

/// `DeriveK256Key`: `GetKey` under other names, its `algorithm` included.
pub(crate) fn derive_k256_key(guest: &Guest, args: &GetKeyArgs) -> Result<DeriveK256KeyResponse, ApiError> {
    let derived = derive(app_key(guest)?, &args.path, &args.purpose, Algorithm::from_name(&args.algorithm)?)?;
    let mut response = DeriveK256KeyResponse::default();
    response.k256_key = derived.key.expose(|key| key.to_vec());
    response.k256_signature_chain = vec![derived.signature.to_vec(), guest.keys.identity_signature()];
    Ok(response)
}

/// `TdxQuote`.
pub(crate) async fn tdx_quote(guest: &Arc<Guest>, args: &TdxQuoteArgs) -> Result<TdxQuoteResponse, ApiError> {
    let tagged = tagged(&args.report_data, &args.hash_algorithm, &args.prefix)?;
    let (quote, event_log) = td_quote(guest, "TdxQuote", tagged.report_data).await?;
    Ok(TdxQuoteResponse { quote: quote.quote, event_log, hash_algorithm: tagged.hash_algorithm.to_owned(), prefix: tagged.prefix })
}

/// `RawQuote`.
pub(crate) async fn raw_quote(guest: &Arc<Guest>, args: &RawQuoteArgs) -> Result<TdxQuoteResponse, ApiError> {
    let (quote, event_log) = td_quote(guest, "RawQuote", whole(&args.report_data)?).await?;
    Ok(TdxQuoteResponse { quote: quote.quote, event_log, hash_algorithm: "raw".to_owned(), prefix: String::new() })
}

/// `Worker.GetAttestationForAppKey`.
pub(crate) async fn attestation_for_app_key(
    guest: &Arc<Guest>,
    request: &GetAttestationForAppKeyRequest,
) -> Result<GetQuoteResponse, ApiError> {
    let algorithm = match request.algorithm.as_str() {
        "ed25519" => Algorithm::Ed25519,
        "secp256k1" | "k256" | "secp256k1_prehashed" => Algorithm::Secp256k1,
        _ => return Err(AppKeyError::Algorithm.into()),
    };
    let derived = derive(app_key(guest)?, signing::PATH, "signing", algorithm)?;
    let report_data = of_app_key(algorithm, &derived.public_key)?;
    let (quote, event_log) = td_quote(guest, "GetAttestationForAppKey", report_data).await?;
    let vm_config = if guest.facts.public_tcbinfo { guest.vm_config.clone() } else { String::new() };
    Ok(GetQuoteResponse { quote: quote.quote, event_log, report_data: report_data.to_vec(), vm_config, attestation: Vec::new() })
}
