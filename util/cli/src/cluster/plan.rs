//! `dstack cluster plan`: a TOML plan becomes the genesis document. Owns: the plan's form and the order of lists.
//! Source: threshold.md §1.6; the consistency rules are those of the document's decoder, which is asked.

use std::path::{Path, PathBuf};

use dstack_attest::{CollateralBundle, TrustRoots};
use dstack_protocol::genesis::{AllowedNode, Authority, CaAlgorithm, Genesis, SeatGrant, collateral_id};
use dstack_protocol::limits::{ADDRESS_BYTES_MAX, COLLATERAL_BYTES_MAX, MEASUREMENT_BYTES_MAX, MEASUREMENTS_MAX, NODES_MAX, OPERATORS_MAX};
use dstack_protocol::{Platform, Seat, UnixMillis, Wire};
use dstack_runtime::clock::{Clock as _, SystemClock};
use serde::Deserialize;

use super::folder::{COLLATERAL_FILE, GENESIS_FILE, ROOT_BYTES_MAX, root_file, with_root};
use crate::args;
use crate::failure::{Done, Failure};
use crate::files;

pub(crate) const HELP: &str = r#"A plan (paths are relative to it; hex in lower or upper case):

  timelock_s = 86400                 # 0: changes apply with their last needed approval
  collateral = "collateral.json"     # bundle for TDX; leave it out without TDX
  software_roots = []                # DER files; only for tests and demos
  # faulty = 0                       # lying signers that a head certificate tolerates
  # ca_algorithm = "ed25519"         # or "p256"; permanent

  [operators]
  k = 2                              # approvals of a change
  r = 1                              # approvals of a revocation
  keys = ["<32 bytes>", "<32 bytes>", "<32 bytes>"]

  [[seat]]                           # one for each node: 1, or 3 to 64
  address = "node-1.example:7000"
  platform = "tdx"
  platform_identity = "<PPID, 16 bytes>"

  [[allowed_node]]
  platform = "tdx"
  measurement = "<224 bytes>"

Example: dstack cluster plan --plan plan.toml --out cluster
Writes genesis.bin, collateral.json and software-root-*.der; give all of them to every node."#;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The plan, TOML.
    #[arg(long)]
    plan: PathBuf,
    /// Folder to make.
    #[arg(long)]
    out: PathBuf,
    /// The document's 32 random bytes, to make the same document again and compare; random without it.
    #[arg(long, value_parser = args::hash)]
    random: Option<[u8; 32]>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPlan {
    n: Option<u16>,
    timelock_s: u64,
    #[serde(default)]
    faulty: u16,
    collateral: Option<PathBuf>,
    #[serde(default)]
    software_roots: Vec<PathBuf>,
    ca_algorithm: Option<String>,
    operators: RawOperators,
    seat: Vec<RawSeat>,
    allowed_node: Vec<RawAllowedNode>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawOperators {
    k: u8,
    #[serde(default = "one")]
    r: u8,
    keys: Vec<String>,
}

const fn one() -> u8 {
    1
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSeat {
    address: String,
    platform: String,
    platform_identity: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAllowedNode {
    platform: String,
    measurement: String,
}

/// Everything that goes into the folder.
#[derive(Debug, PartialEq, Eq)]
struct Planned {
    genesis: Genesis,
    collateral: Vec<u8>,
    /// Name and bytes.
    roots: Vec<(String, Vec<u8>)>,
}

/// Largest plan read.
const PLAN_BYTES_MAX: usize = 1024 * 1024;

pub(crate) fn run(arguments: &Arguments) -> Done {
    let text = files::read_text(&arguments.plan, PLAN_BYTES_MAX)?;
    let random = match arguments.random {
        Some(random) => random,
        None => {
            let mut random = [0; 32];
            getrandom::fill(&mut random)
                .map_err(|error| Failure::unable(format!("no randomness: {error}"), "see the operating system's log"))?;
            random
        }
    };
    let folder = arguments.plan.parent().unwrap_or(Path::new("."));
    let planned = plan(&text, folder, random, SystemClock::new().now())?;
    if arguments.out.join(GENESIS_FILE).exists() {
        let what = format!("{} holds a genesis document already", arguments.out.display());
        return Err(Failure::unable(what, "name a new folder; another document is another cluster"));
    }
    std::fs::create_dir_all(&arguments.out)
        .map_err(|error| Failure::unable(format!("cannot make {}: {error}", arguments.out.display()), "check the path"))?;
    files::write_new(&arguments.out.join(COLLATERAL_FILE), &planned.collateral)?;
    for (name, der) in &planned.roots {
        files::replace(&arguments.out.join(name), der)?;
    }
    files::write_new(&arguments.out.join(GENESIS_FILE), &planned.genesis.encode())?;
    let Genesis { n, t, f, k, r, timelock_s, .. } = planned.genesis;
    let operators = planned.genesis.operators.len();
    let mut out = format!("cluster_id={}\n", planned.genesis.cluster_id());
    out += &format!("nodes={n} threshold={t} faulty={f} operators={operators} k={k} r={r} timelock_s={timelock_s}\n");
    if !planned.roots.is_empty() {
        out += "warning: this cluster trusts software roots; no hardware stands behind its evidence\n";
    }
    Ok(out)
}

fn plan(text: &str, folder: &Path, random: [u8; 32], now: UnixMillis) -> Result<Planned, Failure> {
    let raw: RawPlan = toml::from_str(text).map_err(|error| bad(error.to_string()))?;
    let n = u16::try_from(raw.seat.len()).ok().filter(|n| usize::from(*n) <= NODES_MAX);
    let n = n.ok_or_else(|| bad(format!("at most {NODES_MAX} seats")))?;
    if raw.n.is_some_and(|wanted| wanted != n) {
        return Err(bad(format!("n is {}, but {n} seats are listed", raw.n.unwrap_or_default())));
    }
    let collateral = match &raw.collateral {
        Some(path) => files::read(&folder.join(path), COLLATERAL_BYTES_MAX)?,
        None => CollateralBundle::empty().bytes().to_vec(),
    };
    let (trusted, roots) = software_roots(&raw.software_roots, folder)?;
    CollateralBundle::parse(&collateral)
        .and_then(|bundle| bundle.check(now, &trusted).map(|_| bundle))
        .map_err(|error| error.to_string())
        .and_then(|bundle| bundle.x509().check(now, &trusted).first().map_or(Ok(()), |finding| Err(finding.to_string())))
        .map_err(|error| Failure::wrong(format!("collateral: {error}"), "fetch fresh collateral of these platforms"))?;
    let genesis = Genesis {
        random,
        n,
        t: Genesis::threshold_for(n),
        f: raw.faulty,
        ca_algorithm: match raw.ca_algorithm.as_deref() {
            None | Some("ed25519") => CaAlgorithm::Ed25519,
            Some("p256") => CaAlgorithm::P256,
            Some(other) => return Err(bad(format!("ca_algorithm {other}: want ed25519 or p256"))),
        },
        authority: Authority::OperatorQuorum,
        chain_settings: Vec::new(),
        k: raw.operators.k,
        r: raw.operators.r,
        timelock_s: raw.timelock_s,
        operators: operators(&raw.operators.keys)?,
        allowed_nodes: allowed_nodes(&raw.allowed_node)?,
        software_roots: roots.iter().map(|(spki_sha256, _)| *spki_sha256).collect(),
        seats: (1..=n).map(Seat).zip(&raw.seat).map(|(number, raw)| seat(number, raw)).collect::<Result<_, _>>()?,
        collateral_id: collateral_id(&collateral),
    };
    // The rules of a genesis document are those of its decoder.
    let genesis = Genesis::decode(&genesis.encode()).map_err(|error| bad(error.to_string()))?;
    let roots = roots.into_iter().map(|(spki_sha256, der)| (root_file(&spki_sha256), der)).collect();
    Ok(Planned { genesis, collateral, roots })
}

fn bad(why: impl Into<String>) -> Failure {
    Failure::wrong(format!("plan: {}", why.into()), "mend the plan; `dstack cluster plan --help` shows its form")
}

/// A root's name, the SHA-256 of its key, and its certificate.
type NamedRoot = ([u8; 32], Vec<u8>);

/// All roots that count, and the software roots by name, ascending.
fn software_roots(paths: &[PathBuf], folder: &Path) -> Result<(TrustRoots, Vec<NamedRoot>), Failure> {
    if paths.len() > usize::from(u8::MAX) {
        return Err(bad("at most 255 software roots"));
    }
    let mut trusted = TrustRoots::production();
    for path in paths {
        trusted = with_root(trusted, &folder.join(path))?;
    }
    let mut named: Vec<_> =
        trusted.iter().filter(|root| root.is_software()).map(|root| (*root.spki_sha256(), root.der().to_vec())).collect();
    debug_assert!(named.iter().all(|(_, der)| der.len() <= ROOT_BYTES_MAX));
    named.sort();
    named.dedup_by_key(|(spki_sha256, _)| *spki_sha256);
    Ok((trusted, named))
}

fn operators(keys: &[String]) -> Result<Vec<[u8; 32]>, Failure> {
    if keys.len() > OPERATORS_MAX {
        return Err(bad(format!("at most {OPERATORS_MAX} operators")));
    }
    let mut parsed = Vec::new();
    for key in keys {
        let bytes = args::hash(key).map_err(|why| bad(format!("operator key {key}: {why}")))?;
        let usable = ed25519_dalek::VerifyingKey::from_bytes(&bytes).is_ok_and(|key| !key.is_weak());
        if !usable {
            return Err(bad(format!("operator key {key}: not an Ed25519 public key")));
        }
        parsed.push(bytes);
    }
    parsed.sort_unstable();
    if parsed.windows(2).any(|pair| pair.first() == pair.last()) {
        return Err(bad("an operator key stands twice"));
    }
    Ok(parsed)
}

fn allowed_nodes(raw: &[RawAllowedNode]) -> Result<Vec<AllowedNode>, Failure> {
    if raw.is_empty() || raw.len() > MEASUREMENTS_MAX {
        return Err(bad(format!("1 to {MEASUREMENTS_MAX} allowed_node entries")));
    }
    let mut nodes = Vec::new();
    for node in raw {
        let platform = args::platform(&node.platform).map_err(|why| bad(format!("platform {}: {why}", node.platform)))?;
        let measurement = args::hex_bytes(&node.measurement).map_err(|why| bad(format!("measurement: {why}")))?;
        let want = match platform {
            Platform::Tdx => Some(224),
            Platform::Nitro => Some(144),
            _ => None,
        };
        if want.is_some_and(|want| want != measurement.len()) || measurement.len() > MEASUREMENT_BYTES_MAX {
            let want = want.map_or_else(|| format!("at most {MEASUREMENT_BYTES_MAX}"), |want| want.to_string());
            return Err(bad(format!("measurement of {}: {} bytes, want {want}", platform.name(), measurement.len())));
        }
        nodes.push(AllowedNode { platform, measurement });
    }
    nodes.sort();
    nodes.dedup();
    Ok(nodes)
}

fn seat(seat: Seat, raw: &RawSeat) -> Result<SeatGrant, Failure> {
    let platform = args::platform(&raw.platform).map_err(|why| bad(format!("seat {seat}: platform {}: {why}", raw.platform)))?;
    let platform_identity = args::hex_bytes(&raw.platform_identity).map_err(|why| bad(format!("seat {seat}: platform_identity: {why}")))?;
    if platform_identity.len() != platform.identity_bytes() {
        let (got, want) = (platform_identity.len(), platform.identity_bytes());
        return Err(bad(format!("seat {seat}: platform_identity of {} has {got} bytes, want {want}", platform.name())));
    }
    if raw.address.len() > ADDRESS_BYTES_MAX || !has_port(&raw.address) {
        return Err(bad(format!("seat {seat}: address {}: want host:port", raw.address)));
    }
    Ok(SeatGrant { seat, address: raw.address.clone(), platform_identity })
}

fn has_port(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0))
}
