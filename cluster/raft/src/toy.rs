//! A small machine for tests: an ordered map with leaves, checkpoints and seats.
//! Owns: nothing that ships; compiled for tests only.

use std::collections::{BTreeMap, BTreeSet};

use dstack_protocol::Seat;

use crate::contract::{Applied, Leaf, Machine};

/// `set <key> <value>`, `checkpoint`, `seats <n>,<n>`; anything else is refused, never a panic.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Toy {
    pub(crate) map: BTreeMap<String, String>,
    pub(crate) size: u64,
    pub(crate) seats: Option<BTreeSet<u16>>,
    pub(crate) at_checkpoint: bool,
    /// Set in tests that need snapshots anywhere.
    pub(crate) checkpoint_everywhere: bool,
}

impl Machine for Toy {
    type Effect = u64;

    fn apply(&mut self, command: &[u8]) -> Applied<u64> {
        let text = String::from_utf8_lossy(command).into_owned();
        let words: Vec<&str> = text.splitn(3, ' ').collect();
        self.at_checkpoint = false;
        let response = match words.as_slice() {
            ["set", key, value] => {
                let before = self.map.insert((*key).to_owned(), (*value).to_owned());
                format!("was {}", before.as_deref().unwrap_or("nothing"))
            }
            ["checkpoint"] => {
                self.at_checkpoint = true;
                "checkpoint".to_owned()
            }
            ["seats", list] => {
                self.seats = Some(list.split(',').filter_map(|seat| seat.parse().ok()).collect());
                "seats".to_owned()
            }
            _ => "refused".to_owned(),
        };
        let leaf = Leaf { pos: self.size, record: response.clone().into_bytes(), body: command.to_vec() };
        self.size += 1;
        Applied { response: response.into_bytes(), leaves: vec![leaf], effects: vec![self.size] }
    }

    fn snapshot(&self) -> Vec<u8> {
        let seats = self.seats.as_ref().map(|seats| seats.iter().copied().collect::<Vec<u16>>());
        postcard::to_stdvec(&(&self.map, self.size, seats)).unwrap_or_default()
    }

    fn restored(&self, snapshot: &[u8]) -> Result<Self, String> {
        type Stored = (BTreeMap<String, String>, u64, Option<Vec<u16>>);
        let (map, size, seats): Stored = postcard::from_bytes(snapshot).map_err(|error| error.to_string())?;
        let seats = seats.map(|seats| seats.into_iter().collect());
        Ok(Self { map, size, seats, at_checkpoint: true, checkpoint_everywhere: self.checkpoint_everywhere })
    }

    fn at_checkpoint(&self) -> bool {
        self.at_checkpoint || self.checkpoint_everywhere
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn seats(&self) -> Option<BTreeSet<Seat>> {
        self.seats.as_ref().map(|seats| seats.iter().copied().map(Seat).collect())
    }
}
