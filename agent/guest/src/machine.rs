//! The machine, as the kernel describes it. Owns: reading /proc, os-release and file systems for `SysInfo` and the pages.
//! Never: fails; what cannot be read is empty or zero.
//! Source: guest API reference §6, §11.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use dstack_prpc::host::{DiskInfo, SystemInfo};

/// Largest of these files that is read, bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What is known now.
#[must_use]
pub fn system_info(data_disks: &[PathBuf]) -> SystemInfo {
    let release = read("/etc/os-release");
    let memory = read("/proc/meminfo");
    let processors = read("/proc/cpuinfo");
    let kib = |name: &str| {
        field(&memory, name, ':').and_then(|text| text.trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024)
    };
    let (total_memory, free_memory, available_memory) = (kib("MemTotal"), kib("MemFree"), kib("MemAvailable"));
    let (total_swap, free_swap) = (kib("SwapTotal"), kib("SwapFree"));
    let loads = read("/proc/loadavg");
    let mut loads = loads.split_whitespace().map(hundredths);
    let mut load = || loads.next().unwrap_or(0);
    SystemInfo {
        os_name: field(&release, "NAME", '=').map(unquoted).unwrap_or_default(),
        os_version: field(&release, "VERSION_ID", '=').or_else(|| field(&release, "VERSION", '=')).map(unquoted).unwrap_or_default(),
        kernel_version: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        cpu_model: field(&processors, "model name", ':').unwrap_or_default().to_owned(),
        num_cpus: u32::try_from(processors.lines().filter(|line| line.starts_with("processor")).count()).unwrap_or(u32::MAX),
        total_memory,
        available_memory,
        used_memory: total_memory.saturating_sub(available_memory),
        free_memory,
        total_swap,
        used_swap: total_swap.saturating_sub(free_swap),
        free_swap,
        uptime: read("/proc/uptime").split('.').next().and_then(|text| text.parse().ok()).unwrap_or(0),
        loadavg_one: load(),
        loadavg_five: load(),
        loadavg_fifteen: load(),
        disks: data_disks.iter().filter_map(|path| disk(path)).collect(),
    }
}

fn disk(mount_point: &Path) -> Option<DiskInfo> {
    let stat = rustix::fs::statvfs(mount_point).ok()?;
    let shown = mount_point.to_string_lossy().into_owned();
    let mounts = read("/proc/self/mounts");
    // What is mounted last there is what is seen.
    let mut device =
        mounts.lines().rev().filter_map(|line| line.split_once(' ')).filter(|(_, rest)| rest.split(' ').next() == Some(shown.as_str()));
    Some(DiskInfo {
        name: device.next().map(|(device, _)| device.to_owned()).unwrap_or_default(),
        mount_point: shown,
        total_size: stat.f_blocks.saturating_mul(stat.f_frsize),
        free_size: stat.f_bavail.saturating_mul(stat.f_frsize),
    })
}

/// The gauges of `/metrics` on the external port.
#[must_use]
pub fn gauges(info: &SystemInfo) -> String {
    let mut out = String::new();
    let mut gauge = |name: &str, labels: &[(&str, &str)], value: &str| {
        if !out.contains(&format!("# TYPE {name} gauge\n")) {
            let _ = writeln!(out, "# TYPE {name} gauge");
        }
        let labels: Vec<_> = labels.iter().map(|(label, text)| format!("{label}=\"{}\"", escaped(text))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(out, "{name}{labels} {value}");
    };
    for (name, label, text) in [
        ("system_os_name", "os_name", &info.os_name),
        ("system_os_version", "os_version", &info.os_version),
        ("system_kernel_version", "kernel_version", &info.kernel_version),
        ("system_cpu_model", "cpu_model", &info.cpu_model),
    ] {
        gauge(name, &[(label, text)], "1");
    }
    for (name, value) in [
        ("system_num_cpus", u64::from(info.num_cpus)),
        ("system_memory_total", info.total_memory),
        ("system_memory_available", info.available_memory),
        ("system_memory_used", info.used_memory),
        ("system_memory_free", info.free_memory),
        ("system_swap_total", info.total_swap),
        ("system_swap_used", info.used_swap),
        ("system_swap_free", info.free_swap),
        ("system_uptime", info.uptime),
    ] {
        gauge(name, &[], &value.to_string());
    }
    for (name, hundredths) in [
        ("system_load_average_1m", info.loadavg_one),
        ("system_load_average_5m", info.loadavg_five),
        ("system_load_average_15m", info.loadavg_fifteen),
    ] {
        gauge(name, &[], &format!("{}.{:02}", hundredths / 100, hundredths % 100));
    }
    for name in ["disk_total_size", "disk_free_size", "disk_used_size", "disk_usage_percentage"] {
        for disk in &info.disks {
            let used = disk.total_size.saturating_sub(disk.free_size);
            let value = match name {
                "disk_total_size" => disk.total_size.to_string(),
                "disk_free_size" => disk.free_size.to_string(),
                "disk_used_size" => used.to_string(),
                _ => {
                    let share = u128::from(used).saturating_mul(10_000).checked_div(u128::from(disk.total_size)).unwrap_or(0);
                    format!("{}.{:02}", share / 100, share % 100)
                }
            };
            gauge(name, &[("name", &disk.name), ("mount_point", &disk.mount_point)], &value);
        }
    }
    out
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

pub(crate) fn read(path: impl AsRef<Path>) -> String {
    use std::io::Read as _;
    let mut text = Vec::new();
    match fs::File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut text)) {
        Ok(_) => String::from_utf8_lossy(&text).into_owned(),
        Err(_) => String::new(),
    }
}

/// The value behind a name at the start of a line.
fn field<'a>(text: &'a str, name: &str, separator: char) -> Option<&'a str> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(separator));
    pairs.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

fn unquoted(text: &str) -> String {
    text.trim_matches('"').to_owned()
}

/// `0.42` is 42.
fn hundredths(text: &str) -> u32 {
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let part: String = format!("{part}00").chars().take(2).collect();
    whole.parse::<u32>().unwrap_or(0).saturating_mul(100).saturating_add(part.parse().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_the_kernel_says() {
        let info = system_info(&["/".into(), "/nonexistent".into()]);
        assert!(!info.kernel_version.is_empty() && !info.os_name.is_empty());
        assert!(info.num_cpus >= 1 && info.total_memory >= info.available_memory && info.available_memory > 0);
        assert_eq!(info.used_memory, info.total_memory - info.available_memory);
        let [disk] = info.disks.as_slice() else { panic!("one disk, the other is not there") };
        assert!(disk.mount_point == "/" && disk.total_size >= disk.free_size && disk.total_size > 0);
        let text = gauges(&info);
        assert!(text.contains(&format!("system_num_cpus {}\n", info.num_cpus)), "{text}");
        assert!(text.contains("disk_total_size{name=") && text.contains("mount_point=\"/\""));
    }

    #[test]
    fn numbers_and_labels() {
        for (text, value) in [("0.42", 42), ("12.3", 1230), ("7", 700), ("x", 0), ("0.999", 99)] {
            assert_eq!(hundredths(text), value, "{text}");
        }
        let disks = vec![DiskInfo { name: "a\"b\\".into(), mount_point: "/".into(), total_size: 3, free_size: 1 }];
        let info = SystemInfo { loadavg_one: 105, disks, ..SystemInfo::default() };
        let text = gauges(&info);
        assert!(text.contains("system_load_average_1m 1.05\n"));
        assert!(text.contains("disk_usage_percentage{name=\"a\\\"b\\\\\",mount_point=\"/\"} 66.66\n"), "{text}");
    }
}
