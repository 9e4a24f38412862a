//! `remove-orphans`: containers of a compose project whose service is no longer in its file. Owns: finding them by the engine's labels.
//! Never: touches a container of another project, or one without labels.
//! Source: util and deploy reference §1.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Context as _;
use serde::Deserialize;

use crate::files;
use crate::program::Program;

/// Largest compose file.
const COMPOSE_BYTES_MAX: u64 = 50 << 20;
const PACKAGE: &str = "a container engine with the docker command line";

#[derive(Deserialize)]
struct Container {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Labels")]
    labels: String,
}

/// A container that nothing wants any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    /// The engine's id.
    pub id: String,
    /// The service it was of.
    pub service: String,
}

/// Removes them, or says which it would.
///
/// # Errors
/// The file's, the engine's.
pub fn remove(compose: &Path, dry_run: bool) -> anyhow::Result<()> {
    let services = services_of(compose)?;
    let folder = std::fs::canonicalize(compose).with_context(|| format!("cannot find {}", compose.display()))?;
    let list = Program::new("docker", PACKAGE)
        .with(["ps", "--all", "--no-trunc", "--format", "{{json .}}"])
        .with(["--filter", &format!("label=com.docker.compose.project.config_files={}", folder.display())])
        .run()?;
    for orphan in orphans(&list, &services)? {
        let verb = if dry_run { "would remove" } else { "removing" };
        println!("{verb} {} (service {})", orphan.id, orphan.service);
        if !dry_run {
            Program::new("docker", PACKAGE).with(["rm", "--force", "--volumes", &orphan.id]).run()?;
        }
    }
    Ok(())
}

/// Names below `services:` by the engine's own reader, so that includes and profiles count as it counts them.
fn services_of(compose: &Path) -> anyhow::Result<BTreeSet<String>> {
    files::read(compose, COMPOSE_BYTES_MAX)?;
    let out = Program::new("docker", PACKAGE).with(["compose", "--file"]).with([compose]).with(["config", "--services"]).run()?;
    Ok(String::from_utf8_lossy(&out).lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect())
}

fn orphans(list: &[u8], services: &BTreeSet<String>) -> anyhow::Result<Vec<Orphan>> {
    let mut found = Vec::new();
    for line in String::from_utf8_lossy(list).lines().filter(|line| !line.trim().is_empty()) {
        let container: Container = serde_json::from_str(line).context("the engine's list is not of the known form")?;
        let label = container.labels.split(',').find_map(|label| label.strip_prefix("com.docker.compose.service="));
        if let Some(service) = label.filter(|service| !services.contains(*service)) {
            found.push(Orphan { id: container.id.clone(), service: service.to_owned() });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_labelled_containers_of_gone_services_are_orphans() {
        let list = concat!(
            r#"{"ID":"a","Labels":"com.docker.compose.project=p,com.docker.compose.service=web"}"#,
            "\n",
            r#"{"ID":"b","Labels":"com.docker.compose.service=gone,x=y"}"#,
            "\n",
            r#"{"ID":"c","Labels":""}"#,
            "\n"
        );
        let services = BTreeSet::from(["web".to_owned()]);
        assert_eq!(orphans(list.as_bytes(), &services).unwrap(), [Orphan { id: "b".into(), service: "gone".into() }]);
        assert!(orphans(b"no json\n", &services).is_err());
    }

    #[test]
    fn a_machine_without_an_engine_is_told_so() {
        if Program::new("docker", PACKAGE).with(["--version"]).run().is_ok() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("docker-compose.yaml");
        std::fs::write(&file, "services: {}\n").unwrap();
        assert!(remove(&file, true).unwrap_err().to_string().contains("`docker` is not installed"));
        assert!(remove(&dir.path().join("none"), true).unwrap_err().to_string().contains("is missing"));
    }
}
