//! Guarded threads that parse and judge certificates. Owns: the threads, their bounded queue, the catch of a panic.
//! Never: state across jobs.
//! Source: architecture.md §6: parsers of foreign bytes must not take down the process. Panic hooks of our binaries
//! know these threads by their name.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::runtime::{Handle, RuntimeFlavor};

use crate::error::RatlsError;
use crate::judge::JudgeError;
use crate::metrics;

/// Prefix of the threads' names.
pub(crate) const THREAD_NAME_PREFIX: &str = "guarded-ratls-";
/// Jobs that may wait. More would only wait past their handshake's timeout.
const QUEUE_MAX: usize = 256;

type Job = Box<dyn FnOnce() + Send>;

/// See the module text. Threads end when the pool is dropped.
#[derive(Debug)]
pub(crate) struct GuardedPool {
    queue: SyncSender<Job>,
}

impl GuardedPool {
    pub(crate) fn start(threads: usize) -> Result<Arc<Self>, RatlsError> {
        let (queue, jobs) = sync_channel::<Job>(QUEUE_MAX);
        let jobs = Arc::new(Mutex::new(jobs));
        for number in 0..threads.max(1) {
            let jobs = Arc::clone(&jobs);
            std::thread::Builder::new()
                .name(format!("{THREAD_NAME_PREFIX}{number}"))
                .spawn(move || work(&jobs))
                .map_err(|error| RatlsError::Threads { reason: error.to_string() })?;
        }
        Ok(Arc::new(Self { queue }))
    }

    /// Runs `job` on a guarded thread and waits for it, without starving the runtime where it has other threads.
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> Result<T, JudgeError> + Send + 'static) -> Result<T, JudgeError> {
        let (answer, answered) = sync_channel(1);
        let guarded: Job = Box::new(move || {
            // The receiver is gone only when its connection was dropped; nobody misses the answer then.
            let _ = answer.send(job());
        });
        self.queue.try_send(guarded).map_err(|error| match error {
            TrySendError::Full(_job) => JudgeError::Busy,
            TrySendError::Disconnected(_job) => JudgeError::ParserFailed,
        })?;
        // A job that panics drops its sender: the wait ends with an error.
        let wait = || answered.recv().unwrap_or(Err(JudgeError::ParserFailed));
        match Handle::try_current().map(|handle| handle.runtime_flavor()) {
            Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(wait),
            _ => wait(),
        }
    }
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    loop {
        // The lock is held while waiting, so idle threads queue on it; whoever gets a job releases it at once.
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = next else { return };
        if catch_unwind(AssertUnwindSafe(job)).is_err() {
            metrics::parser_panic();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panicking_job_is_refused_and_the_thread_lives_on() {
        // The hook of our binaries aborts on every panic but those of threads it knows by name.
        assert!(THREAD_NAME_PREFIX.starts_with(dstack_runtime::guard::THREAD_NAME_PREFIX));
        dstack_runtime::hardening::install_panic_hook();
        let pool = GuardedPool::start(1).unwrap();
        for _ in 0..3 {
            assert_eq!(pool.run(|| -> Result<(), _> { panic!("foreign bytes") }), Err(JudgeError::ParserFailed));
            assert_eq!(pool.run(|| Ok(std::thread::current().name().map(str::to_owned))), Ok(Some("guarded-ratls-0".to_owned())));
        }
    }

    #[test]
    fn a_full_queue_answers_busy() {
        const MORE: usize = 8;
        let pool = GuardedPool::start(1).unwrap();
        let (began, begun) = sync_channel::<()>(1);
        let (release, held) = sync_channel::<()>(0);
        let occupied = Arc::clone(&pool);
        let first = std::thread::spawn(move || {
            occupied.run(move || {
                began.send(()).map_err(|_gone| JudgeError::Busy)?;
                held.recv().map_err(|_gone| JudgeError::Busy)
            })
        });
        // The one thread is taken: from here on the queue only fills.
        begun.recv().unwrap();
        let (tell, told) = sync_channel(QUEUE_MAX + MORE);
        let waiting: Vec<_> = (0..QUEUE_MAX + MORE)
            .map(|_| {
                let (pool, tell) = (Arc::clone(&pool), tell.clone());
                std::thread::spawn(move || tell.send(pool.run(|| Ok(()))))
            })
            .collect();
        for _ in 0..MORE {
            assert_eq!(told.recv().unwrap(), Err(JudgeError::Busy));
        }
        release.send(()).unwrap();
        assert_eq!(first.join().unwrap(), Ok(()));
        for thread in waiting {
            thread.join().unwrap().unwrap();
        }
        drop(tell);
        assert_eq!(told.iter().collect::<Vec<_>>(), vec![Ok(()); QUEUE_MAX]);
    }
}
