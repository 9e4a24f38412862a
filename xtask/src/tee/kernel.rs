//! Debian's cloud kernel, its drivers of NSM and vsock or of disks, and a module of ours that makes devices of the command line. Owns:
//! which, and the order of loading. Never: installs a kernel; packages are unpacked in a folder of ours.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use super::apt::{View, codename};
use crate::cache::{Cache, key};
use crate::setup::Apt;
use crate::shell::Shell;
use crate::step::Step;

/// The kernel's file.
pub(super) const KERNEL: &str = "vmlinuz";
/// Folder of an enclave's modules, in the order of their names.
pub(super) const MODULES: &str = "modules";
/// Folder of those of a machine with a disk, likewise.
pub(super) const DISK_MODULES: &str = "modules-disk";
/// The newest kernel of the flavour, by dependency: old versions leave the archive.
const META: &str = "linux-image-cloud-amd64";
const DRIVERS: &[&str] = &["virtio_mmio", "vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport", "nsm"];
/// A virtio disk, LUKS2 (device-mapper's, and what `cryptsetup` asks the kernel for), ext4 and its checksum; vsock to the host.
const DISK_DRIVERS: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "vmw_vsock_virtio_transport",
    "aes_generic",
    "ecb",
    "xts",
    "sha256_generic",
    "algif_skcipher",
    "dm_crypt",
    "crc32c_generic",
    "ext4",
];
/// Debian's kernel does not read virtio-mmio devices from its command line, the only place where QEMU names them.
const OWN: &str = "vmmio_cmdline";
const OWN_SOURCE: &str = include_str!("assets/vmmio_cmdline.c");
const OWN_MAKEFILE: &str = "obj-m := vmmio_cmdline.o\n";
/// The compiler, and a library of the kernel's build tools.
const PACKAGES: &[&str] = &["build-essential", "dpkg-dev", "xz-utils", "libelf1"];

/// The folder with kernel and modules.
pub(super) fn have(shell: &Shell, cache: &Cache) -> anyhow::Result<PathBuf> {
    let key = key(&[META, &DRIVERS.join(" "), &DISK_DRIVERS.join(" "), OWN_SOURCE, OWN_MAKEFILE]);
    if let Some(there) = cache.find("linux", &key) {
        return Ok(there);
    }
    let codename = codename(shell)?;
    // Bookworm's own kernel has no driver of the NSM; the compiler must be that of the release.
    let suite = if codename == "bookworm" { "bookworm-backports".to_owned() } else { codename };
    let workshop = cache.workshop("linux")?;
    let step = Step::begin("enclave kernel", "50 MB from Debian and some seconds", workshop.join("log"));
    Apt::at_hand(shell)?.install(shell, PACKAGES)?;
    let view = View::of(&step, &workshop, "deb", &suite)?;
    let version = version(shell, &view)?;
    let names = ["image-V-cloud-amd64", "headers-V-cloud-amd64", "headers-V-common", "kbuild-V"];
    let names: Vec<String> = names.iter().map(|name| format!("linux-{}", name.replace('V', &version))).collect();
    let mut words = vec!["--quiet", "download"];
    words.extend(names.iter().map(String::as_str));
    step.run(view.command("apt-get", &words).current_dir(&workshop))?;
    let root = workshop.join("root");
    for file in files_of(&workshop, ".deb")? {
        step.run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&root))?;
    }

    let product = workshop.join("product");
    fs::create_dir_all(&product)?;
    let kernels = files_of(&root.join("boot"), "-cloud-amd64")?;
    let kernel = kernels.iter().find(|file| file.to_string_lossy().contains("vmlinuz")).context("the package has no kernel")?;
    fs::copy(kernel, product.join(KERNEL))?;
    let own = own_module(&step, &workshop, &root, &version)?;
    let tree = Tree::of(&root.join("lib/modules").join(format!("{version}-cloud-amd64")))?;
    for (folder, drivers) in [(MODULES, DRIVERS), (DISK_MODULES, DISK_DRIVERS)] {
        let folder = product.join(folder);
        fs::create_dir_all(&folder)?;
        let mut loaded = Vec::new();
        drivers.iter().try_for_each(|name| tree.load(name, &mut loaded))?;
        for (place, (name, module)) in loaded.iter().enumerate() {
            fs::write(folder.join(format!("{place:02}-{name}.ko")), module)?;
        }
        let target = folder.join(format!("{:02}-{OWN}.ko", loaded.len()));
        step.run(Command::new("strip").args(["-g", "-o"]).arg(&target).arg(&own))?;
    }
    step.end();
    cache.keep(&workshop, &product, "linux", &version, &key)
}

/// `6.12.95+deb12`, of what the meta package depends on.
fn version(shell: &Shell, view: &View) -> anyhow::Result<String> {
    let text = shell.read(view.command("apt-cache", &["depends", META]))?;
    let name = text.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-")?.strip_suffix("-cloud-amd64"));
    match name {
        Some(version) => Ok(version.to_owned()),
        None => bail!("{META} names no kernel: {text:?}"),
    }
}

/// Compiles our module against the unpacked headers.
fn own_module(step: &Step, workshop: &Path, root: &Path, version: &str) -> anyhow::Result<PathBuf> {
    let headers = root.join("usr/src").join(format!("linux-headers-{version}-cloud-amd64"));
    let makefile = headers.join("Makefile");
    let text = fs::read_to_string(&makefile).context("the headers have no Makefile")?;
    fs::write(&makefile, text.replace("/usr/src/", &format!("{}/usr/src/", root.display())))?;
    // With it the build would ask for a tool that describes types, which a loaded module does not need.
    let image = headers.join("vmlinux");
    if image.exists() {
        fs::remove_file(&image)?;
    }
    let folder = workshop.join("module");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join(format!("{OWN}.c")), OWN_SOURCE)?;
    fs::write(folder.join("Makefile"), OWN_MAKEFILE)?;
    step.run(Command::new("make").arg("-C").arg(&headers).arg(format!("M={}", folder.display())).arg("modules"))?;
    Ok(folder.join(format!("{OWN}.ko")))
}

fn files_of(folder: &Path, end: &str) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    Ok(entries.filter_map(Result::ok).map(|entry| entry.path()).filter(|file| file.to_string_lossy().ends_with(end)).collect())
}

/// The modules of a kernel, by name.
struct Tree {
    modules: BTreeMap<String, PathBuf>,
    /// `modules.builtin`: what is in the kernel itself.
    within: String,
}

impl Tree {
    fn of(folder: &Path) -> anyhow::Result<Self> {
        let mut modules = BTreeMap::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else if let Some(name) = name.strip_suffix(".ko.xz") {
                    modules.insert(name.replace('-', "_"), entry.path());
                }
            }
        }
        let within = fs::read_to_string(folder.join("modules.builtin")).context("the kernel does not say what it has built in")?;
        Ok(Self { modules, within: within.replace('-', "_") })
    }

    /// Appends a module to `loaded`, what it needs before it; nothing where it is there or in the kernel itself.
    fn load(&self, name: &str, loaded: &mut Vec<(String, Vec<u8>)>) -> anyhow::Result<()> {
        if loaded.iter().any(|(there, _)| there == name) || self.within.lines().any(|line| line.ends_with(&format!("/{name}.ko"))) {
            return Ok(());
        }
        let packed = self.modules.get(name).with_context(|| format!("the kernel has no module {name}"))?;
        let unpacked = Command::new("xz").arg("-dc").arg(packed).output().context("cannot start xz")?;
        anyhow::ensure!(unpacked.status.success(), "{} does not unpack", packed.display());
        for needed in needs(&unpacked.stdout) {
            self.load(&needed, loaded)?;
        }
        loaded.push((name.to_owned(), unpacked.stdout));
        Ok(())
    }
}

/// What a module says it depends on: `depends=a,b` in its information section, between zero bytes.
fn needs(module: &[u8]) -> Vec<String> {
    let said = module.split(|byte| *byte == 0).find_map(|text| text.strip_prefix(b"depends="));
    let names = String::from_utf8_lossy(said.unwrap_or_default()).into_owned();
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_needs() {
        assert_eq!(needs(b"\0license=GPL\0depends=mbcache,jbd2\0name=ext4\0"), ["mbcache", "jbd2"]);
        assert!(needs(b"\0depends=\0").is_empty() && needs(b"").is_empty());
    }
}
