//! A workload without an agent: `dstack-util get-keys` on an emulated Nitro machine. Owns: calling it. Never: prints a key.

use std::path::PathBuf;
use std::process::Command;

use super::Cluster;
use super::agent::check_values;
use super::app::App;
use super::error::ClusterError;
use super::process::run;

/// Keys that the utility wrote to a file, which stays in the cluster's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFile {
    /// The file.
    pub path: PathBuf,
    /// Check values by class: equal ones mean equal keys, and they betray nothing.
    pub check_values: Vec<(String, String)>,
}

impl Cluster {
    /// Fetches the app's keys on `machine` into a new file `<name>.keys.json`.
    ///
    /// # Errors
    /// [`ClusterError::Command`] with the utility's words.
    pub fn fetch_keys(&self, machine: &str, app: &App, name: &str) -> Result<KeyFile, ClusterError> {
        let (path, kcv) = (self.dir().join(format!("{name}.keys.json")), self.dir().join(format!("{name}.kcv.json")));
        let mut command = Command::new(self.binaries.path("dstack-util")?);
        command.args(["get-keys", "--kms-url", &self.kms_urls(), "--device", &self.device.text(machine), "--compose"]).arg(&app.compose);
        for root in self.device.roots() {
            command.arg("--software-root").arg(root);
        }
        command.arg("--collateral").arg(self.device.collateral()).arg("--output").arg(&path).arg("--kcv-file").arg(&kcv);
        run(&mut command)?;
        Ok(KeyFile { path, check_values: check_values(&kcv)? })
    }
}
