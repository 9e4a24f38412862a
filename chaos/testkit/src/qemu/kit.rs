//! The folder with everything that an enclave is made of. Owns: names in it. Never: builds one of them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::cluster::ClusterError;
use crate::eif::{Image, Ramdisk};

/// Names the folder.
const KIT: &str = "DSTACK_ENCLAVE_KIT";
/// Boots without further questions; a panic is the end.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=1 reboot=t random.trust_cpu=on";

/// See the module text.
#[derive(Debug, Clone)]
pub struct Kit {
    folder: PathBuf,
}

impl Kit {
    /// The folder that `DSTACK_ENCLAVE_KIT` names. `None`: it names none, and nothing can be run.
    ///
    /// # Errors
    /// [`ClusterError::NotBuilt`] when it is not complete.
    pub fn find() -> Result<Option<Self>, ClusterError> {
        let Some(folder) = env::var_os(KIT) else { return Ok(None) };
        let kit = Self { folder: folder.into() };
        for name in ["qemu-system-x86_64", "vhost-device-vsock", "vmlinuz", "dstack-enclave-init", "dstack-util"] {
            kit.path(name)?;
        }
        Ok(Some(kit))
    }

    /// A file of the kit.
    ///
    /// # Errors
    /// [`ClusterError::NotBuilt`].
    pub fn path(&self, name: &str) -> Result<PathBuf, ClusterError> {
        let path = self.folder.join(name);
        if path.is_file() { Ok(path) } else { Err(ClusterError::NotBuilt { name: name.to_owned(), folder: self.folder.clone() }) }
    }

    /// QEMU's firmware.
    #[must_use]
    pub fn firmware(&self) -> PathBuf {
        self.folder.join("firmware")
    }

    /// An image that runs `words` (the program first, which is `/app/dstack-util`) with `files` below `/app`.
    ///
    /// # Errors
    /// [`ClusterError::File`].
    pub fn image(&self, words: &[&str], files: &[(&str, &[u8])]) -> Result<Image, ClusterError> {
        let mut boot = Ramdisk::new().folder("modules").file("init", 0o755, &read(&self.path("dstack-enclave-init")?)?);
        for module in self.modules()? {
            let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
            boot = boot.file(&format!("modules/{name}"), 0o644, &read(&module)?);
        }
        let mut app = Ramdisk::new().folder("app").file("app/dstack-util", 0o755, &read(&self.path("dstack-util")?)?);
        app = app.file("app/run", 0o644, format!("{}\n", words.join("\n")).as_bytes());
        for (name, content) in files {
            app = app.file(&format!("app/{name}"), 0o644, content);
        }
        Ok(Image {
            kernel: read(&self.path("vmlinuz")?)?,
            command_line: COMMAND_LINE.to_owned(),
            metadata: "{\"ImageName\":\"dstack-test\",\"ImageVersion\":\"0\",\"BuildMetadata\":{},\"DockerInfo\":{},\"CustomMetadata\":{}}"
                .to_owned(),
            ramdisks: vec![boot.finish(), app.finish()],
        })
    }

    /// In the order of loading, which is that of their names.
    fn modules(&self) -> Result<Vec<PathBuf>, ClusterError> {
        let folder = self.folder.join("modules");
        let entries = fs::read_dir(&folder).map_err(|error| ClusterError::file(&folder, error))?;
        let mut files: Vec<PathBuf> = entries.filter_map(Result::ok).map(|entry| entry.path()).collect();
        files.sort();
        Ok(files)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ClusterError> {
    fs::read(path).map_err(|error| ClusterError::file(path, error))
}
