//! The proof that an intent is in the log (threshold.md §2.7).

use crate::codec::{DecodeError, Reader, Wire, Writer};
use crate::ids::Generation;
use crate::limits::PROOF_HASHES_MAX;
use crate::log::Record;
use crate::release::Intent;

/// `Receipt`: intent, its record, and an inclusion proof to `log_root` at `size`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// Generation of the root.
    pub generation: Generation,
    /// The intent.
    pub intent: Intent,
    /// Its leaf's record.
    pub record: Record,
    /// Log size the proof leads to.
    pub size: u64,
    /// Log root at that size.
    pub log_root: [u8; 32],
    /// RFC 6962 inclusion path, leaf to root.
    pub path: Vec<[u8; 32]>,
}

impl Wire for Receipt {
    const BYTES_MAX: usize = 4096 + 32 * PROOF_HASHES_MAX;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-RECEIPT")
            .u32(self.generation.0)
            .lp(&self.intent.encode())
            .value(&self.record)
            .u64(self.size)
            .raw(&self.log_root)
            .count1(self.path.len());
        for hash in &self.path {
            w.raw(hash);
        }
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-RECEIPT")?;
        Ok(Self {
            generation: Generation::read("generation", r)?,
            intent: Intent::decode(r.lp("intent", Intent::BYTES_MAX)?)?,
            record: Record::read(r)?,
            size: r.u64("size")?,
            log_root: r.array("log_root")?,
            path: {
                let count = usize::from(r.u8("path")?);
                if count > PROOF_HASHES_MAX {
                    return Err(DecodeError::TooLong { field: "path", max: PROOF_HASHES_MAX, got: count });
                }
                r.list("path", count, 32, |r| r.array("hash"))?
            },
        })
    }
}
