//! dstack's small subcommands. Owns: one module a family, from parsed arguments to output. Never: exit codes other than 0 and 1; parses
//! arguments (`main` does).
//! Source: util and deploy reference §1.

pub mod app_info;
pub mod attestation;
pub mod bytes;
pub mod certificates;
pub mod events;
pub mod orphans;
#[cfg(feature = "tpm")]
pub mod tpm;

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;

use crate::files;

/// Writes to the file, or to standard output with `end` after it.
///
/// # Errors
/// The system's.
pub fn put(output: Option<&Path>, bytes: &[u8], end: &str, mode: u32) -> anyhow::Result<()> {
    match output {
        Some(file) => Ok(files::write(file, bytes, mode)?),
        None => {
            let mut out = std::io::stdout().lock();
            out.write_all(bytes).and_then(|()| out.write_all(end.as_bytes())).and_then(|()| out.flush()).context("standard output")
        }
    }
}

/// Report data: hex of at most 64 bytes, filled up with zeros.
///
/// # Errors
/// For anything else.
pub fn report_data(hex_text: Option<&str>) -> anyhow::Result<[u8; 64]> {
    let bytes = hex_bytes("report data", hex_text.unwrap_or_default())?;
    filled(&bytes)
}

/// At most 64 bytes, filled up with zeros.
///
/// # Errors
/// For more.
pub fn filled(bytes: &[u8]) -> anyhow::Result<[u8; 64]> {
    let mut out = [0; 64];
    let place = out.get_mut(..bytes.len()).with_context(|| format!("report data has {} bytes, at most 64 are taken", bytes.len()))?;
    place.copy_from_slice(bytes);
    Ok(out)
}

/// Hex in either case, with any number of leading `0x`.
///
/// # Errors
/// For anything else.
pub fn hex_bytes(what: &str, text: &str) -> anyhow::Result<Vec<u8>> {
    hex::decode(text.trim_start_matches("0x")).with_context(|| format!("{what} is not hex"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_data_is_filled_and_bounded() {
        let filled = report_data(Some("0x0xAB")).unwrap();
        assert_eq!((filled[0], &filled[1..]), (0xab, &[0; 63][..]));
        assert_eq!(report_data(None).unwrap(), [0; 64]);
        assert!(report_data(Some(&"00".repeat(65))).unwrap_err().to_string().contains("65 bytes"));
        assert!(report_data(Some("xy")).is_err());
    }
}
