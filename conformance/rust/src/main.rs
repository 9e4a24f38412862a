//! The published Rust SDK against a running agent. Environment and purpose: see `../../python/check.py`.

use anyhow::{Context as _, ensure};
use dstack_sdk::dstack_client::DstackClient;
use dstack_sdk::tappd_client::TappdClient;
use dstack_sdk_types::dstack::TlsKeyConfig;
use k256::ecdsa::{RecoveryId, Signature, SigningKey, VerifyingKey};
use sha2::{Digest as _, Sha256};
use sha3::Keccak256;

const CALLS: usize = 64;

fn env(name: &str) -> anyhow::Result<String> {
    std::env::var(name).with_context(|| format!("{name} is not set"))
}

fn recover(digest: &[u8], signature: &[u8]) -> anyhow::Result<Vec<u8>> {
    ensure!(signature.len() == 65, "a signature of {} bytes", signature.len());
    let id = RecoveryId::from_byte(signature[64]).context("recovery id")?;
    let key = VerifyingKey::recover_from_prehash(digest, &Signature::from_slice(&signature[..64])?, id)?;
    Ok(key.to_encoded_point(true).as_bytes().to_vec())
}

/// Guest API reference §8: claim, app key, identity key of the cluster.
fn chain_to_identity(claim: &[u8], chain: &[Vec<u8>]) -> anyhow::Result<()> {
    let app_key = recover(&Keccak256::digest(claim), &chain[0])?;
    let issued = [b"dstack-kms-issued:".as_slice(), &hex::decode(env("CONFORMANCE_APP_ID")?)?, &app_key].concat();
    let signer = recover(&Keccak256::digest(issued), &chain[1])?;
    ensure!(hex::encode(signer) == env("CONFORMANCE_ID_PUB")?, "the chain ends at another identity");
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let client = DstackClient::new(None);
    let info = client.info().await?;
    ensure!(info.app_id == env("CONFORMANCE_APP_ID")?, "another app: {}", info.app_id);
    ensure!(info.compose_hash == hex::encode(Sha256::digest(&info.tcb_info.app_compose)), "compose hash");
    println!("rust    info app_id={} version={}", info.app_id, client.version().await?.version);

    let key = client.get_key(Some("wallet/eth".to_owned()), Some("mainnet".to_owned())).await?;
    let public = SigningKey::from_slice(&key.decode_key()?)?.verifying_key().to_encoded_point(true);
    chain_to_identity(format!("mainnet:{}", hex::encode(public)).as_bytes(), &key.decode_signature_chain()?)?;
    println!("rust    get_key; the chain ends at the identity key");

    let quote = client.get_quote(b"report data of rust".to_vec()).await?;
    ensure!(quote.quote.contains(&hex::encode("report data of rust")), "report data");
    ensure!(quote.replay_rtmrs()?[&3] == info.tcb_info.rtmr3, "the log does not replay");
    ensure!(client.attest(b"report data of rust".to_vec()).await?.decode_attestation()?.len() > 500, "attestation");
    ensure!(client.get_quote(vec![0; 65]).await.is_err(), "65 bytes of report data were taken");
    println!("rust    get_quote, attest; the log replays to RTMR3");

    for algorithm in ["ed25519", "secp256k1"] {
        let signed = client.sign(algorithm, b"a message".to_vec()).await?;
        let chain = signed.signature_chain.iter().map(hex::decode).collect::<Result<Vec<_>, _>>()?;
        chain_to_identity(format!("signing:{}", signed.public_key).as_bytes(), &chain[1..])?;
        let (signature, public) = (hex::decode(&signed.signature)?, hex::decode(&signed.public_key)?);
        ensure!(client.verify(algorithm, b"a message".to_vec(), signature.clone(), public.clone()).await?.valid, "own signature");
        ensure!(!client.verify(algorithm, b"another".to_vec(), signature, public).await?.valid, "another message");
    }
    ensure!(client.sign("rsa", b"a message".to_vec()).await.is_err(), "an unknown algorithm was taken");
    ensure!(client.emit_event("event".to_owned(), b"payload".to_vec()).await.is_err(), "EmitEvent was answered");
    println!("rust    sign, verify; the chains end at the identity key");

    let config = TlsKeyConfig::builder().subject("rust.example").alt_names(vec!["rust.example".to_owned()]).usage_ra_tls(true).build();
    let tls = client.get_tls_key(config).await?;
    ensure!(tls.certificate_chain.len() == 3 && tls.key.contains("PRIVATE KEY"), "chain of {}", tls.certificate_chain.len());
    let tappd = TappdClient::new(None);
    ensure!(tappd.derive_key("tls").await?.certificate_chain.len() == 3, "tappd chain");
    ensure!(tappd.get_quote(vec![7; 64]).await?.quote.len() > 1000, "tappd quote");
    println!("rust    get_tls_key, tappd");

    let paths = (0..CALLS).map(|i| format!("parallel/{i}"));
    let calls: Vec<_> = paths.map(|path| client.get_key(Some(path), None)).collect();
    let answers = futures_util::future::join_all(calls).await.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let distinct: std::collections::BTreeSet<_> = answers.iter().map(|answer| &answer.key).collect();
    ensure!(distinct.len() == CALLS, "{} distinct keys", distinct.len());
    println!("rust    {CALLS} calls at once");
    Ok(())
}
