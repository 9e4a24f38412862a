//! LUKS2 by the real `cryptsetup`. Owns: format, the passphrase tried on a judged header, opening with that header. Never: a passphrase in
//! an argument or a file; a header on the disk that is not ours to overwrite.
//! Source: util and deploy reference §5. Passphrase: lowercase hex text of the disk key.

use std::path::{Path, PathBuf};

use dstack_secret::SecretBytes;

use super::header::{self, Beginning, CIPHER, Header, HeaderError};
use crate::program::{Program, ProgramError};

const PACKAGE: &str = "Debian package cryptsetup-bin";
/// Where the kernel has device-mapper.
const CONTROL: &str = "/dev/mapper/control";
/// `cryptsetup`'s status where no key slot opens.
const NO_KEY: i32 = 2;

/// Why the disk cannot be unlocked.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LuksError {
    /// The header is refused.
    #[error("{0}")]
    Header(#[from] HeaderError),
    /// The disk holds something that is no LUKS header. Operator's to decide: wipe it (`wipefs -a`), or attach the right disk.
    #[error("{} is neither blank nor a LUKS2 disk: attach the right one, or wipe it if its data is given up", .disk.display())]
    Foreign {
        /// The disk.
        disk: PathBuf,
    },
    /// Another key than the disk was made with. The instance's seed, the app or the root of its keys is another than before.
    #[error("the disk key does not open {}: it was made for another instance, app or key provider", .disk.display())]
    OtherKey {
        /// The disk.
        disk: PathBuf,
    },
    /// No device-mapper in this kernel: format, header and passphrase are right, but nothing can be opened. Operator's to fix.
    #[error("step open: this kernel has no device-mapper ({CONTROL} is missing; module dm_crypt): the disk cannot be opened")]
    NoDeviceMapper,
    /// `cryptsetup` is missing or failed.
    #[error("{0}")]
    Program(#[from] ProgramError),
}

/// Lowercase hex text of the disk key.
#[must_use]
pub fn passphrase(key: &SecretBytes) -> SecretBytes {
    key.expose(|key| {
        SecretBytes::from_fn(key.len().saturating_mul(2), |out| {
            // as long as it must be
            let _ = hex::encode_to_slice(key, out);
        })
    })
}

/// Makes the disk a LUKS2 disk of the one layout that [`Header::judge`] takes.
///
/// # Errors
/// [`LuksError::Program`].
pub fn format(disk: &Path, passphrase: &SecretBytes) -> Result<(), LuksError> {
    let call = Program::new("cryptsetup", PACKAGE)
        .with(["luksFormat", "--type", "luks2", "--batch-mode", "--cipher", CIPHER, "--key-size", "512", "--hash", "sha256"])
        .with([
            "--pbkdf",
            "pbkdf2",
            "--iter-time",
            "200",
            "--offset",
            "32768",
            "--luks2-metadata-size",
            "16k",
            "--luks2-keyslots-size",
            "16352k",
        ])
        .with(["--key-file", "-"])
        .with([disk]);
    Ok(call.run_with_secret(passphrase).map(drop)?)
}

/// Whether the disk was made just now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// It was blank and is formatted now.
    New,
    /// It was there.
    Known,
}

/// The disk's header, judged, with the passphrase tried on it; a blank disk is formatted first.
///
/// # Errors
/// [`LuksError`].
pub fn prepare(disk: &Path, passphrase: &SecretBytes) -> Result<(Header, Disk), LuksError> {
    let (bytes, known) = match header::read(disk)? {
        Beginning::Luks(bytes) => (bytes, Disk::Known),
        Beginning::Foreign => return Err(LuksError::Foreign { disk: disk.to_owned() }),
        Beginning::Blank => {
            format(disk, passphrase)?;
            match header::read(disk)? {
                Beginning::Luks(bytes) => (bytes, Disk::New),
                Beginning::Blank | Beginning::Foreign => return Err(LuksError::Foreign { disk: disk.to_owned() }),
            }
        }
    };
    let header = Header::judge(&bytes)?;
    let tried = call(disk, &header).with(["--test-passphrase"]).run_with_secret(passphrase);
    match tried {
        Ok(_) => Ok((header, known)),
        Err(error) if error.ended_with(NO_KEY) => Err(LuksError::OtherKey { disk: disk.to_owned() }),
        Err(error) => Err(error.into()),
    }
}

/// Opens the disk by the judged header; the device with its plain contents.
///
/// # Errors
/// [`LuksError::NoDeviceMapper`], [`LuksError::Program`].
pub fn open(disk: &Path, header: &Header, name: &str, passphrase: &SecretBytes) -> Result<PathBuf, LuksError> {
    let mapped = Path::new("/dev/mapper").join(name);
    if !Path::new(CONTROL).exists() {
        return Err(LuksError::NoDeviceMapper);
    }
    // a second run in one boot
    if !mapped.exists() {
        call(disk, header).with([name]).run_with_secret(passphrase)?;
    }
    Ok(mapped)
}

fn call(disk: &Path, header: &Header) -> Program {
    Program::new("cryptsetup", PACKAGE).with(["open", "--type", "luks2", "--key-file", "-", "--header"]).with([header.path()]).with([disk])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};
    use std::os::unix::fs::FileExt as _;

    /// `None` where it is not installed: said, and a failure under CI.
    fn disk() -> Option<(tempfile::TempDir, PathBuf)> {
        if std::process::Command::new("cryptsetup").arg("--version").output().is_err() {
            #[allow(clippy::disallowed_methods, reason = "whether tests may be left out is CI's to say")]
            let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
            assert!(!ci, "cryptsetup is not installed; CI has to have it");
            eprintln!("left out: cryptsetup is not installed (Debian package cryptsetup-bin)");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(32 << 20).unwrap();
        Some((dir, path))
    }

    fn key(byte: u8) -> SecretBytes {
        passphrase(&SecretBytes::take(vec![byte; 32]))
    }

    #[test]
    fn a_blank_disk_is_formatted_once_and_known_again() {
        let Some((_dir, path)) = disk() else { return };
        key(0xab).expose(|text| assert_eq!(text, "ab".repeat(32).as_bytes()));
        let (header, known) = prepare(&path, &key(1)).unwrap();
        assert_eq!(known, Disk::New);
        let (_, known) = prepare(&path, &key(1)).unwrap();
        assert_eq!(known, Disk::Known);
        assert_eq!(prepare(&path, &key(2)).unwrap_err(), LuksError::OtherKey { disk: path.clone() });
        if !Path::new(CONTROL).exists() {
            let refused = open(&path, &header, "dstack-test", &key(1)).unwrap_err();
            assert_eq!(refused, LuksError::NoDeviceMapper);
        }
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[0; 6], 0).unwrap();
        file.write_all_at(&[0; 6], 16 << 10).unwrap();
        assert_eq!(prepare(&path, &key(1)).unwrap_err(), LuksError::Foreign { disk: path.clone() }, "data is never formatted over");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        assert!(matches!(prepare(&path, &key(1)), Err(LuksError::Header(HeaderError::Unreadable { .. }))));
    }

    /// The JSON area of both headers, replaced, with right checksums.
    fn rewrite(path: &Path, change: impl Fn(&str) -> String) {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        for at in [0u64, 16 << 10] {
            let mut bytes = vec![0; 16 << 10];
            file.read_exact_at(&mut bytes, at).unwrap();
            let end = bytes[4096..].iter().position(|byte| *byte == 0).unwrap();
            let json = change(std::str::from_utf8(&bytes[4096..4096 + end]).unwrap());
            bytes[4096..].fill(0);
            bytes[4096..4096 + json.len()].copy_from_slice(json.as_bytes());
            bytes[448..512].fill(0);
            let digest = dstack_protocol::codec::sha256(&[&bytes]);
            bytes[448..480].copy_from_slice(&digest);
            file.write_all_at(&bytes, at).unwrap();
        }
    }

    #[test]
    fn every_other_header_is_refused() {
        let Some((_dir, path)) = disk() else { return };
        prepare(&path, &key(1)).unwrap();
        let made = std::fs::read(&path).unwrap();
        let restore = || std::fs::write(&path, &made).unwrap();
        for (from, to) in [
            ("\"encryption\":\"aes-xts-plain64\",\"sector_size\"", "\"encryption\":\"cipher_null-ecb\",\"sector_size\""),
            ("\"offset\":\"16777216\"", "\"offset\":\"33554432\""),
            ("\"size\":\"dynamic\"", "\"size\":\"1048576\""),
            ("\"stripes\":4000", "\"stripes\":1"),
            ("\"offset\":\"32768\"", "\"offset\":\"65536\""),
            ("\"tokens\":{}", "\"tokens\":{\"0\":{\"type\":\"x\",\"keyslots\":[]}}"),
            ("\"iv_tweak\":\"0\"", "\"iv_tweak\":\"0\",\"integrity\":{}"),
            ("\"iv_tweak\":\"0\"", "\"iv_tweak\":\"8\""),
            ("\"config\":{", "\"config\":{\"requirements\":{\"mandatory\":[\"x\"]},"),
            ("\"hash\":\"sha256\",\"iterations\":", "\"hash\":\"sha1\",\"iterations\":"),
            ("\"segments\":[\"0\"]", "\"segments\":[\"0\",\"1\"]"),
            ("\"type\":\"pbkdf2\",\"hash\"", "\"type\":\"argon2id\",\"hash\""),
            ("{\"keyslots\":{\"0\"", "{\"keyslots\":{\"1\""),
        ] {
            rewrite(&path, |json| {
                assert!(json.contains(from), "{from} in {json}");
                json.replacen(from, to, 1)
            });
            let refused = prepare(&path, &key(1)).unwrap_err();
            assert!(matches!(refused, LuksError::Header(HeaderError::Member { .. } | HeaderError::Json { .. })), "{to}: {refused}");
            restore();
        }
        rewrite(&path, |json| {
            let at = json.find("\"iterations\":").unwrap() + 13;
            let end = at + json[at..].find(',').unwrap();
            format!("{}4000000000{}", &json[..at], &json[end..])
        });
        let refused = prepare(&path, &key(1)).unwrap_err();
        assert!(refused.to_string().contains("keyslots.0.kdf.iterations is 4000000000"), "{refused}");
        restore();
        for at in [0usize, 7, 15, 72, 256, 448, 4100, 16 << 10, (16 << 10) + 4100] {
            let mut bytes = made.clone();
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            let refused = prepare(&path, &key(1)).unwrap_err();
            assert!(matches!(refused, LuksError::Header(_)), "byte {at}: {refused}");
        }
        restore();
        assert!(prepare(&path, &key(1)).is_ok());
    }
}
