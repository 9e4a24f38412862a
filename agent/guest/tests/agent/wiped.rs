//! What the agent's memory holds of keys once they are answered: their text went through buffers of HTTP and JSON, which are overwritten.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::local::{APP_KEY, Local};

/// For the connection and its buffers to end.
const ENDING: Duration = Duration::from_secs(30);

/// Whether a process's writable memory holds `text`. What vanishes while it is read is left out.
fn holds(pid: u32, text: &str) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    maps.lines().filter(|line| line.split_whitespace().nth(1).is_some_and(|rights| rights.starts_with("rw"))).any(|line| {
        let (begin, end) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
        let [begin, end] = [begin, end].map(|at| u64::from_str_radix(at, 16).unwrap());
        let mut area = Vec::new();
        memory.seek(SeekFrom::Start(begin)).is_ok() && {
            let _ends_where_unmapped = (&mut memory).take(end - begin).read_to_end(&mut area);
            String::from_utf8_lossy(&area).contains(text)
        }
    })
}

#[test]
fn an_answered_key_is_nowhere_as_text() {
    let local = Local::new(true);
    let running = local.start(&Local::compose(&json!({})));
    let pid = running.0.as_ref().unwrap().id();
    let (status, key) = local.guest("GetKey", &json!({ "path": "wiped", "purpose": "signing" }));
    assert_eq!(status, 200);
    let (status, info) = local.guest("Info", &json!({}));
    assert_eq!(status, 200);
    // the search finds what is there
    assert!(holds(pid, "docker_compose_file"), "the compose document is kept: {info}");
    let answered = key["key"].as_str().unwrap();
    assert_eq!(answered.len(), 64);
    let began = Instant::now();
    for text in [answered, APP_KEY] {
        while holds(pid, text) {
            assert!(began.elapsed() < ENDING, "a key stays in memory as text");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
