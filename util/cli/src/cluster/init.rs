//! `dstack cluster init`: all nodes prove the new root, then the pin. Owns: what all n must agree on.
//! Never: prints a pin that fewer than all n nodes proved. Source: threshold.md §1.6 "Genesis certificate".

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use dstack_attest::{VerifyContext, verify};
use dstack_protocol::genesis::GenesisCertificate;
use dstack_protocol::rpc::PATH_GENESIS_CERTIFICATE;
use dstack_protocol::{Generation, RootTag, Seat, UnixMillis, Wire, binding};
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_threshold::share::{group_name, is_public_key};

use super::ClusterFolder;
use crate::args;
use crate::failure::{Done, Failure};
use crate::files;
use crate::nodes::{CallError, NodeArguments, Nodes, PAUSE, block_on};

pub(crate) const HELP: &str =
    "Prints the pin as JSON: {\"cluster_id\":…,\"pk_prf\":…,\"generation\":0,\"ca_pub\":…,\"id_pub\":…}. Publish it, and put it into
the measured configuration of every workload (`dstack app measure --pin`). `ca_pub` is the public key of the cluster's root CA,
`id_pub` that of its identity, which signs app keys. What one node answers is never a pin.

Example: dstack cluster init --genesis cluster --pin-out pin.json";

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    nodes: NodeArguments,
    /// How long to wait for all nodes.
    #[arg(long, default_value = "10m", value_parser = args::duration)]
    timeout: Duration,
    /// Also write the pin to this file.
    #[arg(long)]
    pin_out: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Done {
    let nodes = Nodes::new(&arguments.nodes)?;
    if !nodes.folder.genesis.has_roots() {
        return Err(Failure::usage("a cluster of fewer than 3 nodes has no root", "plan 3 or more seats"));
    }
    let certificates = block_on(collect(&nodes, arguments.timeout))?;
    let pin = agree(&nodes.folder, &certificates, SystemClock::new().now())?;
    if let Some(path) = &arguments.pin_out {
        files::write_new(path, pin.as_bytes())?;
    }
    Ok(pin)
}

/// Of each root one certificate for each seat.
type Certificates = BTreeMap<(RootTag, Seat), GenesisCertificate>;

/// Each certificate is verified as soon as it comes, so that a wrong node ends the wait at once.
async fn collect(nodes: &Nodes, timeout: Duration) -> Result<Certificates, Failure> {
    let until = tokio::time::Instant::now() + timeout;
    let mut certificates = Certificates::new();
    let mut answered = std::collections::BTreeSet::new();
    let seats = usize::from(nodes.folder.genesis.n);
    if nodes.addresses.len() < seats {
        let what = format!("{} nodes are named, the cluster has {seats}", nodes.addresses.len());
        return Err(Failure::usage(what, "name every node with --node, or none"));
    }
    loop {
        let mut waiting_for = Vec::new();
        for (address, root) in nodes.addresses.iter().flat_map(|address| RootTag::ALL.map(|root| (address, root))) {
            if answered.contains(&(address, root)) {
                continue;
            }
            match nodes.get(address, &format!("{PATH_GENESIS_CERTIFICATE}/{}", root.name())).await {
                Ok(answer) => {
                    let wrong = |why: String| Failure::wrong(format!("{address}: {why}"), NOT_A_PIN);
                    let certificate =
                        GenesisCertificate::decode(&answer.body).map_err(|error| wrong(format!("genesis certificate: {error}")))?;
                    check(&nodes.folder, root, &certificate, SystemClock::new().now()).map_err(wrong)?;
                    answered.insert((address, root));
                    certificates.insert((root, certificate.seat), certificate);
                }
                Err(error) if error.is_passing() || matches!(error, CallError::Resolve { .. }) => {
                    waiting_for.push(format!("root {}: {error}", root.name()));
                }
                Err(error) => return Err(error.failure()),
            }
        }
        if certificates.len() == seats * RootTag::ALL.len() {
            return Ok(certificates);
        }
        if waiting_for.is_empty() {
            let proved = |seat: &Seat| RootTag::ALL.into_iter().all(|root| certificates.contains_key(&(root, *seat)));
            let missing: Vec<String> =
                nodes.folder.genesis.seats.iter().filter(|grant| !proved(&grant.seat)).map(|grant| grant.seat.to_string()).collect();
            let what = format!("no node answered for seat {}: two addresses lead to one node", missing.join(", "));
            return Err(Failure::usage(what, "name every node once with --node, or none"));
        }
        if tokio::time::Instant::now() >= until {
            let wanted = seats * RootTag::ALL.len();
            let what = format!("{} of {wanted} proofs of a root; {}", certificates.len(), waiting_for.join("; "));
            return Err(Failure::unable(what, "see the nodes' logs and `dstack cluster status`; all nodes must run at genesis"));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

const NOT_A_PIN: &str = "do not use this cluster; find out which binary and machine that node runs";

/// Whether one node's certificate holds by itself.
fn check(folder: &ClusterFolder, root: RootTag, certificate: &GenesisCertificate, now: UnixMillis) -> Result<(), String> {
    if certificate.root != root || certificate.generation != Generation(0) {
        return Err(format!("certificate is for root {} of generation {}", certificate.root.name(), certificate.generation));
    }
    let ca = folder.genesis.ca_algorithm;
    if !is_public_key(root, ca, &certificate.public_key) {
        return Err(format!("public key of root {} is not an element of {}", root.name(), group_name(root, ca)));
    }
    let seat = folder.genesis.seats.iter().find(|seat| seat.seat == certificate.seat);
    let seat = seat.ok_or_else(|| format!("seat {} is not of this cluster", certificate.seat))?;
    let context = VerifyContext { now, roots: &folder.roots, collateral: &folder.collateral, tcb: &folder.node_tcb };
    let identity = verify(&certificate.evidence, &context).map_err(|error| format!("evidence: {}: {error}", error.class()))?;
    folder.accepts(&identity)?;
    // threshold.md §1.6: a seat belongs to one platform identity.
    if identity.platform_identity() != seat.platform_identity {
        return Err(format!("seat {} is spoken for by another machine, {}", seat.seat, hex::encode(identity.platform_identity())));
    }
    let expected = binding::genesis_certificate(
        &folder.cluster_id,
        certificate.generation,
        certificate.root,
        &certificate.public_key,
        &certificate.transcript,
    );
    identity.require_report_data(&expected).map_err(|error| format!("evidence is not about this root: {error}"))
}

/// All n certificates of all roots: the pin.
fn agree(folder: &ClusterFolder, certificates: &Certificates, now: UnixMillis) -> Done {
    let public_key = |root| agreed(folder, certificates, root, now).map(|certificate| hex::encode(&certificate.public_key));
    let (pk_prf, ca_pub, id_pub) = (public_key(RootTag::Prf)?, public_key(RootTag::Ca)?, public_key(RootTag::Id)?);
    Ok(format!(
        "{{\"cluster_id\":\"{}\",\"pk_prf\":\"{pk_prf}\",\"generation\":0,\"ca_pub\":\"{ca_pub}\",\"id_pub\":\"{id_pub}\"}}\n",
        folder.cluster_id
    ))
}

/// All n certificates of one root prove the same one.
fn agreed<'c>(
    folder: &ClusterFolder,
    certificates: &'c Certificates,
    root: RootTag,
    now: UnixMillis,
) -> Result<&'c GenesisCertificate, Failure> {
    let mut first: Option<&GenesisCertificate> = None;
    for grant in &folder.genesis.seats {
        let wrong = |what: String| Failure::wrong(what, NOT_A_PIN);
        let missing = || wrong(format!("no certificate for seat {} of root {}", grant.seat, root.name()));
        let certificate = certificates.get(&(root, grant.seat)).ok_or_else(missing)?;
        check(folder, root, certificate, now).map_err(|why| wrong(format!("seat {}: {why}", grant.seat)))?;
        let same = first.is_none_or(|f| f.public_key == certificate.public_key && f.transcript == certificate.transcript);
        if !same {
            return Err(wrong(format!("seat {} proves another root than the seats before it", grant.seat)));
        }
        first = first.or(Some(certificate));
    }
    first.ok_or_else(|| Failure::wrong("the cluster has no seats", NOT_A_PIN))
}

#[cfg(test)]
mod tests {
    use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots};
    use dstack_protocol::genesis::{AllowedNode, Authority, CaAlgorithm, Genesis, SeatGrant, collateral_id};
    use dstack_tee::Device as _;
    use dstack_testkit::{Machine, Measured, SoftwareRoots};

    use dstack_threshold::group::{Edwards25519, Group, Ristretto255, Secp256k1};

    use super::*;

    struct World {
        folder: ClusterFolder,
        machines: Vec<Machine>,
        roots: SoftwareRoots,
        now: UnixMillis,
    }

    const TRANSCRIPT: [u8; 32] = [7; 32];

    /// Any element will do as a public key here.
    fn element<G: Group>(number: u64) -> Vec<u8> {
        G::encode(&G::mul_base(&G::scalar_from_u64(number))).as_ref().to_vec()
    }

    fn public_key(root: RootTag) -> Vec<u8> {
        match root {
            RootTag::Prf => element::<Ristretto255>(5),
            RootTag::Ca => element::<Edwards25519>(5),
            RootTag::Id => element::<Secp256k1>(5),
        }
    }

    impl World {
        /// Two TDX nodes and a Nitro node under software roots.
        fn new() -> Self {
            let now = SystemClock::new().now();
            let roots = SoftwareRoots::generate(now).unwrap();
            let machines =
                vec![Machine::tdx("one", &roots).unwrap(), Machine::tdx("two", &roots).unwrap(), Machine::nitro("three", &roots).unwrap()];
            let mut allowed_nodes: Vec<_> =
                machines.iter().map(|m| AllowedNode { platform: m.platform(), measurement: m.measurement() }).collect();
            allowed_nodes.sort();
            allowed_nodes.dedup();
            let grant = |(number, m): (u16, &Machine)| SeatGrant {
                seat: Seat(number),
                address: format!("127.0.0.1:{number}"),
                platform_identity: m.host().identity().to_vec(),
            };
            let genesis = Genesis {
                random: [1; 32],
                n: 3,
                t: 2,
                f: 0,
                ca_algorithm: CaAlgorithm::Ed25519,
                authority: Authority::OperatorQuorum,
                chain_settings: Vec::new(),
                k: 1,
                r: 1,
                timelock_s: 0,
                operators: vec![[2; 32]],
                allowed_nodes,
                software_roots: Vec::new(),
                seats: (1..).zip(&machines).map(grant).collect(),
                collateral_id: collateral_id(roots.bundle()),
            };
            let trusted = TrustRoots::none().with_software_root(roots.tdx_root_der()).unwrap();
            let folder = ClusterFolder {
                cluster_id: genesis.cluster_id(),
                genesis,
                collateral: CollateralBundle::parse(roots.bundle()).unwrap(),
                roots: trusted.with_software_root(roots.nitro_root_der()).unwrap(),
                node_tcb: TcbPolicy::default(),
            };
            Self { folder, machines, roots, now }
        }

        fn certificate(&self, root: RootTag, seat: u16, by: &Machine) -> GenesisCertificate {
            let public_key = public_key(root);
            let report_data = binding::genesis_certificate(&self.folder.cluster_id, Generation(0), root, &public_key, &TRANSCRIPT);
            GenesisCertificate {
                seat: Seat(seat),
                generation: Generation(0),
                root,
                public_key,
                transcript: TRANSCRIPT,
                evidence: by.evidence(report_data).unwrap(),
            }
        }

        fn all(&self) -> Certificates {
            let of =
                |root| (1..).zip(&self.machines).map(move |(seat, machine)| ((root, Seat(seat)), self.certificate(root, seat, machine)));
            RootTag::ALL.into_iter().flat_map(of).collect()
        }

        fn refusal(&self, certificates: &Certificates) -> String {
            let mut report = Vec::new();
            agree(&self.folder, certificates, self.now).unwrap_err().report(&mut report).unwrap();
            String::from_utf8(report).unwrap()
        }
    }

    #[test]
    fn all_nodes_proving_one_root_give_the_pin() {
        let world = World::new();
        let pin = agree(&world.folder, &world.all(), world.now).unwrap();
        let pin: serde_json::Value = serde_json::from_str(&pin).unwrap();
        assert_eq!(pin["cluster_id"], world.folder.cluster_id.to_string());
        for (member, root) in [("pk_prf", RootTag::Prf), ("ca_pub", RootTag::Ca), ("id_pub", RootTag::Id)] {
            assert_eq!(pin[member], hex::encode(public_key(root)), "{member}");
        }
        assert_eq!(pin["generation"], 0);
    }

    #[test]
    fn fewer_than_all_nodes_give_no_pin() {
        let world = World::new();
        for root in RootTag::ALL {
            let mut certificates = world.all();
            certificates.remove(&(root, Seat(2)));
            assert!(world.refusal(&certificates).contains(&format!("no certificate for seat 2 of root {}", root.name())));
        }
    }

    #[test]
    fn each_lie_of_one_node_is_found() {
        for root in RootTag::ALL {
            lies_are_found(root);
        }
    }

    fn lies_are_found(root: RootTag) {
        let world = World::new();
        let replaced = |certificate: GenesisCertificate| {
            let mut certificates = world.all();
            certificates.insert((root, certificate.seat), certificate);
            world.refusal(&certificates)
        };
        let good = |seat: u16| world.certificate(root, seat, &world.machines[usize::from(seat) - 1]);

        // Evidence speaks of the root it was made for and of no other.
        let mut other_key = good(2);
        other_key.public_key = match root {
            RootTag::Prf => element::<Ristretto255>(6),
            RootTag::Ca => element::<Edwards25519>(6),
            RootTag::Id => element::<Secp256k1>(6),
        };
        assert!(replaced(other_key).contains("evidence is not about this root"));
        let mut other_transcript = good(3);
        other_transcript.transcript = [8; 32];
        assert!(replaced(other_transcript).contains("evidence is not about this root"));
        let mut no_point = good(1);
        no_point.public_key.fill(0xff);
        assert!(replaced(no_point).contains("not an element"));

        // A consistent certificate of another root does not agree with the others.
        let mut own_root = good(2);
        own_root.transcript = [8; 32];
        let report_data =
            binding::genesis_certificate(&world.folder.cluster_id, Generation(0), root, &own_root.public_key, &own_root.transcript);
        own_root.evidence = world.machines[1].evidence(report_data).unwrap();
        assert!(replaced(own_root).contains("another root"));

        // One machine cannot speak for two seats, nor a foreign one for any.
        assert!(replaced(world.certificate(root, 2, &world.machines[0])).contains("another machine"));
        let foreign = Machine::tdx("foreign", &world.roots).unwrap();
        assert!(replaced(world.certificate(root, 2, &foreign)).contains("has no seat"));

        // Another binary on the right machine.
        let other_binary = Machine::tdx("two", &world.roots).unwrap().running(Measured::executable(b"another"));
        assert!(replaced(world.certificate(root, 2, &other_binary)).contains("not allowed by the genesis document"));

        // Bytes of evidence that no root signed.
        let mut broken = good(2);
        let middle = broken.evidence.len() / 2;
        broken.evidence[middle] ^= 1;
        assert!(replaced(broken).contains("evidence"));

        // A proof of another root stands for nothing here.
        let mut another = good(1);
        another.root = if root == RootTag::Ca { RootTag::Id } else { RootTag::Ca };
        assert!(replaced(another).contains("certificate is for root"));

        let mut later = good(1);
        later.generation = Generation(1);
        assert!(replaced(later).contains("generation 1"));
    }
}
