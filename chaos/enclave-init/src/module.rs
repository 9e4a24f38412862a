//! A look at the enclave's NSM through the production device: what it is, and that our limits hold before it is asked. Owns: what is
//! reported. Never: judges.

use std::path::Path;

use anyhow::Context as _;
use dstack_tee::nsm::Ask;
use dstack_tee::options::NSM;
use dstack_tee::{Device as _, NsmDevice};

use crate::say;

/// Reports on the module.
pub(crate) fn look() -> anyhow::Result<()> {
    let device = NsmDevice::open(Path::new(NSM)).context("nsm")?;
    say("nsm", &format!("{:?}", device.facts()));
    let description = device.describe()?;
    say("measurement", &hex::encode(&description.measurement));
    say("parent", &hex::encode(&description.platform_identity));
    say("image-hash", &hex::encode(device.image_hash()));
    say("random", &device.random()?.len().to_string());
    // At the documented sizes, and one byte beyond each.
    say("at-limits", &outcome(device.document(ask(512, 512, 1024))));
    for (name, sizes) in [("user-data", (513, 0, 0)), ("nonce", (0, 513, 0)), ("public-key", (0, 0, 1025))] {
        say(&format!("beyond-{name}"), &outcome(device.document(ask(sizes.0, sizes.1, sizes.2))));
    }
    Ok(())
}

fn ask(user_data: usize, nonce: usize, public_key: usize) -> Ask {
    let part = |bytes: usize| (bytes > 0).then(|| vec![0x5a; bytes]);
    Ask { user_data: part(user_data), nonce: part(nonce), public_key: part(public_key) }
}

fn outcome(document: Result<Vec<u8>, dstack_tee::TeeError>) -> String {
    match document {
        Ok(document) => format!("document of {} bytes", document.len()),
        Err(error) => format!("refused: {error}"),
    }
}
