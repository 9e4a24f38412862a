//! `rand` and `hex`. Owns: bytes out of the system, bytes into text. Never: random bytes in a file that others may read.

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::Path;

use anyhow::{Context as _, bail};
use zeroize::Zeroizing;

use super::put;

/// Most random bytes at once.
const RANDOM_BYTES_MAX: usize = 64 << 20;

/// Random bytes, as they are or as hex, to standard output or a file of mode 0600.
///
/// # Errors
/// Too many, or the system's.
pub fn rand(count: usize, output: Option<&Path>, as_hex: bool) -> anyhow::Result<()> {
    if count > RANDOM_BYTES_MAX {
        bail!("{count} random bytes were asked for, at most {RANDOM_BYTES_MAX} are given");
    }
    let mut bytes = Zeroizing::new(vec![0; count]);
    getrandom::fill(&mut bytes).context("the system gives no randomness")?;
    if as_hex {
        let mut text = Zeroizing::new(vec![0; count.saturating_mul(2)]);
        ::hex::encode_to_slice(&bytes[..], &mut text).context("hex")?;
        bytes = text;
    }
    put(output, &bytes, "", 0o600)
}

/// Standard input or a file, as lowercase hex.
///
/// # Errors
/// The system's.
pub fn hex(file: Option<&Path>) -> anyhow::Result<()> {
    let mut input: Box<dyn Read> = match file {
        Some(file) => Box::new(File::open(file).with_context(|| format!("cannot open {}", file.display()))?),
        None => Box::new(io::stdin()),
    };
    let (mut chunk, mut out) = (vec![0; 1 << 16], io::stdout().lock());
    loop {
        match input.read(&mut chunk) {
            Ok(0) => return out.flush().context("standard output"),
            Ok(count) => out.write_all(::hex::encode(chunk.get(..count).unwrap_or_default()).as_bytes()).context("standard output")?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("cannot read the input"),
        }
    }
}
