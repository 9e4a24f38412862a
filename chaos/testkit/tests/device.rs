//! The device process over its socket: real process, real peers, good and bad clients.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots, VerifyContext, verify};
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_tee::software::frame::{read_frame, write_frame};
use dstack_tee::software::protocol::{
    Boot, COMPOSE_BYTES_MAX, Description, EmulatedPlatform, HexArray, HexBytes, KeyHex, RefusedCode, Request, Response,
};
use dstack_testkit::Measured;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dstack-testkit");
const COMPOSE: &[u8] = br#"{"manifest_version":2,"name":"app"}"#;

/// A running device process with two machines; ended by SIGTERM at the end of the test.
struct Device {
    child: Child,
    dir: tempfile::TempDir,
}

impl Device {
    fn start(more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let roots = dir.path().join("roots");
        let init = Command::new(PROGRAM).args(["init", "--dir"]).arg(&roots).output().unwrap();
        assert!(init.status.success(), "{init:?}");
        let machine = |name: &str, rest: &str| format!("{name}={}{rest}", dir.path().join(name).display());
        let mut child = Command::new(PROGRAM)
            .args(["tee", "--with-parent", "--dir"])
            .arg(&roots)
            .args(["--machine", &machine("a", ""), "--machine", &machine("b", ""), "--machine", &machine("n", ",platform=nitro")])
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(until_ready(&mut child).len(), 3);
        Self { child, dir }
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn connect(&self, name: &str) -> UnixStream {
        let stream = UnixStream::connect(self.socket(name)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    fn stop(mut self) -> tempfile::TempDir {
        terminate(&self.child);
        let status = wait(&mut self.child);
        assert!(status.success(), "{status}");
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The lines a device process prints until it serves.
fn until_ready(child: &mut Child) -> Vec<String> {
    let mut lines = Vec::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        match line.unwrap() {
            ready if ready == "ready" => return lines,
            line => lines.push(line),
        }
    }
    panic!("the device ended before it served: {lines:?}");
}

fn terminate(child: &Child) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

fn wait(child: &mut Child) -> std::process::ExitStatus {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "the device did not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn ask(stream: &mut UnixStream, request: &Request) -> Response {
    write_frame(stream, &serde_json::to_vec(request).unwrap()).unwrap();
    serde_json::from_slice(&read_frame(stream).unwrap().unwrap()).unwrap()
}

fn describe(stream: &mut UnixStream) -> Description {
    match ask(stream, &Request::Describe) {
        Response::Description(description) => description,
        other => panic!("{other:?}"),
    }
}

fn platform_key(stream: &mut UnixStream, purpose: &[u8]) -> KeyHex {
    match ask(stream, &Request::PlatformKey { purpose: HexBytes(purpose.to_vec()) }) {
        Response::PlatformKey { key } => key,
        other => panic!("{other:?}"),
    }
}

fn boot(compose: &[u8]) -> Request {
    Request::Boot(Boot { compose: HexBytes(compose.to_vec()), app_id: None, instance_seed: None, key_provider: None })
}

fn refusal(response: Response) -> RefusedCode {
    match response {
        Response::Refused(refused) => refused.code,
        other => panic!("{other:?}"),
    }
}

#[test]
fn measures_who_asks() {
    let device = Device::start(&[]);
    let own = Measured::executable(&std::fs::read(std::env::current_exe().unwrap()).unwrap());
    let (tdx, nitro) = (describe(&mut device.connect("a")), describe(&mut device.connect("n")));
    assert_eq!(tdx.measurement.0, own.tdx_measurement());
    assert_eq!(nitro.measurement.0, own.nitro_measurement());
    assert_eq!((tdx.platform, nitro.platform), (EmulatedPlatform::Tdx, EmulatedPlatform::Nitro));
    assert_eq!((tdx.platform_identity.0.len(), nitro.platform_identity.0.len()), (16, 48));
    assert_ne!(tdx.platform_identity, describe(&mut device.connect("b")).platform_identity);
    assert!(tdx.collateral.is_some() && nitro.collateral.is_none());

    // Another program, one byte longer, is another node, as `measure` says beforehand.
    let copy = device.socket("copy");
    let mut bytes = std::fs::read(PROGRAM).unwrap();
    bytes.push(0);
    std::fs::write(&copy, bytes).unwrap();
    std::fs::set_permissions(&copy, PermissionsExt::from_mode(0o755)).unwrap();
    let mut seen = Vec::new();
    for program in [Path::new(PROGRAM), &copy] {
        let output = Command::new(program).args(["describe", "--socket"]).arg(device.socket("a")).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let description: Description = serde_json::from_slice(&output.stdout).unwrap();
        let said = Command::new(PROGRAM).args(["measure", "--platform", "tdx", "--exe"]).arg(program).output().unwrap();
        let expected = format!("measurement={}\n", hex::encode(&description.measurement.0));
        assert!(String::from_utf8(said.stdout).unwrap().starts_with(&expected));
        seen.push(description.measurement.0);
    }
    assert_ne!(seen[0], seen[1]);
}

#[test]
fn a_guest_belongs_to_its_connection() {
    let device = Device::start(&[]);
    let mut stream = device.connect("a");
    let node = describe(&mut stream).measurement;
    let Response::Booted(booted) = ask(&mut stream, &boot(COMPOSE)) else { panic!() };
    assert_eq!(booted.app_id.0, booted.compose_hash.0[..20]);
    let guest = describe(&mut stream).measurement;
    assert_ne!(guest, node);
    assert_eq!(guest.0, Measured::compose(COMPOSE).tdx_measurement());
    assert_eq!(refusal(ask(&mut stream, &boot(COMPOSE))), RefusedCode::AlreadyBooted);
    assert_eq!(describe(&mut stream).measurement, guest);
    assert_eq!(describe(&mut device.connect("a")).measurement, node);

    let Response::Quote(quote) = ask(&mut stream, &Request::Quote { report_data: HexArray([5; 64]) }) else { panic!() };
    let log: serde_json::Value = serde_json::from_str(&quote.event_log).unwrap();
    assert_eq!(log.as_array().unwrap().len(), 7);
    assert_eq!(quote.quote.0[568..632], [5; 64]);
}

#[test]
fn platform_keys_depend_on_machine_measurement_and_purpose() {
    let device = Device::start(&[]);
    let key = platform_key(&mut device.connect("a"), b"seal");
    assert!(key == platform_key(&mut device.connect("a"), b"seal"));
    assert!(key != platform_key(&mut device.connect("a"), b"other"));
    assert!(key != platform_key(&mut device.connect("b"), b"seal"));
    let mut guest = device.connect("a");
    ask(&mut guest, &boot(COMPOSE));
    assert!(key != platform_key(&mut guest, b"seal"));
    // A restart of the device keeps them, as hardware would.
    let dir = device.stop();
    let mut child = Command::new(PROGRAM)
        .args(["tee", "--with-parent", "--dir"])
        .arg(dir.path().join("roots"))
        .args(["--machine", &format!("a={}", dir.path().join("a").display())])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    until_ready(&mut child);
    let again = platform_key(&mut UnixStream::connect(dir.path().join("a")).unwrap(), b"seal");
    terminate(&child);
    wait(&mut child);
    assert!(key == again);
}

#[test]
fn survives_bad_clients() {
    let device = Device::start(&[]);
    // Answered with a refusal, then closed.
    for bytes in
        [&b"\0\0\0\0"[..], b"\xff\xff\xff\xff", b"\0\0\0\x02{}", b"\0\0\0\x03\xff\xff\xff", b"\0\0\0\x0a\"shutdown\"", br#"GET / HTTP/1.1"#]
    {
        let mut stream = device.connect("a");
        stream.write_all(bytes).unwrap();
        assert_eq!(refusal(serde_json::from_slice(&read_frame(&mut stream).unwrap().unwrap()).unwrap()), RefusedCode::BadRequest);
        assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
    }
    let oversized = [boot(&vec![b' '; COMPOSE_BYTES_MAX + 1]), Request::PlatformKey { purpose: HexBytes(vec![0; 257]) }];
    for request in &oversized {
        let mut stream = device.connect("a");
        assert_eq!(refusal(ask(&mut stream, request)), RefusedCode::BadRequest);
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
    // Cut frames, and clients that never read.
    for _ in 0..50 {
        device.connect("a").write_all(b"\0\0\x01\0abc").unwrap();
        let mut stream = device.connect("a");
        write_frame(&mut stream, &serde_json::to_vec(&Request::Describe).unwrap()).unwrap();
    }
    // More connections than it serves at once: the rest are closed, and service returns with their end.
    let crowd: Vec<UnixStream> = (0..600).map_while(|_| UnixStream::connect(device.socket("a")).ok()).collect();
    assert!(crowd.len() > 512);
    assert_eq!(describe(&mut device.connect("b")).platform, EmulatedPlatform::Tdx);
    drop(crowd);
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let mut stream = device.connect("a");
        let _ = write_frame(&mut stream, &serde_json::to_vec(&Request::Describe).unwrap());
        if let Ok(Some(_)) = read_frame(&mut stream) {
            break;
        }
        assert!(Instant::now() < deadline, "service did not return");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_slow_frame_is_cut_off() {
    let device = Device::start(&[]);
    let mut stream = device.connect("a");
    stream.write_all(b"\0\0\0\x0a\"des").unwrap();
    let begin = Instant::now();
    // It closes without an answer, ten seconds after the first byte, however often single bytes arrive.
    stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let _ = stream.read(&mut [0; 1]);
    let _ = stream.write_all(b"c");
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
}

#[test]
fn sockets_are_private_and_removed_at_the_end() {
    let device = Device::start(&[]);
    let mode = |path: PathBuf| std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(device.socket("a")), 0o600);
    // A second server does not take a live socket away.
    let second = Command::new(PROGRAM)
        .args(["tee", "--dir"])
        .arg(device.socket("roots"))
        .args(["--machine", &format!("x={}", device.socket("a").display())])
        .output()
        .unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("a server answers"), "{second:?}");
    let idle = device.connect("a");
    let dir = device.stop();
    assert!(["a", "b", "n"].iter().all(|name| !dir.path().join(name).exists()));
    drop(idle);

    let wider = Device::start(&["--mode", "666"]);
    assert_eq!(mode(wider.socket("n")), 0o666);
}

#[test]
fn a_dead_servers_socket_is_replaced() {
    let device = Device::start(&[]);
    let dir = device.dir.path().to_owned();
    let (roots, socket) = (dir.join("roots"), dir.join("dead"));
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let mut child = Command::new(PROGRAM)
        .args(["tee", "--with-parent", "--dir"])
        .arg(roots)
        .args(["--machine", &format!("x={}", socket.display())])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = until_ready(&mut child);
    assert!(lines[0].starts_with("machine=x "), "{lines:?}");
    describe(&mut UnixStream::connect(&socket).unwrap());
    terminate(&child);
    assert!(wait(&mut child).success());
    assert!(!socket.exists());
}

#[test]
fn the_products_client_gets_evidence_that_the_products_verifier_accepts() {
    let device = Device::start(&[]);
    for name in ["a", "n"] {
        let tee = dstack_tee::open(&format!("software:{}", device.socket(name).display())).unwrap();
        let description = tee.describe().unwrap();
        let software = description.software.unwrap();
        let collateral = software.collateral.as_ref().map(|json| CollateralBundle::parse(json.as_bytes()).unwrap());
        let collateral = collateral.unwrap_or_else(CollateralBundle::empty);
        let roots = TrustRoots::production().with_software_root(&software.root_der).unwrap();
        let judge = |evidence: &[u8]| {
            let now = SystemClock::new().now();
            verify(evidence, &VerifyContext { now, roots: &roots, collateral: &collateral, tcb: &TcbPolicy::default() }).unwrap()
        };
        let node = judge(&tee.evidence([1; 64]).unwrap());
        assert_eq!(node.measurement(), description.measurement);
        assert_eq!(node.platform_identity(), description.platform_identity);
        assert_eq!((node.report_data(), node.app_id()), (&[1; 64], None));

        let Request::Boot(boot) = boot(COMPOSE) else { panic!() };
        let booted = tee.boot_app(boot).unwrap();
        let guest = judge(&tee.evidence([2; 64]).unwrap());
        assert_eq!(guest.app_id().unwrap().0, booted.app_id.0);
        assert_eq!(guest.compose_hash().unwrap(), booted.compose_hash.0);
        assert_eq!(guest.measurement(), tee.describe().unwrap().measurement);
        assert!(guest.software_root() && tee.is_software());
        assert!(tee.platform_key(b"seal").unwrap().unwrap().expose(|key| key != &[0; 32]));
    }
}

#[test]
fn ends_with_its_parent_when_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let (roots, socket) = (dir.path().join("roots"), dir.path().join("a"));
    assert!(Command::new(PROGRAM).args(["init", "--dir"]).arg(&roots).output().unwrap().status.success());
    // The shell stays as the parent: it has a second command to run.
    let script = format!("{PROGRAM} tee --with-parent --dir {} --machine a={}; true", roots.display(), socket.display());
    let mut parent = Command::new("sh").args(["-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
    until_ready(&mut parent);
    describe(&mut UnixStream::connect(&socket).unwrap());
    parent.kill().unwrap();
    parent.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while socket.exists() {
        assert!(Instant::now() < deadline, "the device outlived its parent");
        std::thread::sleep(Duration::from_millis(10));
    }
}
