//! `kill`: a child writes and acknowledges over a pipe, is killed with SIGKILL at a random moment, its files are checked, again.
//!
//! Even cases write one operation at a time, odd ones keep up to `IN_FLIGHT_MAX` in a [`LogWriter`].

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use dstack_storage::{EngineKind, LogWriter};

use crate::arguments::{Arguments, Seeded, median_and_max};
use crate::files::TempDir;
use crate::model::{Model, Operation, audit_entry, check, execute, open_segments, open_store};

/// Kills `count` children.
pub(crate) fn run(arguments: &Arguments) -> Result<(), String> {
    let dir = TempDir::new(Some(&arguments.dir.clone().unwrap_or_else(std::env::temp_dir)))?;
    let (mut held, mut acknowledged_total, mut in_flight, mut reopen_ms) = (0, 0u64, 0u64, Vec::new());
    for case in 0..arguments.count {
        let mut writer = Writer::start(arguments.engine, dir.path(), arguments.seed, case, held)?;
        let mut seeded = Seeded::new(arguments.seed ^ 0x4b11, case);
        std::thread::sleep(Duration::from_millis(5u64.saturating_add(seeded.below(115))));
        let acknowledged = writer.kill()?;
        let begun = Instant::now();
        let now = check(arguments.engine, dir.path(), arguments.seed, acknowledged, ahead_max(case))
            .map_err(|error| format!("kill {case} of seed {}: {error}", arguments.seed))?;
        reopen_ms.push(begun.elapsed().as_millis());
        acknowledged_total = acknowledged_total.saturating_add(acknowledged.saturating_sub(held));
        in_flight = in_flight.saturating_add(u64::from(now > acknowledged));
        held = now;
    }
    let (median, max) = median_and_max(reopen_ms);
    println!(
        "kill engine={} kills={} acknowledged={acknowledged_total} unacknowledged_but_whole={in_flight} lost=0 reopen_and_check_ms_p50={median} max={max} seed={}",
        arguments.engine, arguments.count, arguments.seed
    );
    Ok(())
}

/// How many unacknowledged operations may be on disk.
pub(crate) fn ahead_max(case: u64) -> u64 {
    if is_pipelined(case) { IN_FLIGHT_MAX.saturating_add(1) } else { 1 }
}

fn is_pipelined(case: u64) -> bool {
    case % 2 == 1
}

/// A child process that writes.
pub(crate) struct Writer {
    child: Child,
    acknowledged: mpsc::Receiver<u64>,
    newest: u64,
}

impl Writer {
    /// Starts a child that goes on after `held` operations, and waits until its store is open.
    pub(crate) fn start(engine: EngineKind, dir: &Path, seed: u64, case: u64, held: u64) -> Result<Self, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut child = Command::new(program)
            .args(["kill-child", "--engine", engine.as_str(), "--seed", &seed.to_string()])
            .args(["--from", &held.to_string(), "--count", &case.to_string(), "--dir"])
            .arg(dir)
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let lines = BufReader::new(child.stdout.take().ok_or("no pipe")?).lines();
        let (sender, acknowledged) = mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                // A line that was cut by the kill is no number, or a smaller one.
                if let Ok(number) = line.parse::<u64>()
                    && sender.send(number).is_err()
                {
                    break;
                }
            }
        });
        let newest = acknowledged.recv_timeout(Duration::from_secs(60)).map_err(|_| "child did not open its store in 60 s")?;
        Ok(Self { child, acknowledged, newest })
    }

    /// How many operations are known to be acknowledged at this moment.
    pub(crate) fn acknowledged_now(&mut self) -> u64 {
        self.newest = self.acknowledged.try_iter().fold(self.newest, u64::max);
        self.newest
    }

    /// Kills it and answers how many operations it acknowledged.
    pub(crate) fn kill(&mut self) -> Result<u64, String> {
        self.child.kill().map_err(|error| error.to_string())?;
        self.child.wait().map_err(|error| error.to_string())?;
        for number in self.acknowledged.iter() {
            self.newest = self.newest.max(number);
        }
        Ok(self.newest)
    }
}

/// The child: writes until it is killed, or until its disk is gone (then it exits quietly: the parent counts acknowledgements).
pub(crate) fn child(arguments: &Arguments) -> Result<(), String> {
    let dir = arguments.dir.as_deref().ok_or("--dir is missing")?;
    let (seed, mut number) = (arguments.seed, arguments.from);
    let mut model = Model::after(seed, number);
    let store = Arc::new(open_store(arguments.engine, dir)?);
    let mut segments = open_segments(dir)?;
    // What a state machine does after a crash: apply again; positions that are there are skipped.
    for position in segments.next_position().saturating_sub(3)..number {
        segments.append(&[(position, audit_entry(seed, position))]).map_err(|error| error.to_string())?;
    }
    acknowledge(number);
    let writer = LogWriter::start(Arc::clone(&store), 1024).map_err(|error| error.to_string())?;
    let mut waiting: VecDeque<mpsc::Receiver<Result<(), String>>> = VecDeque::new();
    let mut done = number;
    loop {
        let operation = model.operation(seed, number);
        model.apply(&operation);
        number = number.saturating_add(1);
        let in_flight_max = if is_pipelined(arguments.count) { IN_FLIGHT_MAX } else { 1 };
        match &operation {
            Operation::Change(change) => {
                let (sender, receiver) = mpsc::channel();
                writer
                    .submit(change.clone(), move |result| {
                        let _parent_of_the_channel_waits = sender.send(result.map_err(|error| error.to_string()));
                    })
                    .map_err(|error| error.to_string())?;
                waiting.push_back(receiver);
            }
            Operation::Snapshot(..) => {
                finish(&mut waiting, 0, seed, &mut done, &mut segments)?;
                execute(&store, &operation)?;
                let (sender, receiver) = mpsc::channel();
                sender.send(Ok(())).map_err(|error| error.to_string())?;
                waiting.push_back(receiver);
            }
        }
        finish(&mut waiting, in_flight_max.saturating_sub(1), seed, &mut done, &mut segments)?;
    }
}

/// Waits until no more than `left` operations are in flight; acknowledges each when its audit entry is durable too.
fn finish(
    waiting: &mut VecDeque<mpsc::Receiver<Result<(), String>>>,
    left: u64,
    seed: u64,
    done: &mut u64,
    segments: &mut dstack_storage::Segments,
) -> Result<(), String> {
    while u64::try_from(waiting.len()).unwrap_or(u64::MAX) > left {
        let Some(receiver) = waiting.pop_front() else { break };
        receiver.recv().map_err(|error| error.to_string())??;
        segments.append(&[(*done, audit_entry(seed, *done))]).map_err(|error| error.to_string())?;
        *done = done.saturating_add(1);
        acknowledge(*done);
    }
    Ok(())
}

fn acknowledge(number: u64) {
    let mut out = std::io::stdout().lock();
    let _parent_may_be_gone = writeln!(out, "{number}").and_then(|()| out.flush());
}

const IN_FLIGHT_MAX: u64 = 8;
