//! A webhook authority for tests: decides as upstream's `auth-simple` does, from lists that a test changes while it runs.
//! Owns: its questions, the order of its checks, its reasons and texts; a fault or silence on demand. Never: listens on anything but loopback.
//! Source: KMS API reference §9; on-chain reference §9 (`auth-simple`).

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::TestkitError;
use crate::listening::Listening;

/// Largest request.
const REQUEST_BYTES_MAX: usize = 256 * 1024;

/// What the server decides by: the members of `auth-config.json`, in lower-case hex without a prefix.
#[derive(Debug, Clone, Default)]
pub struct Lists {
    /// Gateway of the deployment.
    pub gateway_app_id: String,
    /// Address of the KMS contract, for `GET /`.
    pub kms_contract_addr: String,
    /// Chain, for `GET /`.
    pub chain_id: u64,
    /// OS images that may run.
    pub os_images: BTreeSet<String>,
    /// TCB statuses allowed beside `UpToDate`.
    pub more_tcb_statuses: BTreeSet<String>,
    /// Advisories that may apply.
    pub advisories: BTreeSet<String>,
    /// Compose hashes of each app; any device.
    pub apps: BTreeMap<String, BTreeSet<String>>,
    /// Aggregated measurements of KMS nodes.
    pub kms: BTreeSet<String>,
}

impl Lists {
    /// The reason of a no.
    fn refusal(&self, is_kms: bool, info: &Value) -> Option<&'static str> {
        let text = |name: &str| {
            let text = info.get(name).and_then(Value::as_str).unwrap_or_default().to_ascii_lowercase();
            text.strip_prefix("0x").map(str::to_owned).unwrap_or(text)
        };
        let tcb = info.get("tcbStatus").and_then(Value::as_str).unwrap_or_default();
        if tcb != "UpToDate" && !self.more_tcb_statuses.contains(tcb) {
            return Some("TCB status is not allowed");
        }
        let mut advisories = info.get("advisoryIds").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
        if advisories.any(|id| !self.advisories.contains(id)) {
            return Some("advisory ID is not allowed");
        }
        if !self.os_images.contains(&text("osImageHash")) {
            return Some("OS image is not allowed");
        }
        if is_kms {
            return (!self.kms.contains(&text("mrAggregated"))).then_some("aggregated MR not allowed");
        }
        match self.apps.get(&text("appId")) {
            None => Some("app not registered"),
            Some(hashes) => (!hashes.contains(&text("composeHash"))).then_some("compose hash not allowed"),
        }
    }
}

#[derive(Debug, Default)]
struct Content {
    lists: Lists,
    /// Answers every question with this status instead.
    status: Option<u16>,
    asked: Vec<Value>,
    /// Questions that came, answered or not.
    came: usize,
    /// Answers nothing while this is set.
    held: bool,
}

/// What the server's threads share; the condition is told when `held` ends.
type Shared = (Mutex<Content>, Condvar);

/// A running server; ends when dropped.
#[derive(Debug)]
pub struct AuthSimple {
    listening: Listening,
    shared: Arc<Shared>,
}

impl AuthSimple {
    /// Listens on a free port of loopback (0), or on this one, and allows nothing.
    ///
    /// # Errors
    /// [`TestkitError::File`]: the port is taken.
    pub fn start(port: u16, lists: Lists) -> Result<Self, TestkitError> {
        let shared = Arc::new((Mutex::new(Content { lists, ..Content::default() }), Condvar::new()));
        let content = Arc::clone(&shared);
        Ok(Self { listening: Listening::start("auth-simple listener", port, move |stream| answer(stream, &content))?, shared })
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.listening.address.port()
    }

    /// Base address.
    #[must_use]
    pub fn url(&self) -> String {
        self.listening.url()
    }

    /// Changes what it decides by.
    pub fn change(&self, change: impl FnOnce(&mut Lists)) {
        change(&mut lock(&self.shared.0).lists);
    }

    /// Answers every question with this status from now on, or rightly again.
    pub fn fail(&self, status: Option<u16>) {
        lock(&self.shared.0).status = status;
    }

    /// Takes questions and answers none from now on, or answers all that wait.
    pub fn hold(&self, held: bool) {
        lock(&self.shared.0).held = held;
        self.shared.1.notify_all();
    }

    /// Questions that came so far, those not answered yet among them.
    #[must_use]
    pub fn came(&self) -> usize {
        lock(&self.shared.0).came
    }

    /// What it was asked so far: the bodies.
    #[must_use]
    pub fn asked(&self) -> Vec<Value> {
        lock(&self.shared.0).asked.clone()
    }

    /// What it decides by, to start another one alike.
    #[must_use]
    pub fn lists(&self) -> Lists {
        lock(&self.shared.0).lists.clone()
    }
}

impl Drop for AuthSimple {
    fn drop(&mut self) {
        self.hold(false);
    }
}

fn answer(mut stream: TcpStream, (content, released): &Shared) {
    let Some((line, body)) = request(&mut stream) else { return };
    let mut content = lock(content);
    content.came += 1;
    let mut content = released.wait_while(content, |content| content.held).unwrap_or_else(PoisonError::into_inner);
    let (status, reply) = reply(&mut content, &line, &body);
    drop(content);
    let reply = reply.to_string();
    let head =
        format!("HTTP/1.1 {status} Test\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", reply.len());
    // The client may have gone: nothing to say to it then.
    let _ = stream.write_all(&[head.into_bytes(), reply.into_bytes()].concat());
}

fn reply(content: &mut Content, line: &str, body: &[u8]) -> (u16, Value) {
    if let Some(status) = content.status {
        return (status, json!({"message": "told to"}));
    }
    let lists = &content.lists;
    let is_kms = match line.split(' ').take(2).collect::<Vec<_>>().as_slice() {
        ["GET", "/"] => {
            let about = json!({
                "status": "ok",
                "kmsContractAddr": lists.kms_contract_addr,
                "gatewayAppId": lists.gateway_app_id,
                "chainId": lists.chain_id,
                "appAuthImplementation": "0xapp",
                "appImplementation": "0xapp",
            });
            return (200, about);
        }
        ["POST", "/bootAuth/app"] => false,
        ["POST", "/bootAuth/kms"] => true,
        _ => return (404, json!({"message": "no such route"})),
    };
    let info: Value = serde_json::from_slice(body).unwrap_or_default();
    let required = ["mrAggregated", "osImageHash", "appId", "composeHash", "instanceId", "deviceId"];
    if required.iter().any(|name| !info.get(name).is_some_and(Value::is_string)) {
        return (400, json!({"isAllowed": false, "reason": "invalid authorization request", "gatewayAppId": ""}));
    }
    let refusal = lists.refusal(is_kms, &info);
    let answer = json!({"isAllowed": refusal.is_none(), "reason": refusal.unwrap_or_default(), "gatewayAppId": lists.gateway_app_id});
    content.asked.push(info);
    (200, answer)
}

/// The request's first line and its body.
fn request(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let head = bytes.windows(4).position(|window| window == b"\r\n\r\n");
        if let Some(end) = head {
            let text = String::from_utf8_lossy(bytes.get(..end)?).into_owned();
            let length = text.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ").map(str::to_owned));
            let length: usize = length.map_or(Some(0), |length| length.trim().parse().ok())?;
            let body = bytes.get(end + 4..)?;
            if body.len() >= length {
                return Some((text.lines().next()?.to_owned(), body.get(..length)?.to_vec()));
            }
        }
        let count = stream.read(&mut chunk).ok().filter(|count| *count > 0)?;
        bytes.extend_from_slice(chunk.get(..count)?);
        if bytes.len() > REQUEST_BYTES_MAX {
            return None;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_in_upstreams_order_and_with_its_reasons() {
        let info = |tcb: &str, advisories: &[&str]| {
            json!({
                "tcbStatus": tcb, "advisoryIds": advisories, "osImageHash": "0xAA", "appId": "bb", "composeHash": "cc", "mrAggregated": "dd",
            })
        };
        let mut lists = Lists::default();
        let good = info("UpToDate", &[]);
        assert_eq!(lists.refusal(false, &info("OutOfDate", &["INTEL-SA-1"])), Some("TCB status is not allowed"));
        assert_eq!(lists.refusal(false, &info("UpToDate", &["INTEL-SA-1"])), Some("advisory ID is not allowed"));
        assert_eq!(lists.refusal(false, &good), Some("OS image is not allowed"));
        lists.os_images.insert("aa".to_owned());
        assert_eq!(lists.refusal(false, &good), Some("app not registered"));
        assert_eq!(lists.refusal(true, &good), Some("aggregated MR not allowed"));
        lists.apps.insert("bb".to_owned(), BTreeSet::new());
        assert_eq!(lists.refusal(false, &good), Some("compose hash not allowed"));
        lists.apps.insert("bb".to_owned(), BTreeSet::from(["cc".to_owned()]));
        lists.kms.insert("dd".to_owned());
        assert_eq!((lists.refusal(false, &good), lists.refusal(true, &good)), (None, None));
    }
}
