//! Rows of signatures and env keys, and how others look them up.
//!
//! Owns: the rows' encodings and lookups. Never: a rule.

use std::collections::BTreeMap;

use super::{Blob, Canonical, State};
use crate::ceremony::Message;
use crate::codec::{DecodeError, Reader, Wire, Writer};
use crate::env::EnvPubBody;
use crate::ids::{AppId, Generation, NodeIndex, UnixMillis};
use crate::refusal::{Refusal, RefusalCode};
use crate::sign::{Basis, SignKey, SignObject};

impl Canonical for SignKey {
    fn put(&self, w: &mut Writer) {
        self.write(w);
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::read(r)
    }
}

impl Canonical for Basis {
    fn put(&self, w: &mut Writer) {
        self.write(w);
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::read(r)
    }
}

impl Canonical for SignObject {
    fn put(&self, w: &mut Writer) {
        w.lp(&self.encode());
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::decode(r.lp("object", Self::BYTES_MAX)?)
    }
}

state_struct!(
    /// An ask for a signature, as the signers read it: serial and dates of a certificate derive from `pos` and `log_time`.
    AskRow {
        /// Leaf number of the first ask.
        pos: u64,
        /// Log time when it was applied.
        log_time: UnixMillis,
        /// Who asked first.
        author: NodeIndex,
        /// What is to be signed.
        object: SignObject,
        /// What it rests on.
        basis: Basis,
        /// How often it was asked for: 1, and one more with each repeated ask.
        attempts: u32,
    }
);
state_struct!(
    /// An ask with its signature.
    SignedRow {
        /// The ask.
        ask: AskRow,
        /// Leaf number of the command that brought the signature.
        pos: u64,
        /// Root `ca`: the certificate's DER. Root `id`: `r ‖ s ‖ recid`.
        bytes: Blob,
    }
);
state_struct!(
    /// All that the state keeps about one key: the asks that wait, and the last signature.
    SignRow {
        /// Asks that wait, by author: nobody's ask stands in another's way.
        open: BTreeMap<NodeIndex, AskRow>,
        /// The signature in force. It stays while a newer one is asked for.
        signed: Option<SignedRow>,
        /// Log times of the asks that count against a limit (issuing CAs of the last hour).
        recent: Vec<UnixMillis>,
    }
);
state_struct!(
    /// Env public key of an app.
    EnvRow {
        /// Number of the last attempt.
        attempt: u8,
        /// Its leaf number.
        attempt_pos: u64,
        /// Log time when it began.
        since: UnixMillis,
        /// The node it names.
        combiner: NodeIndex,
        /// The message that published the key.
        published: Option<Message>,
    }
);

impl EnvRow {
    /// The key, once published.
    #[must_use]
    pub fn envpub(&self) -> Option<[u8; 32]> {
        EnvPubBody::decode(&self.published.as_ref()?.body).ok().map(|body| body.envpub)
    }

    /// Whether the last attempt still runs at `log_time`: no key yet, and 60 s of log time are not over.
    #[must_use]
    pub fn is_open(&self, log_time: UnixMillis) -> bool {
        self.published.is_none() && log_time.since(self.since) <= crate::limits::ENV_ATTEMPT_MS_MAX
    }
}

impl SignRow {
    /// The ask that waits at `pos`.
    #[must_use]
    pub fn open_at(&self, pos: u64) -> Option<&AskRow> {
        self.open.values().find(|ask| ask.pos == pos)
    }
}

impl State {
    /// The signature of exactly this object.
    #[must_use]
    pub fn signed(&self, object: &SignObject) -> Option<&SignedRow> {
        self.latest_signed(&object.key()).filter(|row| row.ask.object == *object)
    }

    /// The last signature under a key: of an env key the latest date, of a node its latest issuing CA.
    #[must_use]
    pub fn latest_signed(&self, key: &SignKey) -> Option<&SignedRow> {
        self.signatures.get(key)?.signed.as_ref()
    }

    /// The ask for exactly this object that waits for its signature.
    #[must_use]
    pub fn asked(&self, object: &SignObject) -> Option<&AskRow> {
        self.signatures.get(&object.key())?.open.values().find(|ask| ask.object == *object)
    }

    /// The ask under this key at this leaf, if it still waits: what a signer acts on.
    #[must_use]
    pub fn asked_at(&self, key: &SignKey, pos: u64) -> Option<&AskRow> {
        self.signatures.get(key)?.open_at(pos)
    }

    /// An app's env public key.
    ///
    /// # Errors
    /// [`RefusalCode::AppUnknown`], or [`RefusalCode::EnvKeyMissing`] with how far the attempts are and what to do.
    pub fn env_key(&self, generation: Generation, app_id: &AppId) -> Result<[u8; 32], Refusal> {
        if !self.apps.contains_key(app_id) {
            return Err(Refusal::new(RefusalCode::AppUnknown, "a registered app", app_id.to_string()));
        }
        let row = self.env_keys.get(&(generation, *app_id));
        if let Some(envpub) = row.and_then(EnvRow::envpub) {
            return Ok(envpub);
        }
        let got = match row {
            None => "no attempt yet".to_owned(),
            Some(row) if row.is_open(self.log_time) => format!("attempt {} runs at node {}", row.attempt, row.combiner),
            Some(row) => format!("attempt {} ended without a key; node {} was named", row.attempt, row.combiner),
        };
        Err(Refusal::new(RefusalCode::EnvKeyMissing, "a published env key", got).retry_after(5000))
    }
}
