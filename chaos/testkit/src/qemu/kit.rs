//! The folder with everything that an enclave is made of. Owns: names in it. Never: builds one of them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use super::tree::Tree;
use crate::cluster::ClusterError;
use crate::eif::Image;

/// Names the folder.
const KIT: &str = "DSTACK_ENCLAVE_KIT";
/// Boots without further questions; a panic is the end.
pub(super) const COMMAND_LINE: &str = "console=ttyS0 quiet panic=1 reboot=t random.trust_cpu=on";

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
        for name in ["qemu-system-x86_64", "vhost-device-vsock", "vmlinuz", "dstack-enclave-init", "dstack-util", "dstack-agent"] {
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

    /// An enclave's image that runs `programs` one after the other (words each, the program first; `start` and `ask` are the first process's
    /// own) with `files` below `/app`, where `dstack-util` is.
    ///
    /// # Errors
    /// [`ClusterError::File`].
    pub fn image(&self, programs: &[&[&str]], files: &[(&str, &[u8])]) -> Result<Image, ClusterError> {
        let mut app = Tree::new();
        app.add("app/devices", 0o644, b"/dev/nsm\n".to_vec());
        self.add_programs(&mut app, programs, files)?;
        Ok(Image {
            kernel: read(&self.path("vmlinuz")?)?,
            command_line: COMMAND_LINE.to_owned(),
            metadata: "{\"ImageName\":\"dstack-test\",\"ImageVersion\":\"0\",\"BuildMetadata\":{},\"DockerInfo\":{},\"CustomMetadata\":{}}"
                .to_owned(),
            ramdisks: vec![self.boot("modules")?.ramdisk(), app.ramdisk()],
        })
    }

    /// What is run, with the program it is mostly about.
    pub(super) fn add_programs(&self, tree: &mut Tree, programs: &[&[&str]], files: &[(&str, &[u8])]) -> Result<(), ClusterError> {
        tree.add("app/dstack-util", 0o755, read(&self.path("dstack-util")?)?);
        let blocks: Vec<String> = programs.iter().map(|words| words.join("\n")).collect();
        tree.add("app/run", 0o644, format!("{}\n", blocks.join("\n\n")).into_bytes());
        for (name, content) in files {
            tree.add(&format!("app/{name}"), 0o755, content.to_vec());
        }
        Ok(())
    }

    /// The first process and the modules it loads, in the order of their names.
    pub(super) fn boot(&self, modules: &str) -> Result<Tree, ClusterError> {
        let mut boot = Tree::new();
        boot.add("init", 0o755, read(&self.path("dstack-enclave-init")?)?);
        for module in self.modules(modules)? {
            let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
            boot.add(&format!("modules/{name}"), 0o644, read(&module)?);
        }
        Ok(boot)
    }

    /// In the order of loading, which is that of their names.
    fn modules(&self, folder: &str) -> Result<Vec<PathBuf>, ClusterError> {
        let folder = self.folder.join(folder);
        let entries = fs::read_dir(&folder).map_err(|error| ClusterError::file(&folder, error))?;
        let mut files: Vec<PathBuf> = entries.filter_map(Result::ok).map(|entry| entry.path()).collect();
        files.sort();
        Ok(files)
    }
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, ClusterError> {
    fs::read(path).map_err(|error| ClusterError::file(path, error))
}
