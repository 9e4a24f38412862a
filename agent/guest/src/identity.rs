//! What the guest's own evidence says of it. Owns: reading it, unverified, for `Info`. Never: decides anything by it but one rule: the
//! compose file we were given must be the one that was measured.
//! Source: guest API reference §3.6; attestation reference §7 for the aggregate.

use dstack_attest::AttestError;
use dstack_attest::eventlog::{replay_runtime, tpm};
use dstack_attest::tdx::Quote;
use dstack_attest::tpm::Bank;
use dstack_attest::wire::{Attestation, PlatformEvidence, RuntimeEvent, TdxEvent};
use dstack_protocol::codec::sha256;
use dstack_protocol::{AppId, Platform};

/// Registers of a TD, and the hash over all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TdMeasurements {
    /// MRTD.
    pub mrtd: [u8; 48],
    /// RTMR0 to RTMR3.
    pub rtmr: [[u8; 48]; 4],
}

/// See the module text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Of the evidence.
    pub platform: Platform,
    /// Event `app-id`.
    pub app_id: AppId,
    /// Event `instance-id`: 20 bytes or none.
    pub instance_id: Vec<u8>,
    /// Event `compose-hash`; on Nitro the image's hash.
    pub compose_hash: Vec<u8>,
    /// Event `os-image-hash`, or what the VmConfig claims; may be empty.
    pub os_image_hash: Vec<u8>,
    /// Event `key-provider`: JSON text, may be empty.
    pub key_provider: String,
    /// dstack's hash over all registers, on Google Cloud over those of the TPM; the image's hash on Nitro.
    pub mr_aggregated: Vec<u8>,
    /// None on platforms without a TD report.
    pub td: Option<TdMeasurements>,
    /// VmConfig text, may be empty.
    pub vm_config: String,
}

/// Why the guest cannot know itself.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The device's evidence does not decode. The device is at fault.
    #[error("own evidence does not decode: {0}")]
    Evidence(#[from] AttestError),
    /// The evidence names no app. The guest was not booted as a dstack app.
    #[error("own evidence has no app id: this machine was not booted as a dstack app")]
    NoApp,
    /// The file given to the agent is not the measured one: its pin proves nothing.
    #[error("the compose file is not the measured one: its hash is {file}, measured is {measured}")]
    OtherCompose {
        /// SHA-256 of the file.
        file: String,
        /// Event `compose-hash`.
        measured: String,
    },
}

impl Identity {
    /// Reads own evidence, made for the compose file with these bytes. `vm_config`: the host's word, for evidence that carries none.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn of_evidence(evidence: &[u8], compose: &[u8], vm_config: &str) -> Result<Self, IdentityError> {
        let attestation = Attestation::decode(evidence)?;
        let Attestation { platform: evidence, runtime_events, mut config, .. } = attestation;
        if config.is_empty() {
            vm_config.clone_into(&mut config);
        }
        let payload = |name: &str| event(&runtime_events, name);
        let app_id = payload("app-id").and_then(|bytes| <[u8; 20]>::try_from(bytes).ok()).map(AppId).ok_or(IdentityError::NoApp)?;
        let claimed_image = serde_json::from_str::<serde_json::Value>(&config)
            .ok()
            .and_then(|config| hex::decode(config.get("os_image_hash")?.as_str()?).ok())
            .unwrap_or_default();
        let os_image_hash = payload("os-image-hash").map_or_else(|| claimed_image.clone(), <[u8]>::to_vec);
        let platform = evidence.platform();
        let (td, compose_hash, mr_aggregated) = match &evidence {
            PlatformEvidence::Tdx(td) | PlatformEvidence::GcpTdx(td, _) => {
                let body = Quote::parse(&td.quote)?.body;
                let measured = payload("compose-hash").unwrap_or_default();
                let file = sha256(&[compose]);
                // threshold.md §1.6: a pin counts because it is measured.
                if measured != file {
                    return Err(IdentityError::OtherCompose { file: hex::encode(file), measured: hex::encode(measured) });
                }
                let [rtmr0, rtmr1, rtmr2, _] = &body.rtmr;
                let mut registers = [&body.mr_td, rtmr0, rtmr1, rtmr2].map(|register| register.as_slice()).concat();
                registers.extend_from_slice(&replay_runtime(&runtime_events));
                let owners = [&body.mr_config_id, &body.mr_owner, &body.mr_owner_config].map(|register| register.as_slice()).concat();
                if owners.iter().any(|byte| *byte != 0) {
                    registers.extend_from_slice(&owners);
                }
                if let PlatformEvidence::GcpTdx(_, quoted) = &evidence {
                    let pcr = |index: u32| quoted.pcr_values.iter().find(|pcr| pcr.index == index).map_or(&[][..], |pcr| &pcr.value);
                    registers = [pcr(0), pcr(2), &tpm::replay_runtime(&runtime_events, Bank::Sha256)].concat();
                }
                (Some(TdMeasurements { mrtd: body.mr_td, rtmr: body.rtmr }), file.to_vec(), sha256(&[&registers]).to_vec())
            }
            // The image is what is measured there; the compose file is in it.
            PlatformEvidence::NitroEnclave { .. } | PlatformEvidence::SevSnp { .. } | PlatformEvidence::NitroTpm { .. } => {
                (None, claimed_image.clone(), claimed_image.clone())
            }
        };
        Ok(Self {
            platform,
            app_id,
            instance_id: payload("instance-id").unwrap_or_default().to_vec(),
            compose_hash,
            os_image_hash,
            key_provider: payload("key-provider").map(|text| String::from_utf8_lossy(text).into_owned()).unwrap_or_default(),
            mr_aggregated,
            td,
            vm_config: config,
        })
    }
}

/// By name, of those that the boot measured: later ones are the app's (attestation reference §4).
fn event<'a>(events: &'a [RuntimeEvent], name: &str) -> Option<&'a [u8]> {
    events.iter().take_while(|event| event.event != "system-ready").find(|event| event.event == name).map(|event| event.payload.as_slice())
}

/// The log as `GetQuote` hands it out: boot payloads removed but those of ACPI data (reference §10). Runtime events keep their
/// digests, so that a reader can replay without computing them.
///
/// # Errors
/// What the device gave is no log.
pub fn stripped_log(json: &str) -> Result<String, AttestError> {
    let mut log = TdxEvent::parse_log(json.as_bytes())?;
    for event in log.iter_mut().filter(|event| event.imr < 3 && event.event_payload != b"ACPI DATA") {
        event.event_payload.clear();
    }
    Ok(TdxEvent::log_to_json(&log))
}

#[cfg(test)]
mod tests {
    use dstack_attest::wire::{PcrValue, TpmQuote};
    use dstack_tee::software::protocol::HexBytes;
    use dstack_tee::{Boot, Device as _};
    use dstack_testkit::{Machine, SoftwareRoots};

    use super::*;

    const COMPOSE: &[u8] = br#"{"name":"app"}"#;

    fn booted(machine: Machine) -> (Machine, Vec<u8>) {
        let boot =
            Boot { compose: HexBytes(COMPOSE.to_vec()), app_id: None, instance_seed: Some(HexBytes(vec![1; 32])), key_provider: None };
        machine.boot_app(boot).unwrap();
        let evidence = machine.evidence([0; 64]).unwrap();
        (machine, evidence)
    }

    #[test]
    fn says_what_verification_proves() {
        let roots = SoftwareRoots::generate(dstack_runtime::clock::Clock::now(&dstack_runtime::clock::SystemClock::new())).unwrap();
        let (machine, evidence) = booted(Machine::tdx("a", &roots).unwrap());
        let own = Identity::of_evidence(&evidence, COMPOSE, "").unwrap();
        let material = dstack_attest::TrustRoots::none().with_software_root(roots.tdx_root_der()).unwrap();
        let context = dstack_attest::VerifyContext {
            now: dstack_runtime::clock::Clock::now(&dstack_runtime::clock::SystemClock::new()),
            roots: &material,
            collateral: &dstack_attest::CollateralBundle::parse(roots.bundle()).unwrap(),
            tcb: &dstack_attest::TcbPolicy::default(),
        };
        let proven = dstack_attest::verify(&evidence, &context).unwrap();
        assert_eq!(Some(own.app_id), proven.app_id());
        assert_eq!(own.instance_id, proven.instance_id());
        assert_eq!(own.compose_hash, proven.compose_hash().unwrap());
        assert_eq!(own.mr_aggregated, proven.mr_aggregated());
        assert_eq!(own.key_provider.as_bytes(), proven.key_provider());
        let td = own.td.unwrap();
        assert_eq!([td.mrtd.as_slice(), td.rtmr[..3].as_flattened(), &own.compose_hash].concat(), machine.measurement());
        let refused = Identity::of_evidence(&evidence, b"{}", "").unwrap_err();
        assert!(matches!(refused, IdentityError::OtherCompose { .. }));

        let (machine, evidence) = booted(Machine::nitro("b", &roots).unwrap());
        let own = Identity::of_evidence(&evidence, COMPOSE, "").unwrap();
        assert_eq!(own.compose_hash, sha256(&[&machine.measurement()]));
        assert_eq!((own.td, own.instance_id), (None, Vec::new()));
        let node = Machine::tdx("c", &roots).unwrap().evidence([0; 64]).unwrap();
        assert_eq!(Identity::of_evidence(&node, COMPOSE, ""), Err(IdentityError::NoApp));
        assert!(matches!(Identity::of_evidence(b"\0", COMPOSE, ""), Err(IdentityError::Evidence(_))));
    }

    #[test]
    fn on_google_cloud_the_tpm_counts_and_nowhere_what_comes_after_the_boot() {
        let roots = SoftwareRoots::generate(dstack_runtime::clock::Clock::now(&dstack_runtime::clock::SystemClock::new())).unwrap();
        let (_, evidence) = booted(Machine::tdx("a", &roots).unwrap());
        let plain = Identity::of_evidence(&evidence, COMPOSE, "").unwrap();
        let mut attestation = Attestation::decode(&evidence).unwrap();
        let image = format!(r#"{{"os_image_hash":"{}"}}"#, "55".repeat(32));
        // An event of the app's own under a name of the boot's.
        let late = RuntimeEvent { event: "os-image-hash".into(), payload: vec![6; 32], ..attestation.runtime_events[0].clone() };
        attestation.runtime_events.push(late);
        attestation.config.clear();
        let own = Identity::of_evidence(&attestation.encode(), COMPOSE, &image).unwrap();
        assert_eq!((own.os_image_hash, own.vm_config), (vec![0x55; 32], image.clone()));

        let PlatformEvidence::Tdx(td) = attestation.platform.clone() else { panic!("a TD") };
        let pcr = |index: u32| PcrValue { index, algorithm: "sha256".into(), value: vec![u8::try_from(index).unwrap() + 1; 32] };
        let quoted = TpmQuote { pcr_values: [0, 2, 14].map(pcr).to_vec(), ..TpmQuote::default() };
        attestation.platform = PlatformEvidence::GcpTdx(td, quoted);
        let own = Identity::of_evidence(&attestation.encode(), COMPOSE, &image).unwrap();
        let pcr14 = tpm::replay_runtime(&attestation.runtime_events, Bank::Sha256);
        assert_eq!(own.mr_aggregated, sha256(&[&[1; 32], &[3; 32], &pcr14]));
        assert_eq!((own.platform, own.td), (Platform::GcpTdx, plain.td));
    }

    #[test]
    fn only_boot_payloads_are_removed() {
        let event =
            |imr: u32, payload: &[u8]| TdxEvent { imr, event_payload: payload.to_vec(), digest: vec![7; 48], ..TdxEvent::default() };
        let log = [event(0, b"secret"), event(1, b"ACPI DATA"), event(3, b"app")];
        let stripped = TdxEvent::parse_log(stripped_log(&TdxEvent::log_to_json(&log)).unwrap().as_bytes()).unwrap();
        let payloads: Vec<&[u8]> = stripped.iter().map(|event| event.event_payload.as_slice()).collect();
        assert_eq!(payloads, [b"".as_slice(), b"ACPI DATA", b"app"]);
        assert!(stripped.iter().all(|event| event.digest == [7; 48]));
        assert!(stripped_log("{").is_err());
    }
}
