//! `show`: what this machine is. Owns: one line of JSON: the device's description and dstack's `AppInfo`. Never: a proof; the device's own
//! words are not evidence.

use dstack_protocol::Platform;
use dstack_protocol::codec::sha256;
use serde_json::json;

use crate::commands::app_info;
use crate::machine::Machine;

/// Asks the device.
///
/// # Errors
/// The device's.
pub fn run(machine: &Machine) -> anyhow::Result<String> {
    let device = machine.device();
    let description = device.describe()?;
    let measurement = &description.measurement;
    let mut shown = json!({
        "platform": device.platform().name(),
        "software": device.is_software(),
        "measurement": hex::encode(measurement),
        "platform_identity": hex::encode(&description.platform_identity),
    });
    if let Some(members) = shown.as_object_mut() {
        if device.platform() == Platform::Nitro {
            // What a policy lists of an enclave, twice: as OS image and as compose hash.
            members.insert("image_hash".to_owned(), hex::encode(sha256(&[measurement])).into());
        }
        members.extend(app_info::of_evidence(&device.evidence([0; 64])?)?);
    }
    Ok(shown.to_string())
}
