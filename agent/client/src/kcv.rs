//! Check values of keys, kept beside what the keys protect. Owns: one small file of mode 0600. Never: sends one anywhere; never
//! replaces one: a key that differs is refused, and a person decides.
//! Source: threshold.md §1.4 ("a consumer that holds a KCV refuses a key whose KCV differs").
//!
//! ```json
//! { "generation": 0, "kcvs": { "disk": "<32 hex digits>", "custom:some/path": "…" } }
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use dstack_protocol::Generation;
use dstack_protocol::release::{KeyClass, Wish};
use dstack_threshold::keys::{KeyCheckValue, TypedKey};
use serde::{Deserialize, Serialize};

/// Largest file that is read, bytes.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Check values in one file; a guest asks for few classes and paths.
pub const ENTRIES_MAX: usize = 512;

/// Why a key is refused, or the file cannot be used.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KcvError {
    /// The key is not the one that was used before: another cluster, root or pin. Do not use it; what it protects would not open.
    #[error("the {name} key differs from the one used before: check value {kept} kept, {got} derived; restore the pin, or remove {} if the old data is given up", .file.display())]
    Mismatch {
        /// Which key.
        name: String,
        /// Kept.
        kept: String,
        /// Derived now.
        got: String,
        /// The file.
        file: PathBuf,
    },
    /// The file belongs to another generation of the root.
    #[error("check values in {} are of generation {kept}, the key is of {got}: move the data to the new generation, then remove the file", .file.display())]
    OtherGeneration {
        /// Kept.
        kept: Generation,
        /// Of the key.
        got: Generation,
        /// The file.
        file: PathBuf,
    },
    /// The file is not of this form. Restore it, or remove it if no data depends on its keys.
    #[error("check values in {} are unreadable: {reason}", .file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The file cannot be read or written. Operator's to fix: rights, space.
    #[error("cannot use {}: {kind}", .file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's answer.
        kind: io::ErrorKind,
    },
    /// More different keys than a file holds.
    #[error("{} holds {ENTRIES_MAX} check values, no more", .file.display())]
    Full {
        /// The file.
        file: PathBuf,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    generation: u32,
    kcvs: BTreeMap<String, String>,
}

/// The file. One process uses it at a time.
#[derive(Debug)]
pub struct KcvStore {
    file: PathBuf,
    one_at_a_time: Mutex<()>,
}

impl KcvStore {
    /// A store in `file`, which need not exist yet; its directory must.
    #[must_use]
    pub fn new(file: impl Into<PathBuf>) -> Self {
        Self { file: file.into(), one_at_a_time: Mutex::new(()) }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.file
    }

    /// Compares each key with what is kept, and keeps the check values of new ones. Nothing is kept if one key differs.
    ///
    /// # Errors
    /// [`KcvError`]; then none of the keys may be used.
    pub fn admit(&self, generation: Generation, wishes: &[Wish], keys: &[TypedKey]) -> Result<(), KcvError> {
        let _turn = self.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept = match self.read()? {
            None => Kept { generation: generation.0, kcvs: BTreeMap::new() },
            Some(kept) if kept.generation == generation.0 => kept,
            Some(kept) => {
                return Err(KcvError::OtherGeneration { kept: Generation(kept.generation), got: generation, file: self.file.clone() });
            }
        };
        let mut is_changed = false;
        for (wish, key) in wishes.iter().zip(keys) {
            let name = name_of(wish);
            match kept.kcvs.get(&name) {
                Some(text) => {
                    let before = self.check_value(&name, text)?;
                    key.check(&before).map_err(|_| self.mismatch(name, &before, &key.kcv()))?;
                }
                None => {
                    kept.kcvs.insert(name, key.kcv().to_string());
                    is_changed = true;
                }
            }
        }
        if kept.kcvs.len() > ENTRIES_MAX {
            return Err(KcvError::Full { file: self.file.clone() });
        }
        if is_changed { self.write(&kept) } else { Ok(()) }
    }

    fn mismatch(&self, name: String, kept: &KeyCheckValue, got: &KeyCheckValue) -> KcvError {
        KcvError::Mismatch { name, kept: kept.to_string(), got: got.to_string(), file: self.file.clone() }
    }

    fn check_value(&self, name: &str, text: &str) -> Result<KeyCheckValue, KcvError> {
        let mut bytes = [0; 16];
        match hex::decode_to_slice(text, &mut bytes) {
            Ok(()) => Ok(KeyCheckValue(bytes)),
            Err(_) => Err(self.damaged(format!("entry {name:?} is not 32 hex digits"))),
        }
    }

    fn damaged(&self, reason: String) -> KcvError {
        KcvError::Damaged { file: self.file.clone(), reason }
    }

    fn read(&self) -> Result<Option<Kept>, KcvError> {
        let file = match File::open(&self.file) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.io(&error)),
        };
        let mut text = Vec::new();
        file.take(FILE_BYTES_MAX.saturating_add(1)).read_to_end(&mut text).map_err(|error| self.io(&error))?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(self.damaged(format!("more than {FILE_BYTES_MAX} bytes")));
        }
        serde_json::from_slice(&text).map(Some).map_err(|error| self.damaged(error.to_string()))
    }

    /// Beside the old file, made durable, then renamed: a stop at any moment leaves the old or the new one.
    fn write(&self, kept: &Kept) -> Result<(), KcvError> {
        let text = serde_json::to_vec_pretty(kept).map_err(|error| self.damaged(error.to_string()))?;
        let mut beside = self.file.clone().into_os_string();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        let directory = self.file.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let replace = || -> io::Result<()> {
            let _ = fs::remove_file(&beside);
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&beside, &self.file)?;
            File::open(directory)?.sync_all()
        };
        replace().map_err(|error| self.io(&error))
    }

    fn io(&self, error: &io::Error) -> KcvError {
        KcvError::Io { file: self.file.clone(), kind: error.kind() }
    }
}

/// Name of a key in the file: its class; for custom secrets with the path.
fn name_of(wish: &Wish) -> String {
    match wish.class {
        KeyClass::Custom => format!("custom:{}", String::from_utf8_lossy(&wish.ctx)),
        KeyClass::Disk | KeyClass::Env | KeyClass::K256 | KeyClass::P256 => wish.class.name().to_owned(),
    }
}
