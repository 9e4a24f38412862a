//! The folder that names a cluster: genesis document, collateral, software roots. Owns: its layout and that its parts belong
//! together. Never: changes after the plan; every node gets the same bytes.

use std::path::{Path, PathBuf};

use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity};
use dstack_protocol::genesis::{Genesis, collateral_id};
use dstack_protocol::limits::{COLLATERAL_BYTES_MAX, GENESIS_BYTES_MAX};
use dstack_protocol::{ClusterId, Wire};
use dstack_ratls::attest_judge::TrustMaterial;

use crate::failure::Failure;
use crate::files;

/// Encoded genesis document.
pub(crate) const GENESIS_FILE: &str = "genesis.bin";
/// Collateral bundle, the bytes that the document names.
pub(crate) const COLLATERAL_FILE: &str = "collateral.json";
/// Largest root certificate read.
pub(crate) const ROOT_BYTES_MAX: usize = 8 * 1024;

/// Name of the file of a software root: the SHA-256 of its key.
pub(crate) fn root_file(spki_sha256: &[u8; 32]) -> String {
    format!("software-root-{}.der", hex::encode(spki_sha256))
}

/// A loaded folder.
#[derive(Debug)]
pub(crate) struct ClusterFolder {
    pub(crate) genesis: Genesis,
    pub(crate) cluster_id: ClusterId,
    pub(crate) collateral: CollateralBundle,
    pub(crate) roots: TrustRoots,
    /// Which TCB a node may have. Not of the document: the nodes' configuration has it, arguments bring it here.
    pub(crate) node_tcb: TcbPolicy,
}

/// The bundle that `dstack collateral import` keeps beside the document's own; nodes are judged with it.
pub(crate) fn current_collateral(dir: &Path) -> PathBuf {
    dir.join("current-collateral.json")
}

impl ClusterFolder {
    /// Loads and checks `dir`.
    pub(crate) fn load(dir: &Path) -> Result<Self, Failure> {
        let made_by = "use the folder that `dstack cluster plan --out` made";
        let wrong = |file: PathBuf, why: String| Failure::wrong(format!("{}: {why}", file.display()), made_by);
        let path = dir.join(GENESIS_FILE);
        let genesis = Genesis::decode(&files::read(&path, GENESIS_BYTES_MAX)?).map_err(|error| wrong(path, error.to_string()))?;
        let path = dir.join(COLLATERAL_FILE);
        let bytes = files::read(&path, COLLATERAL_BYTES_MAX)?;
        if collateral_id(&bytes) != genesis.collateral_id {
            return Err(wrong(path, "not the collateral that the genesis document names".to_owned()));
        }
        let collateral = CollateralBundle::parse(&bytes).map_err(|error| wrong(path, error.to_string()))?;
        // What an import pinned later, beside the document's own.
        let later = current_collateral(dir);
        let collateral = match later.exists() {
            true => {
                CollateralBundle::parse(&files::read(&later, COLLATERAL_BYTES_MAX)?).map_err(|error| wrong(later, error.to_string()))?
            }
            false => collateral,
        };
        let mut roots = TrustRoots::production();
        for spki_sha256 in &genesis.software_roots {
            let path = dir.join(root_file(spki_sha256));
            roots = with_root(roots, &path)?;
            if roots.by_spki(spki_sha256).is_none() {
                return Err(wrong(path, "not the root that the genesis document names".to_owned()));
            }
        }
        Ok(Self { cluster_id: genesis.cluster_id(), genesis, collateral, roots, node_tcb: TcbPolicy::default() })
    }

    /// What nodes of this cluster are verified with.
    pub(crate) fn trust(&self) -> TrustMaterial {
        TrustMaterial { roots: self.roots.clone(), collateral: self.collateral.clone(), tcb: self.node_tcb.clone() }
    }

    /// Whether a verified identity may be a node: its measurement is allowed, its machine has a seat.
    pub(crate) fn accepts(&self, identity: &VerifiedIdentity) -> Result<(), String> {
        let allowed = self.genesis.allowed_nodes.iter();
        if !allowed.into_iter().any(|node| node.platform == identity.platform() && node.measurement == identity.measurement()) {
            let got = hex::encode(identity.measurement());
            return Err(format!("measurement {got} of platform {} is not allowed by the genesis document", identity.platform().name()));
        }
        if !self.genesis.seats.iter().any(|seat| seat.platform_identity == identity.platform_identity()) {
            return Err(format!("machine {} has no seat in the genesis document", hex::encode(identity.platform_identity())));
        }
        Ok(())
    }
}

/// Adds a software root from a DER file.
pub(crate) fn with_root(roots: TrustRoots, path: &Path) -> Result<TrustRoots, Failure> {
    roots
        .with_software_root(&files::read(path, ROOT_BYTES_MAX)?)
        .map_err(|error| Failure::wrong(format!("{}: {error}", path.display()), "give a root certificate in DER"))
}
