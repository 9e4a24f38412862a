//! dstack's published SDKs against an agent and three nodes: `conformance/`. Owns: fetching them by the versions written there, each from
//! its own registry, and calling them with the addresses of a cluster that the testkit starts. Never: changes a line of an SDK.
//!
//! The Rust SDK is a program of its own with a tree of some three hundred crates, so it is built once and kept in the cache folder by
//! the hash of its sources and lock file. The others are unpacked below the target directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::cache::{Cache, key};
use crate::demo::Binaries;
use crate::setup;
use crate::shell::{Shell, find_program, is_ci, seconds};
use crate::step::Step;

/// Where the checks lie.
const FOLDER: &str = "conformance";
/// Says by which version of its list a folder was filled.
const MARK: &str = ".filled-by";

/// Sets up, builds the programs, runs.
pub(crate) fn alone(shell: &Shell) -> anyhow::Result<Duration> {
    setup::for_tests(shell)?;
    Binaries::build(shell)?;
    run(shell)
}

/// As part of all tests, whose programs are built. Where an SDK cannot be had it is skipped aloud, which CI does not accept.
pub(crate) fn within_tests(shell: &Shell) -> anyhow::Result<String> {
    match run(shell) {
        Ok(elapsed) => Ok(format!("conformance of the published SDKs: passed, {}", seconds(elapsed))),
        Err(cause) if !is_ci() && cause.is::<Unavailable>() => {
            eprintln!("conformance: {cause:#}");
            Ok(format!("conformance of the published SDKs: SKIPPED ({cause})"))
        }
        Err(cause) => Err(cause),
    }
}

/// An SDK cannot be fetched here.
#[derive(Debug)]
struct Unavailable(&'static str);

impl std::fmt::Display for Unavailable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the {} SDK could not be fetched", self.0)
    }
}

fn run(shell: &Shell) -> anyhow::Result<Duration> {
    let python = python(shell).context(Unavailable("Python"))?;
    let js = js(shell).context(Unavailable("JavaScript"))?;
    let rust = rust(shell).context(Unavailable("Rust"))?;
    let mut guest = shell.command(shell.target().join("debug/dstack-testkit"), &["guest", "--examples"]);
    guest.arg(shell.root().join("examples")).arg("--");
    let by_hand = by_hand(shell)?;
    guest.args(["sh", "-ec", CHECKS, "conformance"]);
    guest.arg(python).arg(shell.root().join(FOLDER).join("python/check.py")).arg(js).arg(rust).args(by_hand);
    shell.run(guest)
}

/// Each SDK's check, then the README's lines: both print the same app and key.
const CHECKS: &str = r#""$1" "$2"; node "$3"; "$4"
python=$("$1" "$5"); js=$(node "$6"); echo "by hand $python"; test -n "$python"; test "$python" = "$js""#;

/// The README's lines for Python and JavaScript as files; its lines for Rust have to stand in the check, which is built.
fn by_hand(shell: &Shell) -> anyhow::Result<[PathBuf; 2]> {
    let read = |name: &str| fs::read_to_string(shell.root().join(name)).with_context(|| format!("cannot read {name}"));
    let (page, check) = (read("README.md")?, read("conformance/rust/src/main.rs")?);
    let missing: Vec<&str> = block(&page, "rust")?.lines().filter(|line| !line.starts_with("//") && !check.contains(line)).collect();
    if !missing.is_empty() {
        bail!("README shows lines of Rust that conformance/rust/src/main.rs does not run: {}", missing.join("; "));
    }
    let folder = shell.target().join("conformance");
    let files = [("python", folder.join("by_hand.py")), ("js", folder.join("js/by_hand.mjs"))];
    for (kind, path) in &files {
        fs::write(path, block(&page, kind)?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(files.map(|(_, path)| path))
}

/// The only block of a kind.
fn block<'a>(page: &'a str, kind: &str) -> anyhow::Result<&'a str> {
    let begin = format!("\n```{kind}\n");
    let mut found = page.split(&begin).skip(1).filter_map(|rest| rest.split_once("```")).map(|(block, _)| block);
    match (found.next(), found.next()) {
        (Some(block), None) => Ok(block),
        (None, _) => bail!("README has no block `{kind}`"),
        _ => bail!("README has more than one block `{kind}`"),
    }
}

/// The interpreter of an environment that has the SDK.
fn python(shell: &Shell) -> anyhow::Result<PathBuf> {
    let list = shell.root().join(FOLDER).join("python/requirements.txt");
    let folder = shell.target().join("conformance/python");
    let interpreter = folder.join("bin/python");
    filled(&folder, &[&list], || {
        let python = find_program("python3").context("no python3")?;
        if !shell.works(shell.command(&python, &["-c", "import ensurepip"])) {
            // Debian keeps what an environment needs in a package of its own.
            setup::Apt::at_hand(shell)?.install(shell, &["python3-venv"])?;
        }
        let mut make = shell.command(python, &["-m", "venv"]);
        make.arg(&folder);
        shell.run(make)?;
        let mut install =
            shell.command(&interpreter, &["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "-r"]);
        install.arg(&list);
        shell.run(install).map(drop)
    })?;
    Ok(interpreter)
}

/// The check, beside the modules that it imports.
fn js(shell: &Shell) -> anyhow::Result<PathBuf> {
    let from = shell.root().join(FOLDER).join("js");
    let folder = shell.target().join("conformance/js");
    let lists = ["package.json", "package-lock.json"].map(|name| from.join(name));
    filled(&folder, &[&lists[0], &lists[1]], || {
        for list in &lists {
            fs::copy(list, folder.join(list.file_name().context("a list has a name")?))?;
        }
        let npm = find_program("npm").context("no npm")?;
        // No script of a package runs.
        let mut install = shell.command(npm, &["ci", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]);
        install.current_dir(&folder);
        shell.run(install).map(drop)
    })?;
    let check = folder.join("check.mjs");
    fs::copy(from.join("check.mjs"), &check).context("cannot copy check.mjs")?;
    Ok(check)
}

/// The built check.
fn rust(shell: &Shell) -> anyhow::Result<PathBuf> {
    const NAME: &str = "conformance-rust";
    const PROGRAM: &str = "dstack-conformance";
    let from = shell.root().join(FOLDER).join("rust");
    let read = |name: &str| fs::read_to_string(from.join(name)).with_context(|| format!("cannot read {name} of the Rust check"));
    let key = key(&[&read("Cargo.toml")?, &read("Cargo.lock")?, &read("src/main.rs")?]);
    let cache = Cache::open()?;
    if let Some(entry) = cache.find(NAME, &key) {
        return Ok(entry.join(PROGRAM));
    }
    let workshop = cache.workshop(NAME)?;
    let step = Step::begin("the Rust SDK's check", "about four minutes of processor time", workshop.join("log"));
    let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build.args(["build", "--locked", "--manifest-path"]).arg(from.join("Cargo.toml")).arg("--target-dir").arg(workshop.join("target"));
    build.current_dir(&workshop).env_remove("CARGO_TARGET_DIR");
    step.run(&mut build)?;
    step.end();
    let product = workshop.join("product");
    fs::create_dir_all(&product)?;
    fs::copy(workshop.join("target/debug").join(PROGRAM), product.join(PROGRAM)).context("cargo built no check")?;
    Ok(cache.keep(&workshop, &product, NAME, "1", &key)?.join(PROGRAM))
}

/// Fills `folder` anew unless it was filled by these very lists.
fn filled(folder: &Path, lists: &[&PathBuf], fill: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let texts: Vec<String> =
        lists.iter().map(|list| fs::read_to_string(list).with_context(|| list.display().to_string())).collect::<Result<_, _>>()?;
    let key = key(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    let mark = folder.join(MARK);
    if fs::read_to_string(&mark).is_ok_and(|text| text == key) {
        return Ok(());
    }
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    fs::create_dir_all(folder)?;
    fill()?;
    if !folder.is_dir() {
        bail!("{} is gone", folder.display());
    }
    fs::write(mark, key).context("cannot mark the folder as filled")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_found_by_its_kind() {
        let page = "x\n```sh\nno\n```\n```js\nyes\n```\n";
        assert_eq!(block(page, "js").unwrap(), "yes\n");
        assert!(block(page, "rust").is_err() && block(&page.repeat(2), "js").is_err());
    }
}
