//! `dstack collateral`: brings collateral across an air gap, shows and checks it, fetches it on a machine that may.
//! Owns: what is printed, the bundle beside the genesis folder that nodes are judged with. Never: decides what may be pinned (the log
//! does), believes a file (vendors' signatures are checked first). Source: ADR 0010.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use dstack_attest::{CollateralBundle, TdxCollateral, X509Pool};
use dstack_collateral::{Endpoint, FetchError, Http, Intel, Kds, KeyOf, LinkHosts, follow, merge, read_folder, refresh};
use dstack_protocol::collateral::Pin;
use dstack_protocol::limits::COLLATERAL_BYTES_MAX;
use dstack_protocol::{RefusalCode, UnixMillis, rpc::PATH_COLLATERAL};
use dstack_runtime::clock::{Clock as _, SystemClock};

use crate::args;
use crate::cluster::{ClusterFolder, current_collateral};
use crate::failure::{Done, Failure};
use crate::files;
use crate::nodes::{NodeArguments, Nodes, block_on};
use crate::operator::OperatorKey;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Read collateral from a folder, check it, and have the cluster pin it; sent to every node.
    ///
    /// Files: *.json (a bundle, or one TDX platform's collateral as Intel's service gives it), *.pem *.der *.crt *.cer *.crl
    /// (certificates and revocation lists of other platforms). The bundle pinned is kept as current-collateral.json in the genesis
    /// folder: nodes are judged with it from then on.
    Import {
        /// The folder.
        dir: PathBuf,
        #[command(flatten)]
        nodes: NodeArguments,
        /// Key file of an operator in force.
        #[arg(long)]
        key: PathBuf,
        /// How long to go on trying.
        #[arg(long, default_value = "60s", value_parser = args::duration)]
        timeout: Duration,
    },
    /// Show the collateral that the cluster has pinned.
    Show {
        #[command(flatten)]
        nodes: NodeArguments,
    },
    /// Check the collateral of a folder under a cluster's roots, now; sends nothing.
    Check {
        /// The folder.
        dir: PathBuf,
        /// Folder that `cluster plan` made.
        #[arg(long)]
        genesis: PathBuf,
    },
    /// Fetch collateral of the genesis folder's platforms from Intel's service or a cache, check it, write it for `import`.
    Fetch {
        /// Folder that `cluster plan` made.
        #[arg(long)]
        genesis: PathBuf,
        /// Folder to write bundle.json to; made if it is not there.
        #[arg(long)]
        out: PathBuf,
        /// Base address, repeated in the order to try.
        #[arg(long = "intel", default_value = "https://api.trustedservices.intel.com")]
        intel: Vec<String>,
        /// Base address of AMD's key distribution service.
        #[arg(long, default_value = "https://kdsintf.amd.com")]
        amd: String,
        /// An AMD product whose chain and revocation list are wanted, such as Milan or Genoa; repeat it.
        #[arg(long = "amd-product")]
        products: Vec<String>,
        /// Folder with certificates whose issuers and revocation lists are wanted, as the certificates themselves name them.
        #[arg(long)]
        follow: Option<PathBuf>,
        /// Another platform to ask for: FMSPC, 12 hex digits.
        #[arg(long = "fmspc", value_parser = fmspc)]
        more: Vec<[u8; 6]>,
    },
}

fn fmspc(text: &str) -> Result<[u8; 6], String> {
    let mut out = [0; 6];
    hex::decode_to_slice(text, &mut out).map_err(|_| format!("want 12 hex digits, got {text}"))?;
    Ok(out)
}

pub(crate) fn run(command: Command) -> Done {
    match command {
        Command::Import { dir, nodes, key, timeout } => import(&dir, &nodes, &key, timeout),
        Command::Show { nodes } => show(&nodes),
        Command::Check { dir, genesis } => check(&dir, &genesis),
        Command::Fetch { genesis, out, intel, amd, products, follow, more } => {
            let others = Others { amd, products, follow };
            fetch(&genesis, &out, &intel, &others, more.into_iter().collect())
        }
    }
}

const FETCH_AGAIN: &str = "fetch collateral again; `dstack collateral check` names what is wrong";

fn now() -> UnixMillis {
    SystemClock::new().now()
}

fn read(dir: &Path) -> Result<(BTreeMap<[u8; 6], TdxCollateral>, X509Pool), Failure> {
    read_folder(dir).map_err(|error| Failure::wrong(error.to_string(), "`dstack collateral import --help` lists the files"))
}

/// `base` with the folder's files, verified under the cluster's roots now.
fn checked(folder: &ClusterFolder, base: &CollateralBundle, dir: &Path) -> Result<CollateralBundle, Failure> {
    let (tdx, pool) = read(dir)?;
    let merged = merge(base, tdx, &pool, now()).map_err(|error| Failure::wrong(error.to_string(), FETCH_AGAIN))?;
    whole(&merged, folder)?;
    Ok(merged)
}

/// Verifies a bundle and its pool under the cluster's roots now; all findings of the pool are told at once.
fn whole(bundle: &CollateralBundle, folder: &ClusterFolder) -> Result<(), Failure> {
    bundle.check(now(), &folder.roots).map_err(|error| Failure::wrong(format!("{}: {error}", error.class().as_str()), FETCH_AGAIN))?;
    let findings = bundle.x509().check(now(), &folder.roots);
    if findings.is_empty() {
        return Ok(());
    }
    let text = findings.iter().fold(String::new(), |mut text, finding| {
        let _infallible = writeln!(text, "finding={finding}");
        text
    });
    let what = format!("{} of the certificates and revocation lists may not be pinned", findings.len());
    Err(Failure::wrong(what, "leave those out, or bring the issuers they lack").with_stdout(text))
}

fn check(dir: &Path, genesis: &Path) -> Done {
    let folder = ClusterFolder::load(genesis)?;
    let (tdx, pool) = read(dir)?;
    let own = CollateralBundle::compose(&tdx, &pool).map_err(|error| Failure::wrong(error.to_string(), FETCH_AGAIN))?;
    whole(&own, &folder)?;
    Ok(described(&own))
}

/// What is fetched for other platforms than TDX.
struct Others {
    amd: String,
    products: Vec<String>,
    follow: Option<PathBuf>,
}

impl Others {
    fn pool(&self, failures: &mut Vec<FetchError>) -> Result<X509Pool, Failure> {
        let mut certificates = Vec::new();
        let mut crls = Vec::new();
        let kds = Endpoint::parse(&self.amd).map_err(|error| Failure::usage(error.to_string(), "give https://host[:port]"))?;
        for product in &self.products {
            match Kds::new(Http::default(), kds.clone()).product(product, KeyOf::Chip) {
                Ok(pool) => {
                    certificates.extend(pool.certificates);
                    crls.extend(pool.crls);
                }
                Err(error) => failures.push(error),
            }
        }
        if let Some(dir) = &self.follow {
            let (_, named) = read(dir)?;
            let (pool, failed) = follow(&Http::default(), &LinkHosts::any(), &named.certificates, &[]);
            failures.extend(failed);
            certificates.extend(named.certificates.into_iter().chain(pool.certificates));
            crls.extend(named.crls.into_iter().chain(pool.crls));
        }
        X509Pool::new(certificates, crls).map_err(|error| Failure::wrong(error.to_string(), FETCH_AGAIN))
    }
}

fn fetch(genesis: &Path, out: &Path, intel: &[String], others: &Others, more: BTreeSet<[u8; 6]>) -> Done {
    let folder = ClusterFolder::load(genesis)?;
    let wrong = |error: FetchError| Failure::usage(error.to_string(), "give https://host[:port]");
    let endpoints = intel.iter().map(|url| Endpoint::parse(url).map(|endpoint| Intel::new(Http::default(), endpoint)));
    let endpoints = endpoints.collect::<Result<Vec<_>, _>>().map_err(wrong)?;
    let refreshed = refresh(&folder.collateral, &more, &endpoints, &folder.roots, now());
    let mut refreshed = refreshed.map_err(|error| Failure::unable(error.to_string(), "drop platforms that are not used"))?;
    let pool = others.pool(&mut refreshed.failures)?;
    if !pool.is_empty() {
        let base = refreshed.bundle.as_ref().unwrap_or(&folder.collateral);
        let merged = merge(base, BTreeMap::new(), &pool, now()).map_err(|error| Failure::wrong(error.to_string(), FETCH_AGAIN))?;
        refreshed.bundle = Some(merged);
    }
    let mut text = String::new();
    for failure in &refreshed.failures {
        let _infallible = writeln!(text, "failed={failure}");
    }
    let Some(bundle) = refreshed.bundle else {
        return match refreshed.unanswered.is_empty() {
            true => Ok(format!("{text}state=unchanged\n")),
            false => {
                Err(Failure::unable("no endpoint gave what is newer", "see the reasons above; name a cache with --intel").with_stdout(text))
            }
        };
    };
    std::fs::create_dir_all(out).map_err(|error| Failure::unable(format!("cannot make {}: {error}", out.display()), "check the path"))?;
    files::replace(&out.join("bundle.json"), bundle.bytes())?;
    Ok(format!("{text}{}state=fetched\n", described(&bundle)))
}

fn show(arguments: &NodeArguments) -> Done {
    let nodes = Nodes::new(arguments)?;
    block_on(async { in_force(&nodes, Duration::from_secs(20)).await }).map(|bundle| described(&bundle))
}

/// The bundle that the cluster has pinned, as a node gives it; what it says is checked by its signatures.
async fn in_force(nodes: &Nodes, timeout: Duration) -> Result<CollateralBundle, Failure> {
    let answer = nodes.get_any(PATH_COLLATERAL, timeout).await.map_err(|error| error.failure())?;
    CollateralBundle::parse(&answer.body).map_err(|error| Failure::wrong(format!("a node's bundle: {error}"), "ask another node"))
}

fn import(dir: &Path, arguments: &NodeArguments, key: &Path, timeout: Duration) -> Done {
    let key = OperatorKey::load(key)?;
    let mut folder = ClusterFolder::load(&arguments.genesis)?;
    // What is brought judges the nodes as well: the folder's own may be over, which is why this is done.
    folder.collateral = checked(&folder, &folder.collateral, dir)?;
    let nodes = Nodes::of(folder, arguments)?;
    let (bundle, state) = block_on(async {
        let base = in_force(&nodes, timeout).await?;
        let bundle = checked(&nodes.folder, &base, dir)?;
        let pin = Pin { dropped: Vec::new(), bundle: bundle.bytes().to_vec() };
        if pin.bundle.len() > COLLATERAL_BYTES_MAX {
            return Err(Failure::wrong(format!("the bundle has {} bytes", pin.bundle.len()), "import fewer platforms"));
        }
        let request = key.bring(&nodes.folder.cluster_id, pin);
        let state = match nodes.bring(&request, timeout).await {
            Ok(()) => "pinned",
            Err(error) if error.0 == Some(RefusalCode::CollateralUnchanged) => "unchanged",
            Err(error) => return Err(error.1),
        };
        Ok((bundle, state))
    })?;
    files::replace(&current_collateral(&arguments.genesis), bundle.bytes())?;
    Ok(format!("{}state={state}\n", described(&bundle)))
}

/// One line for each platform.
fn described(bundle: &CollateralBundle) -> String {
    let mut text = format!("collateral_id={}\n", hex::encode(bundle.id()));
    for (fmspc, facts) in bundle.facts() {
        let _infallible = writeln!(
            text,
            "platform={} tcb_evaluation={} qe_evaluation={} issued_ms={} next_update_ms={}",
            hex::encode(fmspc),
            facts.tcb_evaluation,
            facts.qe_evaluation,
            facts.issued().0,
            facts.next_update.0
        );
    }
    let _infallible = writeln!(text, "certificates={} crls={}", bundle.x509().certificates.len(), bundle.x509().crls.len());
    text
}
