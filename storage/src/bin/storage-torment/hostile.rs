//! `hostile`: damaged files of a stopped node, opened in a child process with limited memory and time. `forged`: the same, the engine's
//! own checksums made right again where that is known how ([`crate::forge`]).
//!
//! Allowed outcomes: a typed error, or exactly the data that was written. An image that opens is also written to and opened again.
//! Counted as failures: other data, a process that dies (signal, abort, memory), a hang. A panic inside an engine that comes back as a
//! typed error is an error, but counted by itself.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use dstack_storage::{EngineConfig, EngineError, LogEntry, LogStore, StoreError, open_engine};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::arguments::{Arguments, Seeded};
use crate::files::{Image, TempDir, read, write};
use crate::model::{Model, execute, key, open_store};
use crate::mutate::mutate;

/// Tries `count` images.
pub(crate) fn run(arguments: &Arguments) -> Result<(), String> {
    let begun = Instant::now();
    let dir = TempDir::new(arguments.dir.as_deref())?;
    make_golden(arguments, dir.path())?;
    let end = arguments.from.saturating_add(arguments.count);
    let mut next = arguments.from;
    let mut tally: BTreeMap<String, u64> = BTreeMap::new();
    let mut failures = Vec::new();
    while next < end {
        let to = end.min(next.saturating_add(IMAGES_PER_CHILD));
        let mut child = Opener::start(arguments, dir.path(), next, to)?;
        while next < to {
            let outcome = child.next_outcome();
            if FAILURES.iter().any(|failure| outcome.starts_with(failure)) {
                let kept = keep(arguments, dir.path(), next)?;
                failures.push(format!("{outcome}\n  replay: storage-torment open --engine {} --dir {kept}", arguments.engine));
                eprintln!("{}", failures.last().map_or("", String::as_str));
            }
            let class = outcome.split(':').next().unwrap_or_default().to_owned();
            let gone = class == "died" || class == "hang";
            let seen = tally.entry(class).or_default();
            *seen = seen.saturating_add(1);
            next = next.saturating_add(1);
            if gone {
                break;
            }
        }
    }
    let counts: Vec<String> = tally.iter().map(|(class, count)| format!("{class}={count}")).collect();
    println!(
        "{} engine={} images={} {} seed={} from={} seconds={}",
        arguments.command,
        arguments.engine,
        arguments.count,
        counts.join(" "),
        arguments.seed,
        arguments.from,
        begun.elapsed().as_secs()
    );
    if failures.is_empty() { Ok(()) } else { Err(format!("{} of {} images", failures.len(), arguments.count)) }
}

/// Writes the image of a failed case anew, where it stays: nonces are random, so the same seed gives other files the next time.
fn keep(arguments: &Arguments, dir: &Path, case: u64) -> Result<String, String> {
    let (image, story) = damaged(arguments, &read(&dir.join("golden"))?, case);
    let kept =
        std::env::temp_dir().join(format!("storage-torment-failed-{}-{}-{}-{case}", arguments.command, arguments.engine, arguments.seed));
    write(&kept, &image)?;
    Ok(format!("{}  # {story}", kept.display()))
}

/// The image of `case`, and what was done to it.
fn damaged(arguments: &Arguments, golden: &Image, case: u64) -> (Image, String) {
    let mut seeded = Seeded::new(arguments.seed ^ 0x4057, case);
    let mut image = golden.clone();
    let story = mutate(&mut image, arguments.command.starts_with("forged"), &mut seeded);
    (image, story)
}

/// `open`: opens one kept image, in this process, without a time limit.
pub(crate) fn open_one(arguments: &Arguments) -> Result<(), String> {
    let store = open(arguments, arguments.dir.as_deref().ok_or("--dir is missing")?).map_err(|error| error.to_string())?;
    println!("opened: commit {}, log ends at {:?}", store.sequence(), store.last());
    Ok(())
}

/// A stopped node's files, and what they hold.
fn make_golden(arguments: &Arguments, dir: &Path) -> Result<(), String> {
    let work = dir.join("golden");
    std::fs::create_dir_all(&work).map_err(|error| error.to_string())?;
    let store = open_store(arguments.engine, &work)?;
    let mut model = Model::default();
    for number in 0..GOLDEN_OPERATIONS {
        let operation = model.operation(arguments.seed, number);
        model.apply(&operation);
        execute(&store, &operation)?;
    }
    Ok(())
}

/// A child that opens images and prints one outcome a line.
struct Opener {
    child: Child,
    outcomes: mpsc::Receiver<String>,
}

impl Opener {
    fn start(arguments: &Arguments, dir: &Path, from: u64, to: u64) -> Result<Self, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let command = format!("{}-child", arguments.command);
        let mut child = Command::new(program)
            .args([command.as_str(), "--engine", arguments.engine.as_str(), "--seed", &arguments.seed.to_string()])
            .args(["--from", &from.to_string(), "--count", &to.saturating_sub(from).to_string()])
            .args(["--memory-mib", &arguments.memory_mib.to_string(), "--dir"])
            .arg(dir)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| error.to_string())?;
        let lines = BufReader::new(child.stdout.take().ok_or("no pipe")?).lines();
        let (sender, outcomes) = mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, outcomes })
    }

    /// The next line. A child that used [`IMAGE_CPU_MAX`] for one image loops; one that says nothing for [`IMAGE_TIME_MAX`] waits for ever.
    fn next_outcome(&mut self) -> String {
        let begun = Instant::now();
        let cpu_before = cpu_time(self.child.id());
        loop {
            match self.outcomes.recv_timeout(Duration::from_secs(1)) {
                Ok(outcome) => return outcome,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let cpu = cpu_time(self.child.id()).saturating_sub(cpu_before);
                    if cpu > IMAGE_CPU_MAX || begun.elapsed() > IMAGE_TIME_MAX {
                        let _it_is_gone_either_way = self.child.kill();
                        return format!("hang: no outcome after {} s, {} s of them computing", begun.elapsed().as_secs(), cpu.as_secs());
                    }
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return match self.child.wait() {
                        Ok(status) => format!("died: {status}"),
                        Err(error) => format!("died: {error}"),
                    };
                }
            }
        }
    }
}

/// Processor time of a process, from `/proc` (in ticks of 10 ms, as on every Linux this runs on).
fn cpu_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks: u64 = after_name.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks.saturating_mul(10))
}

impl Drop for Opener {
    fn drop(&mut self) {
        let _it_is_gone_either_way = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// The child: opens images `from..from + count` and prints an outcome for each.
pub(crate) fn child(arguments: &Arguments) -> Result<(), String> {
    if arguments.memory_mib > 0 {
        let bytes = arguments.memory_mib.saturating_mul(1 << 20);
        let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
        setrlimit(Resource::As, limit).map_err(|error| error.to_string())?;
    }
    std::panic::set_hook(Box::new(|_| {
        PANICS.fetch_add(1, Ordering::Relaxed);
    }));
    let dir = arguments.dir.as_deref().ok_or("--dir is missing")?;
    let golden = read(&dir.join("golden"))?;
    let expected = Model::after(arguments.seed, GOLDEN_OPERATIONS);
    for case in arguments.from..arguments.from.saturating_add(arguments.count) {
        let (image, story) = damaged(arguments, &golden, case);
        let work = dir.join(format!("case-{case}"));
        let outcome = attempt(arguments, &work, &image, &golden, &expected);
        std::fs::remove_dir_all(&work).map_err(|error| error.to_string())?;
        println!("{outcome}  <- {story}");
    }
    Ok(())
}

fn attempt(arguments: &Arguments, work: &Path, image: &Image, golden: &Image, expected: &Model) -> String {
    let panics = PANICS.load(Ordering::Relaxed);
    if let Err(error) = write(work, image) {
        return format!("trial-failed: {error}");
    }
    let outcome = open_and_use(arguments, work, expected);
    let panicked = PANICS.load(Ordering::Relaxed) > panics;
    match outcome {
        Ok(()) if image == golden => "same: the mutation changed nothing".to_owned(),
        Ok(()) if panicked => "authentic-after-panic: a background thread panicked".to_owned(),
        Ok(()) => "authentic: opened, read, written, opened again".to_owned(),
        Err(Refused::Error(StoreError::Engine(EngineError::Panicked { detail }))) => format!("panic-caught: {detail}").replace('\n', " "),
        Err(Refused::Error(error)) => format!("{}: {error}", class(&error)).replace('\n', " "),
        Err(Refused::Wrong(detail)) => format!("wrong-data: {detail}"),
    }
}

enum Refused {
    Error(StoreError),
    Wrong(&'static str),
}

impl From<StoreError> for Refused {
    fn from(error: StoreError) -> Self {
        Self::Error(error)
    }
}

fn open_and_use(arguments: &Arguments, work: &Path, expected: &Model) -> Result<(), Refused> {
    let store = open(arguments, work)?;
    let last = store.last();
    match Model::of(&store) {
        Ok(found) if found == *expected => {}
        Ok(_) => return Err(Refused::Wrong("a store that opened holds other data")),
        Err(_) => return Err(Refused::Wrong("a store that opened cannot be read")),
    }
    let first = last.map_or(0, |last| last.index.saturating_add(1));
    let term = last.map_or(0, |last| last.term);
    let mut written = Vec::new();
    for index in first..first.saturating_add(20) {
        let entry = LogEntry { index, term, payload: vec![7; 700] };
        store.append(std::slice::from_ref(&entry))?;
        written.push(entry);
    }
    drop(store);
    let store = open(arguments, work)?;
    let found = store.read_range(first, u64::MAX, dstack_storage::Page::SCAN)?;
    if found == written { Ok(()) } else { Err(Refused::Wrong("what was appended is not what is there")) }
}

/// As `LogStore::open`, but in this thread: the parent watches the time.
fn open(arguments: &Arguments, work: &Path) -> Result<LogStore, StoreError> {
    let dir = work.join("store");
    let config = EngineConfig { reserve_bytes: 0, cache_bytes: 8 << 20, ..EngineConfig::new(arguments.engine, dir.join("engine")) };
    LogStore::on_engine(open_engine(&config)?, &key(), Some(&dir.join("anchor")))
}

fn class(error: &StoreError) -> &'static str {
    match error {
        StoreError::Engine(EngineError::Corrupt { .. }) => "engine-corrupt",
        StoreError::Engine(EngineError::Io { .. }) => "engine-io",
        StoreError::Engine(_) => "engine-other",
        StoreError::Tampered { .. } => "tampered",
        StoreError::TreeChanged { .. } => "tree-changed",
        StoreError::SteppedBack { .. } => "stepped-back",
        StoreError::Anchor { .. } => "anchor",
        StoreError::Gap { .. } => "gap",
        StoreError::Version { .. } => "version",
        _ => "other-error",
    }
}

static PANICS: AtomicU64 = AtomicU64::new(0);
const FAILURES: [&str; 4] = ["wrong-data", "died", "hang", "trial-failed"];
const GOLDEN_OPERATIONS: u64 = 60;
const IMAGES_PER_CHILD: u64 = 100;
const IMAGE_CPU_MAX: Duration = Duration::from_secs(15);
const IMAGE_TIME_MAX: Duration = Duration::from_secs(120);
