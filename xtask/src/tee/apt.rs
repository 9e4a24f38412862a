//! A private view of Debian's archive: another suite, or source packages, beside what this machine uses. Owns: its lists, in a folder of
//! ours. Never: changes the machine's sources; installs from another suite.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use crate::shell::Shell;
use crate::step::Step;

/// The machine's own description of the archive, as images and installers of Debian 12 and later write it.
const SOURCES: &str = "/etc/apt/sources.list.d/debian.sources";
/// The older form, one line an archive: what debootstrap and machines upgraded from before have.
const SOURCES_LIST: &str = "/etc/apt/sources.list";

/// See the module text.
pub(super) struct View {
    folder: PathBuf,
}

impl View {
    /// Reads the lists of `suite`; `kind` is `deb` or `deb-src`.
    pub(super) fn of(step: &Step, folder: &Path, kind: &str, suite: &str) -> anyhow::Result<Self> {
        let list = || fs::read_to_string(SOURCES_LIST).ok().as_deref().and_then(entry_of_list);
        let own = fs::read_to_string(SOURCES).ok().or_else(list);
        let own = own.with_context(|| format!("this needs Debian with {SOURCES} or a `deb` line in {SOURCES_LIST}"))?;
        let view = Self { folder: folder.join("apt") };
        for below in ["parts", "state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(view.folder.join(below))?;
        }
        fs::write(view.folder.join("parts/view.sources"), entry(&own, kind, suite)?)?;
        step.run(&mut view.command("apt-get", &["--quiet", "update"]))?;
        Ok(view)
    }

    /// An apt program that sees this view alone, and the machine's installed packages.
    pub(super) fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        let at = |below: &str| self.folder.join(below).display().to_string();
        for option in [
            "Dir::Etc::sourcelist=/dev/null".to_owned(),
            format!("Dir::Etc::sourceparts={}", at("parts")),
            format!("Dir::State={}", at("state")),
            "Dir::State::status=/var/lib/dpkg/status".to_owned(),
            format!("Dir::Cache={}", at("cache")),
            // The folder is the user's; apt's own user may not enter it.
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command.args(arguments);
        command
    }
}

/// This machine's release.
pub(super) fn codename(shell: &Shell) -> anyhow::Result<String> {
    let release = shell.read(shell.command("sh", &["-c", ". /etc/os-release && echo \"$ID $VERSION_CODENAME\""]))?;
    match release.trim().split_once(' ') {
        Some(("debian", codename)) if !codename.is_empty() => Ok(codename.to_owned()),
        _ => bail!("this needs Debian, not {:?}", release.trim()),
    }
}

/// The first archive of the one-line form, written as an entry; its key, where it names one.
fn entry_of_list(list: &str) -> Option<String> {
    let line = list.lines().find_map(|line| line.trim().strip_prefix("deb ").or_else(|| line.trim().strip_prefix("deb\t")))?.trim();
    let (options, rest) = match line.strip_prefix('[') {
        Some(line) => line.split_once(']')?,
        None => ("", line),
    };
    let uri = rest.split_whitespace().next()?;
    let key = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    let key = key.map(|key| format!("Signed-By: {key}\n")).unwrap_or_default();
    Some(format!("Types: deb\nURIs: {uri}\nSuites: any\nComponents: main\n{key}"))
}

/// The first entry of the machine's sources (archive and key), for another kind and suite.
fn entry(own: &str, kind: &str, suite: &str) -> anyhow::Result<String> {
    let first = own.split("\n\n").find(|entry| entry.lines().any(|line| line.starts_with("URIs:"))).context("no archive in it")?;
    let lines = first.lines().filter(|line| !line.starts_with('#')).map(|line| match line.split_once(':') {
        Some(("Types", _)) => format!("Types: {kind}"),
        Some(("Suites", _)) => format!("Suites: {suite}"),
        Some(("Components", _)) => "Components: main".to_owned(),
        _ => line.to_owned(),
    });
    Ok(lines.map(|line| line + "\n").collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_keeps_archive_and_key() {
        let own = "Types: deb\n# old\nURIs: http://archive/debian\nSuites: a a-updates\nComponents: main contrib\nSigned-By: /k.gpg\n\n\
                   Types: deb\nURIs: http://archive/security\nSuites: a-security\n";
        let expected = "Types: deb-src\nURIs: http://archive/debian\nSuites: b\nComponents: main\nSigned-By: /k.gpg\n";
        assert_eq!(entry(own, "deb-src", "b").unwrap(), expected);
        assert!(entry("", "deb", "b").is_err());
    }

    #[test]
    fn the_one_line_form_is_read_as_well() {
        let list = "# deb http://old/debian a main\ndeb-src http://archive/debian a main\ndeb [arch=amd64 signed-by=/k.gpg] http://archive/debian a main\n";
        let expected = "Types: deb-src\nURIs: http://archive/debian\nSuites: b\nComponents: main\nSigned-By: /k.gpg\n";
        assert_eq!(entry(&entry_of_list(list).unwrap(), "deb-src", "b").unwrap(), expected);
        let plain = entry(&entry_of_list("deb http://archive/debian a main").unwrap(), "deb", "b").unwrap();
        assert_eq!(plain, "Types: deb\nURIs: http://archive/debian\nSuites: b\nComponents: main\n");
        assert_eq!((entry_of_list(""), entry_of_list("deb "), entry_of_list("deb [x")), (None, None, None));
    }
}
