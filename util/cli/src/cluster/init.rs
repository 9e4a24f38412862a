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
