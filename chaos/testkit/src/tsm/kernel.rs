//! What the kernel does behind the files. Owns: entries, generations, the cached quote, measurement registers, injected faults.
//! Never: speaks FUSE; sleeps (a slow host is the file system's to act out).

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use rustix::io::Errno;

use super::td::SoftwareTd;

/// What goes wrong with a later request. Each strikes once; several strike in the order they were injected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Reading `outblob` answers this errno.
    Outblob(i32),
    /// `outblob` is empty, as on kernels that cannot report a failed host.
    Empty,
    /// `outblob` is longer than any quote.
    Endless,
    /// The quote is over other report data.
    OtherReportData,
    /// Reading `outblob` takes this long.
    Slow(Duration),
    /// Another process writes into the entry before the quote is made.
    WriteBefore,
    /// Another process writes into the entry while the quote is read.
    WriteAfter,
    /// The commit of `inblob` fails, which no call tells.
    LostCommit,
    /// Another process removes the entry after `inblob` was committed.
    Removed,
    /// Making a directory answers this errno.
    Mkdir(i32),
}

/// When a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Mkdir,
    Commit,
    Outblob,
}

impl Fault {
    fn stage(&self) -> Stage {
        match self {
            Self::Mkdir(_) => Stage::Mkdir,
            Self::WriteBefore | Self::LostCommit | Self::Removed => Stage::Commit,
            Self::Outblob(_) | Self::Empty | Self::Endless | Self::OtherReportData | Self::Slow(_) | Self::WriteAfter => Stage::Outblob,
        }
    }
}

/// One directory below `report`.
#[derive(Debug, Default)]
struct Entry {
    name: String,
    inblob: Vec<u8>,
    generation: u64,
    /// The quote of a generation: made once, at the first read.
    outblob: Option<(u64, Vec<u8>)>,
}

/// The kernel of one TD.
pub(super) struct Kernel {
    pub(super) td: SoftwareTd,
    /// `tdx_guest`; `None` with no driver loaded.
    pub(super) provider: Option<String>,
    pub(super) faults: VecDeque<Fault>,
    /// Quotes made.
    pub(super) quotes: u64,
    entries: BTreeMap<u64, Entry>,
    next: u64,
}

impl Kernel {
    pub(super) fn new(td: SoftwareTd) -> Self {
        let provider = Some("tdx_guest".to_owned());
        Self { td, provider, faults: VecDeque::new(), quotes: 0, entries: BTreeMap::new(), next: 0 }
    }

    /// Entries by id and name, oldest first.
    pub(super) fn entries(&self) -> impl Iterator<Item = (u64, &str)> {
        self.entries.iter().map(|(id, entry)| (*id, entry.name.as_str()))
    }

    pub(super) fn find(&self, name: &str) -> Option<u64> {
        self.entries().find(|(_, taken)| *taken == name).map(|(id, _)| id)
    }

    pub(super) fn exists(&self, id: u64) -> bool {
        self.entries.contains_key(&id)
    }

    pub(super) fn mkdir(&mut self, name: &str) -> Result<u64, Errno> {
        if self.provider.is_none() {
            return Err(Errno::NXIO);
        }
        if let Some(Fault::Mkdir(errno)) = self.due(Stage::Mkdir) {
            return Err(Errno::from_raw_os_error(errno));
        }
        if self.find(name).is_some() {
            return Err(Errno::EXIST);
        }
        self.next += 1;
        self.entries.insert(self.next, Entry { name: name.to_owned(), ..Entry::default() });
        Ok(self.next)
    }

    pub(super) fn rmdir(&mut self, id: u64) -> Result<(), Errno> {
        self.entries.remove(&id).map(|_| ()).ok_or(Errno::NOENT)
    }

    pub(super) fn generation(&self, id: u64) -> Result<u64, Errno> {
        self.entries.get(&id).map(|entry| entry.generation).ok_or(Errno::NOENT)
    }

    /// What a write of `inblob` does when its file is closed.
    pub(super) fn commit(&mut self, id: u64, inblob: Vec<u8>) {
        let fault = self.due(Stage::Commit);
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if fault == Some(Fault::LostCommit) {
            return;
        }
        entry.inblob = inblob;
        entry.generation += 1;
        match fault {
            Some(Fault::WriteBefore) => entry.foreign_write(),
            Some(Fault::Removed) => {
                self.entries.remove(&id);
            }
            _ => {}
        }
    }

    /// The quote, and how long it takes.
    pub(super) fn outblob(&mut self, id: u64) -> (Result<Vec<u8>, Errno>, Duration) {
        let fault = self.due(Stage::Outblob);
        let at_once = |result| (result, Duration::ZERO);
        let Some(entry) = self.entries.get_mut(&id) else { return at_once(Err(Errno::NOENT)) };
        match fault {
            Some(Fault::Outblob(errno)) => return at_once(Err(Errno::from_raw_os_error(errno))),
            Some(Fault::Empty) => return at_once(Ok(Vec::new())),
            Some(Fault::Endless) => return at_once(Ok(vec![0xee; 2 << 20])),
            _ => {}
        }
        if self.provider.is_none() {
            return at_once(Err(Errno::NOTTY));
        }
        if let Some((generation, quote)) = &entry.outblob
            && *generation == entry.generation
        {
            return at_once(Ok(quote.clone()));
        }
        let Ok(mut report_data) = <[u8; 64]>::try_from(entry.inblob.as_slice()) else {
            return at_once(Err(Errno::INVAL));
        };
        if fault == Some(Fault::OtherReportData) {
            report_data = [0x0f; 64];
        }
        let quote = self.td.quote(report_data);
        self.quotes += 1;
        entry.outblob = Some((entry.generation, quote.clone()));
        match fault {
            Some(Fault::WriteAfter) => {
                entry.foreign_write();
                at_once(Ok(quote))
            }
            Some(Fault::Slow(time)) => (Ok(quote), time),
            _ => at_once(Ok(quote)),
        }
    }

    /// The next fault, if it is of this stage.
    fn due(&mut self, stage: Stage) -> Option<Fault> {
        if self.faults.front()?.stage() == stage { self.faults.pop_front() } else { None }
    }
}

impl Entry {
    fn foreign_write(&mut self) {
        self.inblob = vec![0xff; 64];
        self.generation += 1;
    }
}
