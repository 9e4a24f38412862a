//! A test world in one value: roots in a temporary directory, machines served from it, a verifier that trusts them.
//! Owns: the directory and the servers; both end with the value. Never: used by the device process.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dstack_attest::{AttestError, CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity, VerifyContext, verify};
use dstack_runtime::clock::{Clock, SystemClock};

use crate::device::{Executables, Serving, serve};
use crate::error::TestkitError;
use crate::host::Host;
use crate::roots::{SoftwareRoots, public_files};

/// Software roots with the machines under them, at the system's time.
pub struct World {
    roots: SoftwareRoots,
    clock: Arc<dyn Clock>,
    executables: Arc<Executables>,
    /// Before the directory, so that sockets are removed while it is there.
    serving: Vec<Serving>,
    dir: tempfile::TempDir,
}

impl World {
    /// A world with new roots and no machine.
    ///
    /// # Errors
    /// [`TestkitError`] of making or writing the roots.
    pub fn new() -> Result<Self, TestkitError> {
        let clock = Arc::new(SystemClock::new());
        let roots = SoftwareRoots::generate(clock.now())?;
        let dir = tempfile::tempdir().map_err(|error| TestkitError::file("temporary directory", error))?;
        roots.save(dir.path())?;
        Ok(Self { roots, clock, executables: Arc::default(), serving: Vec::new(), dir })
    }

    /// Serves a TDX machine; the answer is the device text for a config, `software:<socket>`.
    ///
    /// # Errors
    /// [`TestkitError::File`] when the socket cannot be made, a second machine of one name among the reasons.
    pub fn tdx(&mut self, name: &str) -> Result<String, TestkitError> {
        self.serve(Host::tdx(name, &self.roots)?)
    }

    /// Serves a Nitro machine; the answer is the device text for a config.
    ///
    /// # Errors
    /// As [`World::tdx`].
    pub fn nitro(&mut self, name: &str) -> Result<String, TestkitError> {
        self.serve(Host::nitro(name, &self.roots)?)
    }

    /// Serves any machine; the answer is the device text for a config.
    ///
    /// # Errors
    /// As [`World::tdx`].
    pub fn serve(&mut self, host: Host) -> Result<String, TestkitError> {
        let path = self.dir.path().join(format!("{}.sock", host.name()));
        let one = serve(host, &path, 0o600, Arc::clone(&self.executables), Arc::clone(&self.clock))
            .map_err(|error| TestkitError::file(&path, error))?;
        self.serving.push(one);
        Ok(format!("software:{}", path.display()))
    }

    /// The roots.
    pub fn roots(&self) -> &SoftwareRoots {
        &self.roots
    }

    /// A directory that lives as long as the world, for whatever else a test writes.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Files for configs: TDX root, Nitro root (DER), collateral bundle (JSON), summary (JSON).
    pub fn public_files(&self) -> [PathBuf; 4] {
        public_files(self.dir.path())
    }

    /// Trust in both software roots and nothing else.
    ///
    /// # Errors
    /// What `attest` says of the certificates: never, unless this crate is wrong.
    pub fn trust_roots(&self) -> Result<TrustRoots, AttestError> {
        let tdx = TrustRoots::none().with_software_root(self.roots.tdx_root_der())?;
        tdx.with_software_root(self.roots.nitro_root_der())
    }

    /// Judges evidence by production code, now.
    ///
    /// # Errors
    /// Its refusal.
    pub fn verify(&self, evidence: &[u8]) -> Result<VerifiedIdentity, AttestError> {
        let roots = self.trust_roots()?;
        let collateral = CollateralBundle::parse(self.roots.bundle())?;
        verify(evidence, &VerifyContext { now: self.clock.now(), roots: &roots, collateral: &collateral, tcb: &TcbPolicy::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Measured;

    #[test]
    fn a_world_serves_what_it_verifies_and_leaves_nothing() {
        let mut world = World::new().unwrap();
        let own = Measured::executable(&std::fs::read(std::env::current_exe().unwrap()).unwrap());
        for (text, expected) in [(world.tdx("a").unwrap(), own.tdx_measurement()), (world.nitro("b").unwrap(), own.nitro_measurement())] {
            let device = dstack_tee::open(&text).unwrap();
            let identity = world.verify(&device.evidence([3; 64]).unwrap()).unwrap();
            assert_eq!(identity.measurement(), expected);
        }
        assert!(matches!(world.tdx("a"), Err(TestkitError::File { .. })));
        assert!(world.public_files().iter().all(|file| file.exists()));
        let dir = world.dir().to_owned();
        drop(world);
        assert!(!dir.exists());
    }
}
