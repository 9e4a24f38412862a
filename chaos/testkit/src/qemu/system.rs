//! Programs of this machine's system, for a machine in QEMU. Owns: finding them with the libraries that they are linked to.
//! Never: installs one.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::kit::read;
use super::tree::Tree;
use crate::cluster::{ClusterError, process};

/// Where programs are, in the order of looking.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Adds programs and their libraries at the paths that they have here.
///
/// # Errors
/// [`ClusterError::NotBuilt`] of one that is not installed, [`ClusterError::Command`] of `ldd`.
pub(super) fn add(tree: &mut Tree, programs: &[&str]) -> Result<(), ClusterError> {
    for name in programs {
        let candidates = FOLDERS.iter().map(|folder| Path::new(folder).join(name));
        let missing = || ClusterError::NotBuilt { name: (*name).to_owned(), folder: FOLDERS.join(", ").into() };
        let file = candidates.into_iter().find(|file| file.is_file()).ok_or_else(missing)?;
        tree.add(&format!("usr/bin/{name}"), 0o755, read(&file)?);
        for library in libraries(&process::run(Command::new("ldd").arg(&file))?) {
            tree.add(&library.to_string_lossy(), 0o755, read(&library)?);
        }
    }
    Ok(())
}

/// Paths that `ldd` names: `NAME => PATH (ADDRESS)`, and the loader's `PATH (ADDRESS)`.
fn libraries(text: &str) -> Vec<PathBuf> {
    let paths = text.lines().filter_map(|line| line.split_once(" => ").map_or(line, |(_, path)| path).split_whitespace().next());
    paths.filter(|path| path.starts_with('/')).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_loader_are_found() {
        let text = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x2)\n\t/lib64/ld.so (0x3)\n";
        assert_eq!(libraries(text), [PathBuf::from("/lib/x/libc.so.6"), PathBuf::from("/lib64/ld.so")]);
    }
}
