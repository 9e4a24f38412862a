//! Where the programs are. Owns: finding them beside whoever runs. Never: builds one.

use std::env;
use std::path::{Path, PathBuf};

use super::error::ClusterError;

/// Folder with the programs of this workspace.
#[derive(Debug, Clone)]
pub struct Binaries {
    folder: PathBuf,
}

impl Binaries {
    /// The folder named by `DSTACK_BIN_DIR`, else the one that cargo built the running program into: a test lies in its `deps`.
    ///
    /// # Errors
    /// [`ClusterError::NotBuilt`] when a program of the cluster is not there.
    pub fn find() -> Result<Self, ClusterError> {
        let folder = match env::var_os("DSTACK_BIN_DIR") {
            Some(folder) => PathBuf::from(folder),
            None => beside_us()?,
        };
        let found = Self { folder };
        for name in ["dstack-kms", "dstack", "dstack-testkit"] {
            found.path(name)?;
        }
        Ok(found)
    }

    /// Path of a program.
    ///
    /// # Errors
    /// [`ClusterError::NotBuilt`].
    pub fn path(&self, name: &str) -> Result<PathBuf, ClusterError> {
        let path = self.folder.join(name);
        if path.is_file() { Ok(path) } else { Err(ClusterError::NotBuilt { name: name.to_owned(), folder: self.folder.clone() }) }
    }

    /// The folder itself.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

fn beside_us() -> Result<PathBuf, ClusterError> {
    let exe = env::current_exe().map_err(|error| ClusterError::file("/proc/self/exe", error))?;
    let folder = exe.parent().unwrap_or_else(|| Path::new("/"));
    let up = if folder.file_name().is_some_and(|name| name == "deps") { folder.parent() } else { None };
    Ok(up.unwrap_or(folder).to_owned())
}
