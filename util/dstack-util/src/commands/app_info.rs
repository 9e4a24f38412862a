//! What this machine's own evidence says, unverified: dstack's `AppInfo`. Owns: its values. Never: a value that a policy may trust; its
//! `device_id` is the hash of nothing, because only a verifier learns which machine this is.
//! Source: attestation reference §2.4, §7; util and deploy reference §1 (`show`).

use anyhow::Context as _;
use dstack_attest::eventlog::replay_runtime;
use dstack_attest::tdx;
use dstack_attest::wire::{Attestation, PlatformEvidence, RuntimeEvent, TdxEvidence};
use dstack_protocol::codec::sha256;
use serde_json::{Map, Value};

/// The members of `AppInfo`, hex.
///
/// # Errors
/// Evidence that does not decode.
pub fn of_evidence(evidence: &[u8]) -> anyhow::Result<Map<String, Value>> {
    let attestation = Attestation::decode(evidence).context("own evidence does not decode")?;
    let payload = |name: &str| event(&attestation.runtime_events, name);
    let provider = payload("key-provider").unwrap_or_default();
    let provider_hash = if provider.is_empty() { [0; 32] } else { sha256(&[provider]) };
    let config: Value = serde_json::from_str(&attestation.config).unwrap_or(Value::Null);
    let image = config.get("os_image_hash").and_then(Value::as_str).and_then(|text| hex::decode(text).ok()).unwrap_or_default();
    let (system, aggregated, compose) = match &attestation.platform {
        PlatformEvidence::Tdx(td) => {
            let (system, aggregated) = of_td(td, &attestation.runtime_events, &provider_hash)?;
            (system.to_vec(), aggregated.to_vec(), payload("compose-hash").unwrap_or_default().to_vec())
        }
        PlatformEvidence::GcpTdx(_, tpm) => {
            let pcr = |index: u32| tpm.pcr_values.iter().find(|pcr| pcr.index == index).map_or(&[][..], |pcr| pcr.value.as_slice());
            let system = sha256(&[&image, &provider_hash]);
            let aggregated = sha256(&[pcr(0), pcr(2), pcr(14)]);
            (system.to_vec(), aggregated.to_vec(), payload("compose-hash").unwrap_or_default().to_vec())
        }
        // the image is all that is measured there
        _ => (image.clone(), image.clone(), image.clone()),
    };
    let members = [
        ("app_id", payload("app-id").unwrap_or_default().to_vec()),
        ("compose_hash", compose),
        ("instance_id", payload("instance-id").unwrap_or_default().to_vec()),
        ("device_id", sha256(&[]).to_vec()),
        ("mr_system", system),
        ("mr_aggregated", aggregated),
        ("os_image_hash", payload("os-image-hash").map_or(image, <[u8]>::to_vec)),
        ("key_provider_info", provider.to_vec()),
    ];
    Ok(members.into_iter().map(|(name, bytes)| (name.to_owned(), Value::from(hex::encode(bytes)))).collect())
}

fn of_td(td: &TdxEvidence, events: &[RuntimeEvent], provider_hash: &[u8; 32]) -> anyhow::Result<([u8; 32], [u8; 32])> {
    let body = tdx::Quote::parse(&td.quote).context("own quote does not decode")?.body;
    let [rtmr0, rtmr1, rtmr2, _] = &body.rtmr;
    let boot = [&body.mr_td, rtmr0, rtmr1, rtmr2].map(|register| register.as_slice()).concat();
    let owners = [&body.mr_config_id, &body.mr_owner, &body.mr_owner_config].map(|register| register.as_slice()).concat();
    let owners = if owners.iter().any(|byte| *byte != 0) { owners } else { Vec::new() };
    Ok((sha256(&[&boot, provider_hash]), sha256(&[&boot, &replay_runtime(events), &owners])))
}

fn event<'a>(events: &'a [RuntimeEvent], name: &str) -> Option<&'a [u8]> {
    events.iter().take_while(|event| event.event != "system-ready").find(|event| event.event == name).map(|event| event.payload.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Machine, event};

    #[test]
    fn says_what_verification_proves_but_the_device() {
        let mut world = dstack_testkit::World::new().unwrap();
        let device = world.tdx("m").unwrap();
        let machine = Machine::open(Some(&device), Some(&world.dir().join("events"))).unwrap();
        for (name, payload) in
            [("app-id", &[0x11; 20][..]), ("compose-hash", &[0x44; 32]), ("instance-id", &[0x22; 20]), ("key-provider", b"{}")]
        {
            machine.measure(&event(name, payload)).unwrap();
        }
        let evidence = machine.device().evidence([0; 64]).unwrap();
        let (info, proven) = (of_evidence(&evidence).unwrap(), world.verify(&evidence).unwrap());
        assert_eq!(info["mr_aggregated"], hex::encode(proven.mr_aggregated()));
        assert_eq!(info["mr_system"], hex::encode(proven.mr_system()));
        assert_eq!(info["compose_hash"], "44".repeat(32));
        assert_eq!(info["device_id"], "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert!(of_evidence(b"\0").is_err());
    }
}
