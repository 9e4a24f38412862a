//! `dstack cluster init`: all nodes prove the new root, then the pin. Owns: what all n must agree on.
//! Never: prints a pin that fewer than all n nodes proved. Source: threshold.md §1.6 "Genesis certificate".

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use dstack_attest::{TcbPolicy, VerifyContext, verify};
use dstack_protocol::genesis::GenesisCertificate;
use dstack_protocol::rpc::PATH_GENESIS_CERTIFICATE;
use dstack_protocol::{Generation, RootTag, Seat, UnixMillis, Wire, binding};
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_threshold::group::{Group as _, Ristretto255};

use super::ClusterFolder;
use crate::args;
use crate::failure::{Done, Failure};
use crate::files;
use crate::nodes::{CallError, NodeArguments, Nodes, PAUSE, block_on};

pub(crate) const HELP: &str =
    "Prints the pin as JSON: {\"cluster_id\":…,\"pk_prf\":…,\"generation\":0}. Publish it, and put it into the measured
configuration of every workload (`dstack app measure --pin`). What one node answers is never a pin.

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

/// One certificate for each seat, each verified as soon as it comes, so that a wrong node ends the wait at once.
async fn collect(nodes: &Nodes, timeout: Duration) -> Result<BTreeMap<Seat, GenesisCertificate>, Failure> {
    let until = tokio::time::Instant::now() + timeout;
    let mut by_seat = BTreeMap::new();
    let mut answered = std::collections::BTreeSet::new();
    let seats = usize::from(nodes.folder.genesis.n);
    if nodes.addresses.len() < seats {
        let what = format!("{} nodes are named, the cluster has {seats}", nodes.addresses.len());
        return Err(Failure::usage(what, "name every node with --node, or none"));
    }
    loop {
        let mut waiting_for = Vec::new();
        for address in &nodes.addresses {
            if answered.contains(address) {
                continue;
            }
            match nodes.get(address, PATH_GENESIS_CERTIFICATE).await {
                Ok(answer) => {
                    let certificate = GenesisCertificate::decode(&answer.body)
                        .map_err(|error| Failure::wrong(format!("{address}: genesis certificate: {error}"), NOT_A_PIN))?;
                    check(&nodes.folder, &certificate, SystemClock::new().now())
                        .map_err(|why| Failure::wrong(format!("{address}: {why}"), NOT_A_PIN))?;
                    answered.insert(address.clone());
                    by_seat.insert(certificate.seat, certificate);
                }
                Err(error) if error.is_passing() || matches!(error, CallError::Resolve { .. }) => {
                    waiting_for.push(error.to_string());
                }
                Err(error) => return Err(error.failure()),
            }
        }
        if by_seat.len() == seats {
            return Ok(by_seat);
        }
        if waiting_for.is_empty() {
            let missing: Vec<String> =
                nodes.folder.genesis.seats.iter().filter(|s| !by_seat.contains_key(&s.seat)).map(|s| s.seat.to_string()).collect();
            let what = format!("no node answered for seat {}: two addresses lead to one node", missing.join(", "));
            return Err(Failure::usage(what, "name every node once with --node, or none"));
        }
        if tokio::time::Instant::now() >= until {
            let what = format!("{} of {seats} nodes proved the root; {}", by_seat.len(), waiting_for.join("; "));
            return Err(Failure::unable(what, "see the nodes' logs and `dstack cluster status`; all nodes must run at genesis"));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

const NOT_A_PIN: &str = "do not use this cluster; find out which binary and machine that node runs";

/// Whether one node's certificate holds by itself.
fn check(folder: &ClusterFolder, certificate: &GenesisCertificate, now: UnixMillis) -> Result<(), String> {
    if certificate.root != RootTag::Prf || certificate.generation != Generation(0) {
        return Err(format!("certificate is for root {:?} of generation {}", certificate.root, certificate.generation));
    }
    if Ristretto255::decode(&certificate.public_key).is_none() {
        return Err("public key is not an element of ristretto255".to_owned());
    }
    let seat = folder.genesis.seats.iter().find(|seat| seat.seat == certificate.seat);
    let seat = seat.ok_or_else(|| format!("seat {} is not of this cluster", certificate.seat))?;
    let context = VerifyContext { now, roots: &folder.roots, collateral: &folder.collateral, tcb: &TcbPolicy::default() };
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

/// All n certificates, one root: the pin.
fn agree(folder: &ClusterFolder, certificates: &BTreeMap<Seat, GenesisCertificate>, now: UnixMillis) -> Done {
    let mut first: Option<&GenesisCertificate> = None;
    for grant in &folder.genesis.seats {
        let missing = || Failure::wrong(format!("no certificate for seat {}", grant.seat), NOT_A_PIN);
        let certificate = certificates.get(&grant.seat).ok_or_else(missing)?;
        check(folder, certificate, now).map_err(|why| Failure::wrong(format!("seat {}: {why}", grant.seat), NOT_A_PIN))?;
        let same = first.is_none_or(|f| f.public_key == certificate.public_key && f.transcript == certificate.transcript);
        if !same {
            return Err(Failure::wrong(format!("seat {} proves another root than the seats before it", grant.seat), NOT_A_PIN));
        }
        first = first.or(Some(certificate));
    }
    let certificate = first.ok_or_else(|| Failure::wrong("the cluster has no seats", NOT_A_PIN))?;
    let pk_prf = hex::encode(&certificate.public_key);
    Ok(format!("{{\"cluster_id\":\"{}\",\"pk_prf\":\"{pk_prf}\",\"generation\":{}}}\n", folder.cluster_id, certificate.generation))
}

#[cfg(test)]
mod tests {
    use dstack_attest::{CollateralBundle, TrustRoots};
    use dstack_protocol::genesis::{AllowedNode, Authority, CaAlgorithm, Genesis, SeatGrant, collateral_id};
    use dstack_tee::Device as _;
    use dstack_testkit::{Machine, Measured, SoftwareRoots};

    use super::*;

    struct World {
        folder: ClusterFolder,
        machines: Vec<Machine>,
        roots: SoftwareRoots,
        now: UnixMillis,
    }

    const TRANSCRIPT: [u8; 32] = [7; 32];

    /// The group's generator: any element will do as a public key here.
    fn public_key() -> Vec<u8> {
        Ristretto255::encode(&Ristretto255::mul_base(&Ristretto255::scalar_from_u64(5))).as_ref().to_vec()
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
            };
            Self { folder, machines, roots, now }
        }

        fn certificate(&self, seat: u16, by: &Machine) -> GenesisCertificate {
            let public_key = public_key();
            let report_data = binding::genesis_certificate(&self.folder.cluster_id, Generation(0), RootTag::Prf, &public_key, &TRANSCRIPT);
            GenesisCertificate {
                seat: Seat(seat),
                generation: Generation(0),
                root: RootTag::Prf,
                public_key,
                transcript: TRANSCRIPT,
                evidence: by.evidence(report_data).unwrap(),
            }
        }

        fn all(&self) -> BTreeMap<Seat, GenesisCertificate> {
            (1..).zip(&self.machines).map(|(seat, machine)| (Seat(seat), self.certificate(seat, machine))).collect()
        }

        fn refusal(&self, certificates: &BTreeMap<Seat, GenesisCertificate>) -> String {
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
        assert_eq!(pin["pk_prf"], hex::encode(public_key()));
        assert_eq!(pin["generation"], 0);
    }

    #[test]
    fn fewer_than_all_nodes_give_no_pin() {
        let world = World::new();
        let mut certificates = world.all();
        certificates.remove(&Seat(2));
        assert!(world.refusal(&certificates).contains("no certificate for seat 2"));
    }

    #[test]
    fn each_lie_of_one_node_is_found() {
        let world = World::new();
        let replaced = |certificate: GenesisCertificate| {
            let mut certificates = world.all();
            certificates.insert(certificate.seat, certificate);
            world.refusal(&certificates)
        };
        let good = |seat: u16| world.certificate(seat, &world.machines[usize::from(seat) - 1]);

        // Evidence speaks of the root it was made for and of no other.
        let mut other_key = good(2);
        other_key.public_key = Ristretto255::encode(&Ristretto255::mul_base(&Ristretto255::scalar_from_u64(6))).as_ref().to_vec();
        assert!(replaced(other_key).contains("evidence is not about this root"));
        let mut other_transcript = good(3);
        other_transcript.transcript = [8; 32];
        assert!(replaced(other_transcript).contains("evidence is not about this root"));
        let mut no_point = good(1);
        no_point.public_key = vec![0xff; 32];
        assert!(replaced(no_point).contains("not an element"));

        // A consistent certificate of another root does not agree with the others.
        let mut own_root = good(2);
        own_root.transcript = [8; 32];
        let report_data =
            binding::genesis_certificate(&world.folder.cluster_id, Generation(0), RootTag::Prf, &own_root.public_key, &own_root.transcript);
        own_root.evidence = world.machines[1].evidence(report_data).unwrap();
        assert!(replaced(own_root).contains("another root"));

        // One machine cannot speak for two seats, nor a foreign one for any.
        assert!(replaced(world.certificate(2, &world.machines[0])).contains("another machine"));
        let foreign = Machine::tdx("foreign", &world.roots).unwrap();
        assert!(replaced(world.certificate(2, &foreign)).contains("has no seat"));

        // Another binary on the right machine.
        let other_binary = Machine::tdx("two", &world.roots).unwrap().running(Measured::executable(b"another"));
        assert!(replaced(world.certificate(2, &other_binary)).contains("not allowed by the genesis document"));

        // Bytes of evidence that no root signed.
        let mut broken = good(2);
        let middle = broken.evidence.len() / 2;
        broken.evidence[middle] ^= 1;
        assert!(replaced(broken).contains("evidence"));

        let mut later = good(1);
        later.generation = Generation(1);
        assert!(replaced(later).contains("generation 1"));
    }
}
