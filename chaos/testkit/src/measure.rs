//! What a software TEE measures, and into which registers. Owns: the descriptions of the emulated firmware and guest image,
//! the canonical measurement. Never: looks at a process (crate module `device` does) or signs.
//!
//! A node is measured as the executable that asks: MRTD, or PCR0. An app is measured as its compose document: on TDX through
//! the boot events of RTMR3, over registers of a constant guest image, on Nitro as PCR0. So an app's measurement does not
//! depend on the agent's binary, as on hardware, where the agent is part of the image.

use dstack_tee::software::protocol::{Boot, Booted, HexArray, HexBytes, KeyProvider};
use sha2::{Digest as _, Sha256, Sha384};

use crate::eventlog::{RuntimeEvent, boot_events, replay};
use crate::nitro::extend_pcr;

/// What runs in one emulated TEE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Measured {
    /// A node: the SHA-384 of its executable.
    Executable([u8; 48]),
    /// A guest booted from a compose document.
    Guest(Box<Guest>),
    /// A guest that measures its own boot, on TDX: the events so far.
    Started(Vec<RuntimeEvent>),
}

/// A booted guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    compose_sha384: [u8; 48],
    compose_hash: [u8; 32],
    app_id: [u8; 20],
    instance_id: Vec<u8>,
    key_provider: Vec<u8>,
    /// Measured after the boot.
    later: Vec<RuntimeEvent>,
}

/// Registers of a TD and the events behind RTMR3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TdRegisters {
    /// MRTD.
    pub mrtd: [u8; 48],
    /// RTMR0 to RTMR3.
    pub rtmr: [[u8; 48]; 4],
    /// Runtime events; their replay is RTMR3.
    pub events: Vec<RuntimeEvent>,
}

impl Measured {
    /// A node whose executable has these bytes.
    pub fn executable(bytes: &[u8]) -> Self {
        Self::Executable(Sha384::digest(bytes).into())
    }

    /// A guest booted as the software device boots it.
    pub fn guest(boot: &Boot) -> Self {
        Self::Guest(Box::new(Guest::new(boot)))
    }

    /// A guest of this compose document with the default app id, no instance id and no key provider.
    pub fn compose(document: &[u8]) -> Self {
        Self::guest(&Boot { compose: HexBytes(document.to_vec()), app_id: None, instance_seed: None, key_provider: None })
    }

    /// The registers on TDX.
    pub fn td_registers(&self) -> TdRegisters {
        match self {
            Self::Executable(digest) => TdRegisters {
                mrtd: *digest,
                rtmr: [described("node: RTMR0"), described("node: RTMR1"), described("node: RTMR2"), [0; 48]],
                events: Vec::new(),
            },
            Self::Guest(_) | Self::Started(_) => {
                let events = self.guest_events();
                TdRegisters {
                    mrtd: described("guest image: MRTD"),
                    rtmr: [
                        described("guest image: RTMR0"),
                        described("guest image: RTMR1"),
                        described("guest image: RTMR2"),
                        replay(&events),
                    ],
                    events,
                }
            }
        }
    }

    /// Runtime events of a guest, in order; none of a node.
    fn guest_events(&self) -> Vec<RuntimeEvent> {
        match self {
            Self::Executable(_) => Vec::new(),
            Self::Guest(guest) => {
                let mut events = boot_events(&guest.app_id, &guest.compose_hash, &guest.instance_id, &guest.key_provider);
                events.extend(guest.later.iter().cloned());
                events
            }
            Self::Started(events) => events.clone(),
        }
    }

    /// Measures one more event of a guest on TDX; `false` for a node, which has no such register.
    pub fn extend(&mut self, event: RuntimeEvent) -> bool {
        match self {
            Self::Executable(_) => return false,
            Self::Guest(guest) => guest.later.push(event),
            Self::Started(events) => events.push(event),
        }
        true
    }

    /// PCR0, PCR1 and PCR2 on Nitro.
    pub fn pcrs(&self) -> [[u8; 48]; 3] {
        match self {
            Self::Executable(digest) => [extend_pcr(digest), described("node: PCR1"), described("node: PCR2")],
            Self::Guest(guest) => guest.pcrs(),
            // never on Nitro, where an enclave is measured whole before it starts
            Self::Started(_) => [described("guest image: PCR0"), described("guest image: PCR1"), described("guest image: PCR2")],
        }
    }

    /// What a Nitro enclave claims beside its document: its app id.
    pub fn nitro_events(&self) -> Vec<RuntimeEvent> {
        match self {
            Self::Executable(_) | Self::Started(_) => Vec::new(),
            Self::Guest(guest) => vec![RuntimeEvent::new("app-id", guest.app_id)],
        }
    }

    /// SHA-256(PCR0 ‖ PCR1 ‖ PCR2): image hash and compose hash on Nitro.
    pub fn nitro_image_hash(&self) -> [u8; 32] {
        Sha256::digest(self.pcrs().as_flattened()).into()
    }

    /// Canonical measurement on TDX, 224 bytes: MRTD ‖ RTMR0 ‖ RTMR1 ‖ RTMR2 ‖ compose hash (zero without one).
    pub fn tdx_measurement(&self) -> Vec<u8> {
        let registers = self.td_registers();
        let [rtmr0, rtmr1, rtmr2, _] = registers.rtmr;
        let compose_hash = match self {
            Self::Executable(_) => [0; 32],
            Self::Guest(guest) => guest.compose_hash,
            Self::Started(events) => {
                let hash = events.iter().find(|event| event.name == "compose-hash");
                hash.and_then(|event| event.payload.as_slice().try_into().ok()).unwrap_or_default()
            }
        };
        [registers.mrtd.as_slice(), &rtmr0, &rtmr1, &rtmr2, &compose_hash].concat()
    }

    /// Canonical measurement on Nitro, 144 bytes: PCR0 ‖ PCR1 ‖ PCR2.
    pub fn nitro_measurement(&self) -> Vec<u8> {
        self.pcrs().concat()
    }
}

impl Guest {
    /// Boots as the protocol says.
    pub(crate) fn new(boot: &Boot) -> Self {
        let compose_hash: [u8; 32] = Sha256::digest(&boot.compose.0).into();
        let app_id = boot.app_id.map_or_else(|| first_20(&compose_hash), |HexArray(id)| id);
        let instance_id = boot
            .instance_seed
            .as_ref()
            .map_or_else(Vec::new, |seed| first_20(&Sha256::new().chain_update(&seed.0).chain_update(app_id).finalize()).to_vec());
        let none = KeyProvider { name: "none".to_owned(), id: String::new() };
        let key_provider = serde_json::to_vec(boot.key_provider.as_ref().unwrap_or(&none)).expect("two strings are always JSON");
        Self { compose_sha384: Sha384::digest(&boot.compose.0).into(), compose_hash, app_id, instance_id, key_provider, later: Vec::new() }
    }

    fn pcrs(&self) -> [[u8; 48]; 3] {
        [extend_pcr(&self.compose_sha384), described("guest image: PCR1"), described("guest image: PCR2")]
    }

    /// The identity that verified TDX evidence of this guest shows.
    pub fn booted_tdx(&self) -> Booted {
        Booted { app_id: HexArray(self.app_id), compose_hash: HexArray(self.compose_hash), instance_id: HexBytes(self.instance_id.clone()) }
    }

    /// The identity that verified Nitro evidence of this guest shows: the image hash as compose hash, no instance id.
    pub fn booted_nitro(&self) -> Booted {
        let image_hash = Sha256::digest(self.pcrs().as_flattened()).into();
        Booted { app_id: HexArray(self.app_id), compose_hash: HexArray(image_hash), instance_id: HexBytes(Vec::new()) }
    }
}

/// The register into which one part of the emulated firmware was measured: a fixed digest of its description.
fn described(part: &str) -> [u8; 48] {
    extend_pcr(&Sha384::new().chain_update(b"dstack software TEE 1: ").chain_update(part).finalize())
}

/// First 20 bytes of a digest.
fn first_20(digest: &[u8]) -> [u8; 20] {
    let mut out = [0; 20];
    for (to, from) in out.iter_mut().zip(digest) {
        *to = *from;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_its_executable_and_an_app_its_compose_document() {
        let node = Measured::executable(b"one");
        let other = Measured::executable(b"two");
        assert_ne!(node.tdx_measurement(), other.tdx_measurement());
        assert_ne!(node.nitro_measurement(), other.nitro_measurement());
        assert_eq!(node.tdx_measurement().len(), 224);
        assert_eq!(node.nitro_measurement().len(), 144);
        assert_eq!(node.tdx_measurement()[192..], [0; 32]);

        let app = Measured::compose(b"{}");
        let changed = Measured::compose(b"{ }");
        assert_eq!(app.tdx_measurement()[..192], changed.tdx_measurement()[..192]);
        assert_ne!(app.tdx_measurement()[192..], changed.tdx_measurement()[192..]);
        assert_eq!(app.nitro_measurement()[48..], changed.nitro_measurement()[48..]);
        assert_ne!(app.nitro_measurement()[..48], changed.nitro_measurement()[..48]);
    }

    fn guest_of(measured: Measured) -> Guest {
        match measured {
            Measured::Guest(guest) => *guest,
            Measured::Executable(_) | Measured::Started(_) => panic!("not booted"),
        }
    }

    #[test]
    fn boot_follows_the_protocol() {
        let hash: [u8; 32] = Sha256::digest(b"{}").into();
        let plain = guest_of(Measured::compose(b"{}")).booted_tdx();
        assert_eq!(plain.app_id.0, hash[..20]);
        assert_eq!(plain.compose_hash.0, hash);
        assert!(plain.instance_id.0.is_empty());

        let guest = Measured::guest(&Boot {
            compose: HexBytes(b"{}".to_vec()),
            app_id: Some(HexArray([9; 20])),
            instance_seed: Some(HexBytes(b"seed".to_vec())),
            key_provider: Some(KeyProvider { name: "kms".into(), id: "ab".into() }),
        });
        let names: Vec<_> = guest.td_registers().events.into_iter().map(|event| event.name).collect();
        assert_eq!(names, ["system-preparing", "app-id", "compose-hash", "instance-id", "boot-mr-done", "key-provider", "system-ready"]);
        let booted = guest_of(guest.clone()).booted_tdx();
        assert_eq!(booted.app_id.0, [9; 20]);
        let instance = Sha256::new().chain_update(b"seed").chain_update([9; 20]).finalize();
        assert_eq!(booted.instance_id.0, instance[..20]);
        let provider = &guest.td_registers().events[5].payload;
        assert_eq!(provider.as_slice(), br#"{"name":"kms","id":"ab"}"#);
    }
}
