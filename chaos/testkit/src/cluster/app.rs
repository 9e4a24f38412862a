//! An app as its owner and the operators know it: measured from a docker-compose file by `dstack app measure`. Owns: its app-compose.json.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::Cluster;
use super::device::value;
use super::error::ClusterError;
use super::process::run;
use super::spec::MachineKind;

/// A measured app.
#[derive(Debug, Clone)]
pub struct App {
    /// Its app-compose.json.
    pub compose: PathBuf,
    /// What a policy lists: SHA-256 of the document on TDX, of the image on Nitro. In hex.
    pub compose_hash: String,
    /// Its id, in hex.
    pub app_id: String,
    /// Where it runs.
    pub kind: MachineKind,
    /// For people.
    pub name: String,
}

impl Cluster {
    /// Measures a docker-compose file for a kind of machine, with this cluster's pin in it.
    ///
    /// # Errors
    /// [`ClusterError`] of the program; before [`Cluster::init`].
    pub fn measure(&self, name: &str, docker_compose: &Path, kind: MachineKind) -> Result<App, ClusterError> {
        let compose = self.dir().join(format!("{name}-app-compose.json"));
        let mut command = self.dstack()?;
        command.args(["app", "measure"]).arg(docker_compose).args(["--name", name, "--pin"]).arg(self.pin()?);
        if kind == MachineKind::Nitro {
            // threshold.md §2.2: Nitro has no instance id.
            command.arg("--no-instance-id");
        }
        let mut out = run(command.arg("--force").arg("--out").arg(&compose))?;
        let app_id = value(&out, "app_id")?;
        if kind == MachineKind::Nitro {
            // There the image is what is proven; the emulated machine measures the document as its image.
            let mut measure = Command::new(self.binaries.path("dstack-testkit")?);
            out = run(measure.args(["measure", "--platform", "nitro", "--compose"]).arg(&compose))?;
        }
        Ok(App { compose, compose_hash: value(&out, "compose_hash")?, app_id, kind, name: name.to_owned() })
    }

    /// Registers an app, or allows a changed one: `compose_hashes` may run. All key classes of its platform, any path, any OS image.
    /// Answers the action's state.
    ///
    /// # Errors
    /// [`ClusterError`] of the program.
    pub fn register(&self, app: &App, compose_hashes: &[&str]) -> Result<String, ClusterError> {
        let mut command = self.policy("propose")?;
        command.args(["--app-id", &app.app_id, "--name", &app.name, "--platform", app.kind.name(), "--any-os-image"]);
        command.args(["--path", "prefix:", "--compose-hash", &compose_hashes.join(",")]);
        if self.dstack_urls().is_empty() {
            command.args(["--class", "disk,env,k256,custom"]);
        } else {
            // The app CA's key is derived where `SignCert` is served.
            command.args(["--class", "disk,env,k256,custom,p256", "--allow-legacy"]);
        }
        value(&run(&mut command)?, "state")
    }

    /// Revokes an app. Answers the action's state.
    ///
    /// # Errors
    /// [`ClusterError`] of the program.
    pub fn revoke(&self, app_id: &str) -> Result<String, ClusterError> {
        value(&run(self.policy("revoke")?.args(["--app-id", app_id]))?, "state")
    }

    /// `dstack policy` with the first operator's key.
    ///
    /// # Errors
    /// [`ClusterError::NotBuilt`].
    pub fn policy(&self, what: &str) -> Result<Command, ClusterError> {
        let key = self.operators.first().ok_or_else(|| ClusterError::unexpected("cluster", "no operator"))?;
        let mut command = self.dstack()?;
        command.args(["policy", what, "--genesis"]).arg(self.genesis()).arg("--key").arg(&key.key);
        Ok(command)
    }
}
