//! Whether the listener for dstack's guests serves, and what it waits for. Owns: the word for operators. Never: decides it.

use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

/// Longest text, characters.
const WORDS_MAX: usize = 400;

#[derive(Debug, Default)]
enum Word {
    #[default]
    Off,
    Serves,
    Waits(String),
}

/// See the module text. Off until somebody says otherwise.
#[derive(Debug, Default)]
pub(crate) struct Standing(Mutex<Word>);

impl Standing {
    /// It has a certificate under the root.
    pub(super) fn serves(&self) {
        self.set(Word::Serves);
    }

    /// It has none yet, or is not bound.
    pub(super) fn waits(&self, what: &str) {
        self.set(Word::Waits(what.chars().take(WORDS_MAX).collect()));
    }

    fn set(&self, word: Word) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = word;
    }

    /// For the status document: `null` where the configuration has no such listener.
    pub(crate) fn json(&self) -> Value {
        match &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Word::Off => Value::Null,
            Word::Serves => json!({ "serves": true, "waits_for": null }),
            Word::Waits(what) => json!({ "serves": false, "waits_for": what }),
        }
    }
}
