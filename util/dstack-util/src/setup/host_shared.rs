//! The host's files. Owns: which there are, how large each may be, copying them to where the guest works; mounting the host's share.
//! Never: follows a link, reads a file twice (the host could change it in between: what was copied is what is used).
//! Source: util and deploy reference §3 step 1, §8.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::files::{self, FileError};
use crate::program::{Program, ProgramError};

/// Folder of the copies below the work directory.
pub const FOLDER: &str = ".host-shared";
/// Label of the disk with the host's files.
pub const DISK_LABEL: &str = "DSTACKSHR";
/// Largest app-compose.json and user config.
pub const LARGE_BYTES_MAX: u64 = 50 << 20;

/// One of the host's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedFile {
    /// Its name.
    pub name: &'static str,
    /// Its name in dstack 0.4, if another.
    legacy: Option<&'static str>,
    /// Largest size.
    pub limit_bytes: u64,
    required: bool,
}

/// The measured document.
pub const APP_COMPOSE: SharedFile = SharedFile { name: "app-compose.json", legacy: None, limit_bytes: LARGE_BYTES_MAX, required: true };
/// Addresses and claims of the host.
pub const SYS_CONFIG: SharedFile =
    SharedFile { name: ".sys-config.json", legacy: Some("config.json"), limit_bytes: 32 << 10, required: true };
/// Which instance this is.
pub const INSTANCE_INFO: SharedFile = SharedFile { name: ".instance_info", legacy: None, limit_bytes: 10 << 10, required: false };
/// The app's environment, encrypted.
pub const ENCRYPTED_ENV: SharedFile =
    SharedFile { name: ".encrypted-env", legacy: Some("encrypted-env"), limit_bytes: 256 << 10, required: false };
/// The app's own, not measured.
pub const USER_CONFIG: SharedFile = SharedFile { name: ".user-config", legacy: None, limit_bytes: LARGE_BYTES_MAX, required: false };

/// All of them, in the order they are copied.
pub const FILES: [SharedFile; 5] = [APP_COMPOSE, SYS_CONFIG, INSTANCE_INFO, ENCRYPTED_ENV, USER_CONFIG];

/// Why the host's files cannot be used.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostSharedError {
    /// A file is missing, a link, or too large. The host's fault.
    #[error("{0}")]
    File(#[from] FileError),
    /// The share cannot be mounted. The host's, or the kernel's.
    #[error("no host share: neither a disk labelled DSTACKSHR ({disk}) nor 9p `host-shared` ({p9}); or name a folder by --host-shared")]
    Mount {
        /// Why the disk was not.
        disk: String,
        /// Why 9p was not.
        p9: String,
    },
    /// `.sys-config.json` is not of the documented form. The host's fault.
    #[error(".sys-config.json: {reason}")]
    SysConfig {
        /// The parser's words.
        reason: String,
    },
    /// The share cannot be unmounted.
    #[error("{0}")]
    Program(#[from] ProgramError),
}

/// Copies the host's files below `work_dir`, files of mode 0600 in a folder of mode 0700. The folder.
///
/// # Errors
/// [`HostSharedError::File`].
pub fn copy(source: &Path, work_dir: &Path) -> Result<PathBuf, HostSharedError> {
    let folder = work_dir.join(FOLDER);
    DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(|error| FileError::system("make", &folder, &error))?;
    let is_in_place = fs::canonicalize(source).ok() == fs::canonicalize(&folder).ok();
    for file in FILES {
        let found = match (files::read_if_there(&source.join(file.name), file.limit_bytes)?, file.legacy) {
            (None, Some(legacy)) => files::read_if_there(&source.join(legacy), file.limit_bytes)?,
            (found, _) => found,
        };
        match found {
            Some(bytes) => files::write(&folder.join(file.name), &bytes, 0o600)?,
            None if file.required => return Err(FileError::Missing { path: source.join(file.name) }.into()),
            // what an earlier boot left is not the host's word; the instance's own notes stay
            None if !is_in_place && file != INSTANCE_INFO => match fs::remove_file(folder.join(file.name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(FileError::system("remove", &folder.join(file.name), &error).into());
                }
                _ => {}
            },
            None => {}
        }
    }
    Ok(folder)
}

/// Mounts the share read-only, without devices, programs or set-user-ID bits: the disk with the label, else 9p.
///
/// # Errors
/// [`HostSharedError::Mount`].
pub fn mount(mount_point: &Path) -> Result<(), HostSharedError> {
    fs::create_dir_all(mount_point).map_err(|error| FileError::system("make", mount_point, &error))?;
    let by_label = Path::new("/dev/disk/by-label").join(DISK_LABEL);
    let options = "ro,nosuid,nodev,noexec";
    let mount = || Program::new("mount", "package mount");
    let disk = match by_label.exists() {
        false => "there is none".to_owned(),
        true => match mount().with(["-o", options]).with([by_label.as_os_str(), mount_point.as_os_str()]).run() {
            Ok(_) => return Ok(()),
            Err(error) => error.to_string(),
        },
    };
    let p9_options = format!("trans=virtio,version=9p2000.L,{options}");
    let p9 = mount().with(["-t", "9p", "-o", &p9_options, "host-shared"]).with([mount_point]);
    p9.run().map(drop).map_err(|error| HostSharedError::Mount { disk, p9: error.to_string() })
}

/// Undoes [`mount`].
///
/// # Errors
/// [`HostSharedError::Program`].
pub fn unmount(mount_point: &Path) -> Result<(), HostSharedError> {
    Ok(Program::new("umount", "package mount").with([mount_point]).run().map(drop)?)
}

/// `.sys-config.json`: addresses and claims, all of them of the untrusted host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct SysConfig {
    /// KMS nodes.
    #[serde(default, deserialize_with = "or_empty")]
    pub kms_urls: Vec<String>,
    /// Gateways.
    #[serde(default, alias = "tproxy_urls", deserialize_with = "or_empty")]
    pub gateway_urls: Vec<String>,
    /// Intel's collateral.
    #[serde(default, deserialize_with = "or_empty")]
    pub pccs_url: String,
    /// Collateral, newer form.
    #[serde(default, deserialize_with = "or_empty")]
    pub collateral_urls: CollateralUrls,
    /// Mirror of images.
    #[serde(default, deserialize_with = "or_empty")]
    pub docker_registry: String,
    /// The host's API.
    #[serde(default, deserialize_with = "or_empty")]
    pub host_api_url: String,
    /// MrConfig document.
    #[serde(default, deserialize_with = "or_empty")]
    pub mr_config: String,
    /// VmConfig, JSON text.
    #[serde(default, deserialize_with = "or_empty")]
    pub vm_config: String,
}

/// Where collateral is fetched.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct CollateralUrls {
    /// Intel's.
    #[serde(default, deserialize_with = "or_empty")]
    pub pccs: String,
}

/// `null` is the default, too.
fn or_empty<'de, T: Deserialize<'de> + Default, D: serde::Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

impl SysConfig {
    /// Reads the file.
    ///
    /// # Errors
    /// [`HostSharedError::SysConfig`].
    pub fn parse(bytes: &[u8]) -> Result<Self, HostSharedError> {
        files::json_object(bytes).map_err(|error| HostSharedError::SysConfig { reason: error.to_string() })
    }

    /// Where Intel's collateral comes from, if the host says.
    #[must_use]
    pub fn pccs(&self) -> Option<&str> {
        [&self.collateral_urls.pccs, &self.pccs_url].into_iter().find(|url| !url.is_empty()).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_copied_under_their_new_names_and_old_ones_go() {
        let (source, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |name: &str, text: &str| fs::write(source.path().join(name), text).unwrap();
        write("app-compose.json", "{}");
        write("config.json", "{\"kms_urls\":null}");
        write(".encrypted-env", "env");
        let folder = copy(source.path(), work.path()).unwrap();
        assert_eq!(fs::read(folder.join(".sys-config.json")).unwrap(), b"{\"kms_urls\":null}");
        fs::write(folder.join(".instance_info"), "ours").unwrap();
        fs::remove_file(source.path().join(".encrypted-env")).unwrap();
        copy(source.path(), work.path()).unwrap();
        assert!(!folder.join(".encrypted-env").exists() && folder.join(".instance_info").exists());
        assert_eq!(copy(&folder, work.path()).unwrap(), folder, "in place as well");
    }

    #[test]
    fn a_hostile_share_is_refused_by_name() {
        let (source, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = |name: &str| source.path().join(name);
        let refused = || copy(source.path(), work.path()).unwrap_err();
        assert_eq!(refused(), FileError::Missing { path: path("app-compose.json") }.into());
        fs::write(path("app-compose.json"), "{}").unwrap();
        fs::write(path(".sys-config.json"), vec![b' '; (32 << 10) + 1]).unwrap();
        assert_eq!(refused(), FileError::TooLarge { path: path(".sys-config.json"), limit_bytes: 32 << 10 }.into());
        fs::remove_file(path(".sys-config.json")).unwrap();
        std::os::unix::fs::symlink("/etc/shadow", path(".sys-config.json")).unwrap();
        assert_eq!(refused(), FileError::NotAFile { path: path(".sys-config.json") }.into());
        fs::remove_file(path(".sys-config.json")).unwrap();
        fs::create_dir(path(".sys-config.json")).unwrap();
        assert_eq!(refused(), FileError::NotAFile { path: path(".sys-config.json") }.into());
    }

    #[test]
    fn the_hosts_config_is_read_tolerantly_and_bounded() {
        let text =
            br#"{"kms_urls":["https://a"],"tproxy_urls":["https://g"],"pccs_url":null,"collateral_urls":{"pccs":"https://p"},"x":1}"#;
        let config = SysConfig::parse(text).unwrap();
        assert_eq!((config.gateway_urls.as_slice(), config.pccs()), (&["https://g".to_owned()][..], Some("https://p")));
        assert!(matches!(SysConfig::parse(b"{"), Err(HostSharedError::SysConfig { .. })));
        let deep = format!("{{\"x\":{}", "[".repeat(30_000));
        assert!(matches!(SysConfig::parse(deep.as_bytes()), Err(HostSharedError::SysConfig { .. })));
        assert!(matches!(mount(Path::new("/nonexistent/x/\0")), Err(HostSharedError::File(_))));
    }
}
