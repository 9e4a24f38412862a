//! `dstack operator`: Ed25519 keys of operators. Owns: the key file. Never: prints or copies the private half.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use dstack_protocol::ClusterId;
use dstack_protocol::Wire as _;
use dstack_protocol::collateral::{Pin, PinRequest};
use dstack_protocol::env::EnvAttempt;
use dstack_protocol::governance::{Action, Approval};
use dstack_secret::{Secret, SecretBytes};
use ed25519_dalek::{Signer as _, SigningKey};

use crate::failure::{Done, Failure};
use crate::files;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Make a key; print its public half.
    #[command(
        after_help = "Example: dstack operator keygen --out alice.key\nThe file holds the Ed25519 seed in hex, readable by its owner only. Keep it offline: `policy propose --sign-only`."
    )]
    Keygen {
        /// New file for the key.
        #[arg(long)]
        out: PathBuf,
    },
    /// Print the public half of a key.
    PublicKey {
        /// Key file.
        #[arg(long)]
        key: PathBuf,
    },
}

pub(crate) fn run(command: Command) -> Done {
    match command {
        Command::Keygen { out } => keygen(&out),
        Command::PublicKey { key } => OperatorKey::load(&key).map(|key| key.line()),
    }
}

fn keygen(out: &Path) -> Done {
    let seed = Secret::<32>::try_from_fn(|bytes| getrandom::fill(bytes))
        .map_err(|error| Failure::unable(format!("no randomness: {error}"), "see the operating system's log"))?;
    let text = SecretBytes::try_from_fn(65, |text| {
        let (digits, end) = text.split_at_mut(64);
        end.fill(b'\n');
        seed.expose(|seed| hex::encode_to_slice(seed, digits))
    });
    let text = text.map_err(|error| Failure::unable(error.to_string(), "report this"))?;
    files::write_secret(out, &text)?;
    Ok(OperatorKey::of(&seed).line())
}

/// An operator's key, for signing actions.
pub(crate) struct OperatorKey {
    key: SigningKey,
}

impl OperatorKey {
    fn of(seed: &Secret<32>) -> Self {
        Self { key: seed.expose(SigningKey::from_bytes) }
    }

    /// Reads a key file.
    pub(crate) fn load(path: &Path) -> Result<Self, Failure> {
        let text = files::read_secret(path, 128)?;
        let seed = text.expose(|text| {
            let digits = text.trim_ascii();
            Secret::<32>::try_from_fn(|seed| hex::decode_to_slice(digits, seed))
        });
        let bad = |_| Failure::unable(format!("{} is not an operator key", path.display()), "make one with `dstack operator keygen`");
        Ok(Self::of(&seed.map_err(bad)?))
    }

    /// Approves an action: a signature over its exact bytes (architecture.md §9).
    pub(crate) fn approve(&self, action: &Action) -> Approval {
        Approval { operator: self.key.verifying_key().to_bytes(), sig: self.key.sign(&action.encode()).to_bytes() }
    }

    /// Begins an attempt to compute an app's env key (threshold.md §2.5).
    pub(crate) fn retry(&self, cluster_id: &ClusterId, attempt: EnvAttempt) -> EnvAttempt {
        let sig = self.key.sign(&attempt.signed_bytes(cluster_id)).to_bytes();
        EnvAttempt { operator: Some((self.key.verifying_key().to_bytes(), sig)), ..attempt }
    }

    /// Signs collateral for a cluster.
    pub(crate) fn bring(&self, cluster_id: &ClusterId, pin: Pin) -> PinRequest {
        let sig = self.key.sign(&PinRequest::signed_bytes(cluster_id, &pin)).to_bytes();
        PinRequest { operator: self.key.verifying_key().to_bytes(), sig, pin }
    }

    fn line(&self) -> String {
        format!("public_key={}\n", hex::encode(self.key.verifying_key().to_bytes()))
    }
}
