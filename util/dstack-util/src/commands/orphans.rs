//! `remove-orphans`: containers of a compose project whose service is no longer in its file. Owns: finding them by the engine's labels, of the
//! engine or, before it runs, of its folder: else it would start them first. Never: touches a container of another project, or one without
//! labels; follows a link out of that folder.
//! Source: util and deploy reference §1.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

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

/// Largest description of a container.
const CONTAINER_BYTES_MAX: u64 = 16 << 20;

/// What the engine keeps of a container, `config.v2.json`.
#[derive(Deserialize)]
struct Kept {
    #[serde(rename = "Config")]
    config: KeptConfig,
}

#[derive(Deserialize)]
struct KeptConfig {
    #[serde(rename = "Labels", default)]
    labels: Option<BTreeMap<String, String>>,
}

/// As [`remove`], of the folder of an engine that does not run: dstack's images call it so before they start one.
///
/// # Errors
/// The compose file's, the folder's.
pub fn remove_below(docker_root: &Path, compose: &Path, dry_run: bool) -> anyhow::Result<()> {
    let services = services_of(compose)?;
    for (folder, service) in orphans_below(docker_root, compose, &services)? {
        let verb = if dry_run { "would remove" } else { "removing" };
        println!("{verb} {} (service {service})", folder.file_name().unwrap_or_default().to_string_lossy());
        if !dry_run {
            std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
    }
    Ok(())
}

/// Folders of containers of this file's project whose service is not in it. A container that cannot be read is left, and said.
fn orphans_below(docker_root: &Path, compose: &Path, services: &BTreeSet<String>) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let compose = std::fs::canonicalize(compose).with_context(|| format!("cannot find {}", compose.display()))?;
    let containers = docker_root.join("containers");
    let entries = match std::fs::read_dir(&containers) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", containers.display())),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", containers.display()))?;
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let file = entry.path().join("config.v2.json");
        let kept = files::read_if_there(&file, CONTAINER_BYTES_MAX).map_err(anyhow::Error::from);
        let kept = kept.and_then(|bytes| Ok(bytes.map(|bytes| serde_json::from_slice::<Kept>(&bytes)).transpose()?));
        let labels = match kept {
            Ok(Some(kept)) => kept.config.labels.unwrap_or_default(),
            Ok(None) => continue,
            Err(error) => {
                eprintln!("left as it is: {}: {error:#}", file.display());
                continue;
            }
        };
        let of = |name: &str| labels.get(&format!("com.docker.compose.{name}"));
        let is_of_file = of("project.config_files").is_some_and(|file| Path::new(file) == compose);
        if let Some(service) = of("service").filter(|service| is_of_file && !services.contains(*service)) {
            found.push((entry.path(), service.clone()));
        }
    }
    Ok(found)
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
    fn before_the_engine_runs_its_folder_tells() {
        let dir = tempfile::tempdir().unwrap();
        let (root, compose) = (dir.path().join("docker"), dir.path().canonicalize().unwrap().join("docker-compose.yaml"));
        std::fs::write(&compose, "services: {}\n").unwrap();
        let services = BTreeSet::from(["web".to_owned()]);
        let below = || orphans_below(&root, &compose, &services).unwrap();
        assert!(below().is_empty(), "no engine was here yet");
        let container = |id: &str, text: &str| {
            let folder = root.join("containers").join(id);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("config.v2.json"), text).unwrap();
            folder
        };
        let labelled = |file: &Path, service: &str| {
            let labels = serde_json::json!({ "com.docker.compose.project.config_files": file, "com.docker.compose.service": service });
            serde_json::json!({ "Config": { "Labels": labels }, "State": {} }).to_string()
        };
        container("a", &labelled(&compose, "web"));
        let gone = container("b", &labelled(&compose, "gone"));
        container("c", &labelled(Path::new("/other/docker-compose.yaml"), "gone"));
        container("d", r#"{"Config":{"Labels":null}}"#);
        container("e", "[");
        std::os::unix::fs::symlink(&gone, root.join("containers/f")).unwrap();
        assert_eq!(below(), [(gone, "gone".to_owned())]);
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
        assert!(remove_below(dir.path(), &dir.path().join("none"), true).unwrap_err().to_string().contains("is missing"));
    }
}
