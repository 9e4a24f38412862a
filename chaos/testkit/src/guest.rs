//! A guest of dstack for a command of somebody else: a cluster, an app, its agent, and their addresses in the command's environment.
//! Owns: the names of those variables (`conformance/python/check.py` tells what each is). Never: looks at what the command does.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail, ensure};
use dstack_testkit::cluster::{Agent, AgentSpec, Cluster, ClusterSpec, MachineKind, process};
use serde_json::Value;

/// Runs `command` beside a cluster; its failure is ours.
pub(crate) fn run(examples: &Path, command: &[String]) -> anyhow::Result<()> {
    let guests = ["web", "beside"].map(|name| (name.to_owned(), MachineKind::Tdx)).to_vec();
    let mut cluster = Cluster::start(&ClusterSpec { dstack: true, guests, ..ClusterSpec::default() })?;
    let app = cluster.measure("web-db", &examples.join("web-db/docker-compose.yml"), MachineKind::Tdx)?;
    let state = cluster.register(&app, &[&app.compose_hash])?;
    ensure!(state == "applied", "registering ended as {state}");
    let spec = AgentSpec { machine: "web", device: None, app: &app, app_id: None, instance_seed: Some("5eed"), name: "web-db" };
    let agent = Agent::start(&cluster, &spec)?;
    // The same app on another machine: its env key is the app's.
    let keys = cluster.fetch_keys("beside", &app, "beside")?;

    let url = cluster.dstack_urls().into_iter().next().context("the nodes serve no guests of dstack")?;
    let root = cluster.dir().join("root-ca.pem");
    std::fs::write(&root, root_certificate(&cluster, &url)?)?;
    let pin: Value = serde_json::from_slice(&std::fs::read(cluster.pin()?)?)?;
    let identity = pin.get("id_pub").and_then(Value::as_str).context("the pin names no id_pub")?;

    let (program, arguments) = command.split_first().context("no command")?;
    println!("guest ready: app {}, agent {}, KMS {url}", app.app_id, agent.socket().display());
    let status = Command::new(program)
        .args(arguments)
        .env("DSTACK_SIMULATOR_ENDPOINT", agent.socket())
        .env("TAPPD_SIMULATOR_ENDPOINT", agent.tappd_socket())
        .env("CONFORMANCE_KMS_URL", &url)
        .env("CONFORMANCE_ROOT_CA", &root)
        .env("CONFORMANCE_APP_ID", &app.app_id)
        .env("CONFORMANCE_ID_PUB", identity)
        .env("CONFORMANCE_APP_KEYS", &keys.path)
        .status()
        .with_context(|| format!("cannot start {program}"))?;
    cluster.check_running()?;
    if !status.success() {
        for name in ["web-db", "node-1", "node-2", "node-3"] {
            let text = std::fs::read_to_string(cluster.dir().join(format!("{name}.log"))).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("── the end of {name}'s log\n{}", lines.get(lines.len().saturating_sub(15)..).unwrap_or_default().join("\n"));
        }
        bail!("{program} ended with {status}");
    }
    agent.stop()?;
    for (seat, status) in cluster.terminate_all()? {
        ensure!(status.success(), "node {seat} ended with {status}");
    }
    Ok(())
}

/// The root CA as a node shows it. Believed only because its key is the one in the pin, which the nodes' evidence vouches for.
fn root_certificate(cluster: &Cluster, url: &str) -> anyhow::Result<String> {
    let meta = process::run(
        Command::new("curl")
            .args(["--silent", "--show-error", "--fail", "--insecure", "--max-time", "20"])
            .arg(format!("{url}/prpc/GetMeta")),
    )?;
    let meta: Value = serde_json::from_str(&meta).context("GetMeta is not JSON")?;
    let pem = meta.get("ca_cert").and_then(Value::as_str).context("GetMeta names no ca_cert")?;
    let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).context("ca_cert is not PEM")?;
    let certificate = block.parse_x509().context("ca_cert is no certificate")?;
    let pin: Value = serde_json::from_slice(&std::fs::read(cluster.pin()?)?)?;
    let expected = pin.get("ca_pub").and_then(Value::as_str).context("the pin names no ca_pub")?;
    let got = hex::encode(&certificate.public_key().subject_public_key.data);
    // Ed25519: the key is the whole bit string.
    ensure!(got == expected, "the root CA's key is {got}, the pin says {expected}");
    Ok(pem.to_owned())
}
