//! The command line, and the seeded randomness that all trials use.

use std::path::PathBuf;

use dstack_storage::EngineKind;

/// What a trial is told.
#[derive(Debug, Clone)]
pub(crate) struct Arguments {
    pub(crate) command: String,
    pub(crate) engine: EngineKind,
    pub(crate) count: u64,
    pub(crate) from: u64,
    pub(crate) seed: u64,
    pub(crate) dir: Option<PathBuf>,
    /// Address space of a child that opens damaged files; 0 for no limit, where a sanitizer needs it all and limits memory itself.
    pub(crate) memory_mib: u64,
}

impl Arguments {
    pub(crate) fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let command = words.next().ok_or("no trial named")?;
        let mut arguments = Self { command, engine: EngineKind::Redb, count: 10, from: 0, seed: 1, dir: None, memory_mib: 2048 };
        while let Some(name) = words.next() {
            let value = words.next().ok_or_else(|| format!("{name} needs a value"))?;
            let number = || value.parse::<u64>().map_err(|error| format!("{name} {value}: {error}"));
            match name.as_str() {
                "--engine" => arguments.engine = value.parse().map_err(|error| format!("{error}"))?,
                "--count" => arguments.count = number()?,
                "--from" => arguments.from = number()?,
                "--seed" => arguments.seed = number()?,
                "--memory-mib" => arguments.memory_mib = number()?,
                "--dir" => arguments.dir = Some(PathBuf::from(value)),
                _ => return Err(format!("unknown argument {name}")),
            }
        }
        Ok(arguments)
    }

    /// How to run one case of this trial again.
    pub(crate) fn replay(&self, case: u64) -> String {
        format!("storage-torment {} --engine {} --seed {} --from {case} --count 1", self.command, self.engine, self.seed)
    }
}

/// SplitMix64.
#[derive(Debug, Clone)]
pub(crate) struct Seeded(u64);

impl Seeded {
    /// A stream for `case` of `seed`.
    pub(crate) fn new(seed: u64, case: u64) -> Self {
        let mut outer = Self(seed);
        let mixed = outer.next() ^ case.wrapping_mul(0xd6e8_feb8_6659_fd93);
        let mut seeded = Self(mixed);
        seeded.next();
        seeded
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to `limit - 1`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next().checked_rem(limit).unwrap_or(0)
    }

    pub(crate) fn size_below(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(u64::try_from(limit).unwrap_or(u64::MAX))).unwrap_or(0)
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count);
        while bytes.len() < count {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }

    /// 1 to `most` bytes.
    pub(crate) fn some_bytes(&mut self, most: usize) -> Vec<u8> {
        let count = 1usize.saturating_add(self.size_below(most));
        self.bytes(count)
    }
}

/// Milliseconds at the middle and the end of a sorted list.
pub(crate) fn median_and_max(mut values: Vec<u128>) -> (u128, u128) {
    values.sort_unstable();
    let middle = values.get(values.len() / 2).copied().unwrap_or(0);
    (middle, values.last().copied().unwrap_or(0))
}
