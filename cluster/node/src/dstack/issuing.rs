//! This node's issuing CA and the certificate of its listener. Owns: when they are made, and the CA's key, which never leaves this process.
//! Never: signs the CA (the root does), writes a key to disk: a restart asks for a new CA.
//! Source: threshold.md §5.2; KMS API reference §8.
//!
//! The server's certificate carries no evidence (extension `.8`): guests accept one without, those of 0.5.x would measure *which* node
//! they asked into RTMR3 if it had one, and NSM evidence would have to be renewed every hour. What makes a node trusted is the chain to
//! the root, which only attested nodes get.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use dstack_actors::ports::read;
use dstack_certificates::PublicKey;
use dstack_certificates::leaf::ServerLeaf;
use dstack_certificates::read::IssuingCa;
use dstack_protocol::sign::{Basis, SignObject};
use dstack_protocol::{RootTag, UnixMillis};
use dstack_ratls::dstack_server::ServerChain;
use dstack_ratls::key::CertificateKey;
use tracing::{info, warn};

use super::{Dstack, GENERATION};

/// Between two looks whether the roots are there, and whether it is time to renew.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// After a failure. The log gives a node six CAs an hour.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Keeps the listener's chain: made when the roots are in force, renewed at half its life.
pub(super) async fn keep(dstack: Arc<Dstack>, chain: Arc<ServerChain>) {
    let mut renew_at: Option<UnixMillis> = None;
    dstack.parts.standing.waits("this node's seat, and the roots");
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = (dstack.parts.now)();
        if renew_at.is_some_and(|at| now < at) || !ready(&dstack) {
            continue;
        }
        match make(&dstack, &chain).await {
            Ok(at) => {
                dstack.parts.standing.serves();
                renew_at = Some(at);
            }
            Err(error) => {
                // The chain that is shown stays good for half its life.
                if renew_at.is_none() {
                    dstack.parts.standing.waits(&format!("the root's signature of this node's issuing CA: {error:#}"));
                }
                warn!(reason = format!("{error:#}"), "no certificate for the dstack listener yet, will retry");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

fn ready(dstack: &Dstack) -> bool {
    let services = &dstack.parts;
    read(&*services.log, |state| {
        let own = state.seats.get(&services.seat).is_some_and(|row| row.node_key == services.node_key);
        own && state.roots.contains_key(&(GENERATION, RootTag::Ca))
    })
    .unwrap_or(false)
}

/// A CA, a leaf, and when to renew them.
async fn make(dstack: &Dstack, chain: &ServerChain) -> anyhow::Result<UnixMillis> {
    let seat = dstack.parts.seat;
    let index = read(&*dstack.parts.log, |state| state.seats.get(&seat).map(|row| row.index))?.context("this node has no index")?;
    let ca_key = CertificateKey::generate().context("key")?;
    let public = PublicKey::p256_from_spki("issuing ca", &ca_key.spki()).context("key")?;
    let public_key = public.p256_compressed().context("key")?;
    let hosts = dstack.config.hosts.clone();
    let object = SignObject::IssuingCa { generation: GENERATION, index, public_key, hosts: hosts.clone() };
    let signed = dstack.parts.signatures.sign(object, Basis::State).await.context("the root's signature of the issuing CA")?;
    let ca = IssuingCa::read(&signed.bytes.0).context("issuing CA")?;

    let key = CertificateKey::generate().context("key")?;
    let mut serial = [0; 16];
    getrandom::fill(&mut serial).map_err(|error| anyhow::anyhow!("randomness: {error}"))?;
    let leaf_key = PublicKey::p256_from_spki("server", &key.spki()).context("key")?;
    let leaf = ServerLeaf { key: &leaf_key, hosts: &hosts, attestation: None, serial }.issue(&ca, &ca_key).context("server certificate")?;
    chain.install(vec![leaf, signed.bytes.0], &key);
    let (_, not_after_s) = ca.certificate().validity_s();
    let now = (dstack.parts.now)();
    let half_ms = not_after_s.saturating_mul(1000).saturating_sub(now.0) / 2;
    info!(not_after_s, hosts = ?hosts, "certificate of the dstack listener issued");
    Ok(now.plus_ms(half_ms.max(60_000)))
}
