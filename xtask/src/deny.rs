//! Rules of foreign crates (deny.toml): fences, licences, sources; advisories where a database is at hand.
//! Owns: how cargo-deny is called offline. Never: says "checked" of what was not.

use std::env;
use std::path::PathBuf;

use crate::shell::{Shell, is_ci};
use crate::tools;

/// Folder name that cargo-deny gives a clone of the default database.
const ADVISORY_FOLDER: &str = "advisory-db-3157b0e258782691";

/// Runs what can be run; the answer says what was left out.
pub(crate) fn run(shell: &Shell) -> anyhow::Result<String> {
    let Some(tool) = tools::deny(shell)? else {
        return Ok("SKIPPED: cargo-deny is not here".to_owned());
    };
    shell.run(shell.cargo(&["fetch", "--locked"]))?;
    shell.run(shell.command(&tool, &["--locked", "--offline", "check", "bans", "licenses", "sources"]))?;
    let Some(database) = advisory_database() else {
        return Ok("advisories not checked: no local database".to_owned());
    };
    eprintln!("advisories: local database {}", database.display());
    match shell.run(shell.command(&tool, &["--locked", "--offline", "check", "advisories"])) {
        Ok(_) => Ok("advisories from a local database".to_owned()),
        Err(cause) if is_ci() => Err(cause),
        Err(cause) => Err(cause.context("an old database is an error too: update the clone")),
    }
}

fn advisory_database() -> Option<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::home_dir().map(|home| home.join(".cargo")))?;
    let folder = home.join("advisory-dbs").join(ADVISORY_FOLDER);
    folder.is_dir().then_some(folder)
}
