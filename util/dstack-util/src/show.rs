//! `show`: what this machine is. Owns: one line of JSON. Never: a proof; the device's own words are not evidence.

use dstack_protocol::Platform;
use dstack_protocol::codec::sha256;
use serde_json::json;

/// Asks the device.
///
/// # Errors
/// The device's.
pub fn run(device: &str) -> anyhow::Result<String> {
    let device = dstack_tee::open(device)?;
    let description = device.describe()?;
    let measurement = &description.measurement;
    let mut shown = json!({
        "platform": device.platform().name(),
        "software": device.is_software(),
        "measurement": hex::encode(measurement),
        "platform_identity": hex::encode(&description.platform_identity),
    });
    if let (Platform::Nitro, Some(members)) = (device.platform(), shown.as_object_mut()) {
        // What a policy lists of an enclave, twice: as OS image and as compose hash.
        members.insert("image_hash".to_owned(), hex::encode(sha256(&[measurement])).into());
    }
    Ok(shown.to_string())
}
