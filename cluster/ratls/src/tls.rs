//! rustls configurations. Owns: TLS 1.3 only but for the listener of dstack's protocol, one provider passed explicitly, no resumption of any kind, so that every
//! connection verifies evidence anew. Never: falls back.
//! Source: dependencies.md §3.6.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::UnixTime;
use rustls::server::NoServerSessionStorage;
use rustls::time_provider::TimeProvider;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ServerConfig};

use crate::Now;
use crate::any_issuer::AnyIssuer;
use crate::dstack_server::ServerChain;
use crate::error::RatlsError;
use crate::source::CertificateSource;
use crate::verifier::Verifier;

/// AWS-LC with the hybrid post-quantum exchange first.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![aws_lc_rs::kx_group::X25519MLKEM768, aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1];
    Arc::new(provider)
}

pub(crate) fn server_config(
    provider: &Arc<CryptoProvider>,
    now: &Now,
    source: Arc<CertificateSource>,
    verifier: Verifier,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, RatlsError> {
    let mut config = ServerConfig::builder_with_details(Arc::clone(provider), Arc::new(GivenTime(Arc::clone(now))))
        .with_protocol_versions(&[&TLS13])
        .map_err(refused)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(source);
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// dstack's guests and tools: TLS 1.2 too (some of them have no other), a chain from a CA, client certificates of any issuer.
pub(crate) fn dstack_server_config(
    provider: &Arc<CryptoProvider>,
    now: &Now,
    chain: Arc<ServerChain>,
    verifier: AnyIssuer,
) -> Result<Arc<ServerConfig>, RatlsError> {
    let mut config = ServerConfig::builder_with_details(Arc::clone(provider), Arc::new(GivenTime(Arc::clone(now))))
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(refused)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(chain);
    config.alpn_protocols = [&b"h2"[..], b"http/1.1"].map(<[u8]>::to_vec).to_vec();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// `source`: `None` for an anonymous client.
pub(crate) fn client_config(
    provider: &Arc<CryptoProvider>,
    now: &Now,
    source: Option<Arc<CertificateSource>>,
    verifier: Verifier,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, RatlsError> {
    let builder = ClientConfig::builder_with_details(Arc::clone(provider), Arc::new(GivenTime(Arc::clone(now))))
        .with_protocol_versions(&[&TLS13])
        .map_err(refused)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match source {
        Some(source) => builder.with_client_cert_resolver(source),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    Ok(Arc::new(config))
}

fn refused(error: rustls::Error) -> RatlsError {
    RatlsError::Tls { reason: error.to_string() }
}

pub(crate) struct GivenTime(pub(crate) Now);

impl TimeProvider for GivenTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_millis((self.0)().0)))
    }
}

impl std::fmt::Debug for GivenTime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GivenTime")
    }
}
