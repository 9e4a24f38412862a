//! QEMU with its machine `nitro-enclave`, which no Debian package of it has, and an NSM that signs with a test's key. Owns: what it is
//! built from and how. Never: keeps QEMU's text in this repository; a script matches short anchors of it.
//! Source: Debian's source package; QEMU's documentation of the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

use super::apt::View;
use crate::cache::{Cache, key};
use crate::setup::Apt;
use crate::shell::Shell;
use crate::step::Step;

/// The program.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";
/// Folder of its firmware.
pub(super) const FIRMWARE: &str = "firmware";
/// Its Debian release: the first whose QEMU has the machine.
const SUITE: &str = "trixie";
const MACHINE: &str = "nitro-enclave";
const PATCH: &str = include_str!("assets/patch-nsm.py");
/// Boards to build, and a disk for the one without an NSM.
const BOARDS: &str = "CONFIG_MICROVM=y\nCONFIG_NITRO_ENCLAVE=y\nCONFIG_VIRTIO_BLK=y\n";
const CONFIGURE: &[&str] = &[
    "--python=/usr/bin/python3",
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--without-default-devices",
    "--with-devices-x86_64=nitro",
    "--enable-system",
    "--enable-tcg",
    "--enable-gnutls",
    "--enable-vhost-user",
    "--enable-vhost-kernel",
    "--enable-fdt=system",
    "--disable-tools",
    "--disable-docs",
    "--disable-guest-agent",
    "--disable-debug-info",
    "--disable-install-blobs",
    "-Dlibcbor=enabled",
];
/// Newer than Debian's, as QEMU's own build asks for; pip refuses another hash.
const WHEELS: &str = "\
meson==1.5.0 --hash=sha256:52b34f4903b882df52ad0d533146d4b992c018ea77399f825579737672ae7b20\n\
pycotap==1.3.1 --hash=sha256:1c3a25b3ff89e48f4e00f1f71dbbc1642b4f65c65d416524d07e73492fff25ea\n";
/// Libraries, tools and the firmware files.
const PACKAGES: &[&str] = &[
    "dpkg-dev",
    "build-essential",
    "ninja-build",
    "pkg-config",
    "python3-venv",
    "libglib2.0-dev",
    "libpixman-1-dev",
    "libfdt-dev",
    "libgnutls28-dev",
    "libcbor-dev",
    "flex",
    "bison",
    "xz-utils",
    "qemu-system-data",
];
const FIRMWARE_FILES: &[&str] = &["qboot.rom", "linuxboot_dma.bin", "pvh.bin", "kvmvapic.bin"];

/// The folder with program and firmware.
pub(super) fn have(shell: &Shell, cache: &Cache) -> anyhow::Result<PathBuf> {
    let key = key(&[PATCH, BOARDS, &CONFIGURE.join(" "), WHEELS, &FIRMWARE_FILES.join(" ")]);
    if let Some(there) = cache.find("qemu", &key) {
        if !runs(shell, &there) {
            // A cache from another machine: the libraries it wants are among these packages.
            eprintln!("tee: the kept qemu does not start; installing its libraries");
            Apt::at_hand(shell)?.install(shell, PACKAGES)?;
        }
        ensure!(runs(shell, &there), "{} does not start; remove it, and it is built anew", there.join(PROGRAM).display());
        return Ok(there);
    }
    let workshop = cache.workshop("qemu")?;
    let step = Step::begin("qemu", "about five minutes of processor time", workshop.join("log"));
    Apt::at_hand(shell)?.install(shell, PACKAGES)?;
    let source = source(&step, &workshop)?;
    let version = fs::read_to_string(source.join("VERSION")).context("qemu's source names no version")?.trim().to_owned();
    build(&step, &source)?;

    let product = workshop.join("product");
    fs::create_dir_all(product.join(FIRMWARE))?;
    fs::copy(source.join("build").join(PROGRAM), product.join(PROGRAM)).context("no program was built")?;
    for name in FIRMWARE_FILES {
        let from = Path::new("/usr/share/qemu").join(name);
        fs::copy(&from, product.join(FIRMWARE).join(name)).with_context(|| format!("no {}", from.display()))?;
    }
    ensure!(runs(shell, &product), "the built qemu has no machine {MACHINE}");
    step.end();
    cache.keep(&workshop, &product, "qemu", &version, &key)
}

fn runs(shell: &Shell, folder: &Path) -> bool {
    let machines = shell.read(shell.command(folder.join(PROGRAM), &["-M", "help"]));
    machines.is_ok_and(|text| text.lines().any(|line| line.starts_with(MACHINE)))
}

/// Debian's source, unpacked and changed.
fn source(step: &Step, workshop: &Path) -> anyhow::Result<PathBuf> {
    let view = View::of(step, workshop, "deb-src", SUITE)?;
    step.run(view.command("apt-get", &["--quiet", "source", "--download-only", "qemu"]).current_dir(workshop))?;
    let files = fs::read_dir(workshop)?.filter_map(Result::ok).map(|entry| entry.path());
    let is_original = |file: &PathBuf| file.to_string_lossy().ends_with(".orig.tar.xz");
    let archive = files.into_iter().find(is_original).context("the source package has no original archive")?;
    let source = workshop.join("source");
    fs::create_dir_all(&source)?;
    step.run(Command::new("tar").arg("-C").arg(&source).args(["--strip-components=1", "-xf"]).arg(&archive))?;

    let meson = source.join("meson.build");
    let text = fs::read_to_string(&meson).context("no meson.build")?;
    // Debian's archive carries no edk2 firmware to unpack.
    let (from, to) = ("unpack_edk2_blobs = bzip2.found()", "unpack_edk2_blobs = false");
    fs::write(&meson, text.replace(from, to))?;
    fs::write(source.join("configs/devices/x86_64-softmmu/nitro.mak"), BOARDS)?;
    let patch = workshop.join("patch-nsm.py");
    fs::write(&patch, PATCH)?;
    step.run(Command::new("python3").arg(&patch).arg(&source))?;

    let (venv, pins) = (workshop.join("venv"), workshop.join("wheels.txt"));
    fs::write(&pins, WHEELS)?;
    step.run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    let mut pip = Command::new(venv.join("bin/pip"));
    pip.args(["--quiet", "download", "--no-deps", "--only-binary=:all:", "--require-hashes", "-d"]);
    step.run(pip.arg(source.join("python/wheels")).arg("-r").arg(&pins))?;
    Ok(source)
}

fn build(step: &Step, source: &Path) -> anyhow::Result<()> {
    let build = source.join("build");
    fs::create_dir_all(&build)?;
    step.run(Command::new("../configure").args(CONFIGURE).current_dir(&build))?;
    step.run(Command::new("ninja").arg(PROGRAM).current_dir(&build))
}
