//! The story of the README, told while it happens. Owns: its order and words. Never: shows a key; check values and fingerprints tell
//! whether two are equal. Leaves no process and no file behind, however it ends.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use dstack_runtime::shutdown::Shutdown;
use dstack_testkit::cluster::{Agent, AgentSpec, App, Cluster, ClusterError, ClusterSpec, MachineKind, process};

/// Runs it to its end, or until SIGINT or SIGTERM.
pub(crate) fn run(examples: &Path, keep: bool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let shutdown = {
        let _inside = runtime.enter();
        Shutdown::on_signals().context("signal handlers")?
    };
    // The story blocks on a thread of its own: processes end with the thread that started them, so it must be the one that cleans up.
    let (told, mut end) = tokio::sync::oneshot::channel::<anyhow::Result<()>>();
    let (leave, left) = std::sync::mpsc::channel::<()>();
    let examples = examples.to_owned();
    let teller = std::thread::Builder::new().name("story".to_owned()).spawn(move || {
        let _answered = told.send(tell(&examples, keep, &left));
    })?;
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = &mut end => Some(outcome),
            () = shutdown.requested() => None,
        }
    });
    let outcome = match outcome {
        Some(outcome) => outcome.unwrap_or_else(|_| Err(anyhow::anyhow!("the story broke off"))),
        None => {
            println!("\ninterrupted: ending what runs");
            drop(leave);
            match end.blocking_recv() {
                Ok(_) if keep => Ok(()),
                Ok(outcome) => outcome,
                Err(_) => Err(anyhow::anyhow!("the story broke off")),
            }
        }
    };
    let _ = teller.join();
    outcome
}

/// Prints lines with the time since the begin, and breaks off when the reader has left.
struct Teller<'a> {
    begun: Instant,
    left: &'a std::sync::mpsc::Receiver<()>,
}

impl Teller<'_> {
    fn say(&self, text: &str) -> anyhow::Result<()> {
        println!("{:>6.1} s  {text}", self.begun.elapsed().as_secs_f64());
        match self.left.try_recv() {
            Err(std::sync::mpsc::TryRecvError::Disconnected) => bail!("interrupted"),
            _ => Ok(()),
        }
    }

    fn more(&self, text: &str) {
        for line in text.lines() {
            println!("          {line}");
        }
    }
}

fn tell(examples: &Path, keep: bool, left: &std::sync::mpsc::Receiver<()>) -> anyhow::Result<()> {
    let story = Teller { begun: Instant::now(), left };
    story.say("three machines, each with an emulated TEE; the genesis document names them, and the one program that may run there")?;
    let mut cluster = Cluster::plan(&ClusterSpec { dstack: true, ..ClusterSpec::default() })?;
    story.more(&format!("cluster {}", short(&cluster.cluster_id)));
    cluster.start_all()?;
    story.say("three node processes are up: they verify each other, and make a root key that none of them ever holds")?;
    let pin = cluster.init()?;
    story.say("`dstack cluster init` verified all three proofs and printed the pin, by which workloads know this cluster")?;
    story.more(std::fs::read_to_string(&pin)?.trim());
    cluster.wait_ready(dstack_testkit::cluster::FORMING)?;

    let web = cluster.measure("web-db", &examples.join("web-db/docker-compose.yml"), MachineKind::Tdx)?;
    let signer = cluster.measure("signer", &examples.join("signer/docker-compose.yml"), MachineKind::Nitro)?;
    for app in [&web, &signer] {
        let state = cluster.register(app, &[&app.compose_hash])?;
        ensure!(state == "applied", "registering {} ended as {state}", app.name);
    }
    story.say("an operator registered two apps, each by the hash of its compose file")?;
    for app in [&web, &signer] {
        story.more(&format!("{:<7} on {:<5}  app {}  compose {}", app.name, app.kind.name(), short(&app.app_id), short(&app.compose_hash)));
    }

    let before = Keys::fetch(&cluster, &web, &signer, "first")?;
    story.say(&format!("both got their keys: two of three nodes answered each, the agent combined ({})", before.timings()))?;
    story.more(&before.text());

    let leader = cluster.leader()?;
    cluster.node(leader).kill();
    let killed = Instant::now();
    story.say(&format!("node {leader}, the leader, is killed (SIGKILL)"))?;
    let next = cluster.leader()?;
    story.say(&format!("node {next} leads, {:.1} s later", killed.elapsed().as_secs_f64()))?;
    let after = Keys::fetch(&cluster, &web, &signer, "second")?;
    story.say(&format!("both started anew and asked again ({})", after.timings()))?;
    story.more(&after.text());
    ensure!(before.same(&after), "the keys differ: {} before, {} after", before.text(), after.text());
    story.more("the same keys as before");

    refused(&story, &cluster, examples, &web)?;

    cluster.node(leader).start()?;
    cluster.wait_ready(dstack_testkit::cluster::FORMING)?;
    story.say(&format!("node {leader} is back, with its sealed share"))?;
    if keep {
        return stay(&story, &mut cluster, &web, left);
    }
    for (seat, status) in cluster.terminate_all()? {
        ensure!(status.success(), "node {seat} ended with {status}");
    }
    drop(cluster);
    story.say("all processes ended in order; nothing is left behind")
}

/// One byte of the compose file changes: the agent is refused, and told why.
fn refused(story: &Teller<'_>, cluster: &Cluster, examples: &Path, web: &App) -> anyhow::Result<()> {
    let original = std::fs::read_to_string(examples.join("web-db/docker-compose.yml"))?;
    let modified = original.replacen("nginx:", "ngimx:", 1);
    ensure!(modified != original, "the example names no nginx image to change");
    let file = cluster.dir().join("modified-docker-compose.yml");
    std::fs::write(&file, modified)?;
    let changed = cluster.measure("modified", &file, MachineKind::Tdx)?;
    story.say("someone changes one letter of web-db's compose file, and starts it as web-db")?;
    let spec = AgentSpec { machine: "web", device: None, app: &changed, app_id: Some(&web.app_id), instance_seed: None, name: "modified" };
    match Agent::start(cluster, &spec) {
        Err(ClusterError::Ended { log, .. }) => {
            let reason = log.lines().rev().find_map(|line| line.find("COMPOSE_NOT_ALLOWED").and_then(|at| line.get(at..)));
            let reason = reason.with_context(|| format!("the agent ended, but not for its compose file:\n{log}"))?;
            story.say("refused:")?;
            story.more(&reason.replace(": expected", "\n  expected").replace("; got", "\n  got").replace("; to do:", "\n  to do:"));
        }
        Err(other) => return Err(other.into()),
        Ok(_) => bail!("a modified compose file got keys"),
    }
    let mut explain = cluster.dstack()?;
    story.more("$ dstack explain COMPOSE_NOT_ALLOWED");
    story.more(process::run(explain.args(["explain", "COMPOSE_NOT_ALLOWED"]))?.trim_end());
    Ok(())
}

/// Leaves everything up until the reader leaves.
fn stay(story: &Teller<'_>, cluster: &mut Cluster, web: &App, left: &std::sync::mpsc::Receiver<()>) -> anyhow::Result<()> {
    let agent = Agent::start(cluster, &the_web_app(web, "web-db"))?;
    story.say("the cluster stays up; end it with Ctrl-C")?;
    let (dir, dstack) = (cluster.dir().display().to_string(), cluster.binaries.path("dstack")?.display().to_string());
    story.more(&format!(
        "guest API:  curl --unix-socket $AGENT_SOCK http://dstack/Info\n\
         \x20           curl --unix-socket $AGENT_SOCK -d '{{\"path\":\"db/password\"}}' http://dstack/GetKey?json\n\
         operators:  {dstack} cluster status --genesis {dir}/cluster\n\
         \x20           {dstack} policy show --genesis {dir}/cluster {}\n\
         metrics:    curl http://{}/metrics\n\
         logs:       {dir}/node-*.log",
        web.app_id,
        cluster.node(1).admin,
    ));
    let dstack_urls = cluster.dstack_urls();
    println!("AGENT_SOCK={}", agent.socket().display());
    println!("TAPPD_SOCK={}", agent.tappd_socket().display());
    // The names that dstack's SDKs look for.
    println!("DSTACK_SIMULATOR_ENDPOINT={}", agent.socket().display());
    println!("TAPPD_SIMULATOR_ENDPOINT={}", agent.tappd_socket().display());
    println!("APP_ID={}", web.app_id);
    println!("KMS={}", dstack_urls.first().context("the nodes serve no guests of dstack")?);
    println!("DSTACK_URLS={}", dstack_urls.join(","));
    println!("KMS_URLS={}", cluster.kms_urls());
    // The sender is dropped when the reader leaves; meanwhile nothing is sent.
    while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = left.recv_timeout(Duration::from_millis(500)) {
        cluster.check_running()?;
    }
    agent.stop()?;
    cluster.terminate_all()?;
    story.say("all processes ended; nothing is left behind").or(Ok(()))
}

/// What tells the keys of both apps from others, without the keys.
struct Keys {
    web: Vec<(String, String)>,
    signer: Vec<(String, String)>,
    took: [Duration; 2],
}

impl Keys {
    /// Starts both workloads anew and lets them fetch.
    fn fetch(cluster: &Cluster, web: &App, signer: &App, round: &str) -> anyhow::Result<Self> {
        let begun = Instant::now();
        // A state directory of its own each time, so that nothing is compared by the agent itself.
        let agent = Agent::start(cluster, &the_web_app(web, &format!("web-{round}")))?;
        let values = agent.check_values()?;
        agent.stop()?;
        let agent_took = begun.elapsed();
        let begun = Instant::now();
        let signer = cluster.fetch_keys("signer", signer, &format!("signer-{round}"))?.check_values;
        Ok(Self { web: values, signer, took: [agent_took, begun.elapsed()] })
    }

    fn timings(&self) -> String {
        let [agent, util] = self.took.map(|took| took.as_millis());
        format!("agent {agent} ms, util {util} ms, from start to keys")
    }

    fn text(&self) -> String {
        let line = |values: &[(String, String)]| {
            values.iter().map(|(class, kcv)| format!("{class} {}", short(kcv))).collect::<Vec<_>>().join(", ")
        };
        format!("check values of web-db: {}\ncheck values of signer: {}", line(&self.web), line(&self.signer))
    }

    fn same(&self, other: &Self) -> bool {
        self.web == other.web && self.web.len() == 3 && self.signer == other.signer && self.signer.len() == 3
    }
}

/// The web app as one instance, whose disk key is the same at each start.
fn the_web_app<'a>(app: &'a App, name: &'a str) -> AgentSpec<'a> {
    AgentSpec { machine: "web", device: None, app, app_id: None, instance_seed: Some("5eed"), name }
}

/// The first digits of a long hex text.
fn short(hex: &str) -> String {
    let digits: String = hex.chars().take(12).collect();
    format!("{digits}…")
}
