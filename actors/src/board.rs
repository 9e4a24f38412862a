//! Receipts of recent intents, as this node applied them.
//!
//! Owns: a bounded book of receipts and the wait for one. Never: makes a receipt; `apply` did. A node that lost the book (restart)
//! rebuilds a receipt from its audit log.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use dstack_protocol::receipt::Receipt;

/// Receipts kept: more than 240 s of a busy cluster would need are rebuilt from the audit log.
pub const RECEIPTS_MAX: usize = 65_536;

/// The book of receipts.
#[derive(Debug, Default)]
pub struct Board {
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    by_intent: HashMap<[u8; 32], Receipt>,
    oldest_first: VecDeque<[u8; 32]>,
}

impl Board {
    /// Adds receipts of an applied entry. Called while applying: no waiting here.
    pub fn post(&self, receipts: Vec<Receipt>) {
        let mut book = self.book();
        for receipt in receipts {
            let id = receipt.intent.id();
            if book.by_intent.insert(id, receipt).is_none() {
                book.oldest_first.push_back(id);
            }
        }
        while book.oldest_first.len() > RECEIPTS_MAX {
            if let Some(id) = book.oldest_first.pop_front() {
                book.by_intent.remove(&id);
            }
        }
    }

    /// The receipt of an intent.
    #[must_use]
    pub fn receipt(&self, intent_id: &[u8; 32]) -> Option<Receipt> {
        self.book().by_intent.get(intent_id).cloned()
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
