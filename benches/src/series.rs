//! Many requests by several clients at once: how long each took and what went wrong. Owns: the shared count, the end, percentiles.
//! Never: a request; more than it was told.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How one series ended.
#[derive(Debug, Default)]
pub struct Series {
    /// Of the requests that succeeded, in order.
    pub latencies: Vec<Duration>,
    /// Codes of those that did not.
    pub failures: Vec<&'static str>,
    /// From the first to the last.
    pub took: Duration,
}

impl Series {
    /// Latency that `percent` of the requests do not exceed.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Duration {
        let at = (self.latencies.len() * percent).div_ceil(100).saturating_sub(1);
        self.latencies.get(at).copied().unwrap_or_default()
    }

    /// Requests that succeeded, a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.latencies.len() as f64 / self.took.as_secs_f64()
    }
}

/// Has each of `clients` repeat `request` until all together began `requests` of them, or `patience` is over.
pub async fn run<C, F, R>(clients: Vec<C>, requests: usize, patience: Duration, request: F) -> Series
where
    C: Send + 'static,
    F: Fn(C) -> R + Clone + Send + 'static,
    R: Future<Output = (C, Result<(), &'static str>)> + Send,
{
    let left = Arc::new(AtomicUsize::new(requests));
    let begun = Instant::now();
    let until = begun + patience;
    let one = |mut client: C| {
        let (left, request) = (Arc::clone(&left), request.clone());
        tokio::spawn(async move {
            let (mut latencies, mut failures) = (Vec::new(), Vec::new());
            while Instant::now() < until && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                let (began, outcome);
                began = Instant::now();
                (client, outcome) = request(client).await;
                match outcome {
                    Ok(()) => latencies.push(began.elapsed()),
                    Err(code) => failures.push(code),
                }
            }
            (latencies, failures)
        })
    };
    let tasks: Vec<_> = clients.into_iter().map(one).collect();
    let mut series = Series::default();
    for task in tasks {
        let (mut latencies, mut failures) = task.await.unwrap();
        series.latencies.append(&mut latencies);
        series.failures.append(&mut failures);
    }
    series.took = begun.elapsed();
    series.latencies.sort_unstable();
    series
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn requests_are_counted_over_all_clients() {
        let series = run(vec![0_usize, 1, 2], 10, Duration::from_secs(60), |client| async move {
            (client, if client == 2 { Err("no") } else { Ok(()) })
        });
        let series = series.await;
        assert_eq!(series.latencies.len() + series.failures.len(), 10);
        let none = run(vec![()], 10, Duration::ZERO, |()| async { ((), Ok(())) }).await;
        assert_eq!(none.latencies.len(), 0);
    }

    #[test]
    fn percentiles_are_those_of_the_ordered_list() {
        let series = Series { latencies: (1..=200).map(Duration::from_millis).collect(), ..Series::default() };
        assert_eq!((series.percentile(50), series.percentile(99)), (Duration::from_millis(100), Duration::from_millis(198)));
    }
}
