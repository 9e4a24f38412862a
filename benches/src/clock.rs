//! Processor time as criterion's measurement. Owns: the clock. Never: counts what other processes do, so that a busy machine
//! spoils a figure only through caches and clock rate.

use std::time::Duration;

use cpu_time::ProcessTime;
use criterion::Throughput;
use criterion::measurement::{Measurement, ValueFormatter, WallTime};

/// Processor time of this process, all threads.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuTime;

impl Measurement for CpuTime {
    type Intermediate = ProcessTime;
    type Value = Duration;

    fn start(&self) -> ProcessTime {
        ProcessTime::now()
    }

    fn end(&self, begun: ProcessTime) -> Duration {
        begun.elapsed()
    }

    fn add(&self, one: &Duration, other: &Duration) -> Duration {
        *one + *other
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        // A sample is never shorter than the clock's step: criterion divides by it.
        value.as_nanos().max(1) as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        &Cpu
    }
}

/// Wall time's units, with the word that says which clock it is.
struct Cpu;

impl ValueFormatter for Cpu {
    fn format_value(&self, value: f64) -> String {
        format!("{} cpu", WallTime.formatter().format_value(value))
    }

    fn scale_values(&self, typical: f64, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_values(typical, values)
    }

    fn scale_throughputs(&self, typical: f64, throughput: &Throughput, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_throughputs(typical, throughput, values)
    }

    fn scale_for_machines(&self, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_for_machines(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeping_costs_nothing_and_work_something() {
        let idle = CpuTime.start();
        std::thread::sleep(Duration::from_millis(50));
        let idle = CpuTime.end(idle);
        let busy = CpuTime.start();
        let mut sum = 0u64;
        while CpuTime.end(busy) < Duration::from_millis(60) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(idle < Duration::from_millis(45), "{idle:?}");
        assert!(sum > 0);
    }
}
