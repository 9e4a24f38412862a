//! Every field of every method, wrong, at every socket of a running agent. Owns: which service is where. The requests are made from what
//! the messages say of themselves, so a field that is added is tried without a word here.

use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use dstack_prpc::guest::{DstackGuest, Tappd, Worker};
use dstack_prpc::guest_v1::{DstackGuestV1, WorkerV1};
use dstack_prpc::host::GuestApi;
use dstack_testkit::bad_requests::{BadRequest, bad_requests};
use dstack_testkit::cluster::process::resident_bytes;
use dstack_testkit::raw_http::Asking;
use serde_json::json;

use crate::ANY_ANSWER;
use crate::local::{Local, Stream};

/// How much the agent may grow: buffers, and what the allocator keeps.
const GROWTH_BYTES_MAX: u64 = 64 << 20;

/// A socket, the path before a method's name, and what is asked there.
struct Place {
    socket: Option<PathBuf>,
    before: &'static str,
    cases: Vec<BadRequest>,
}

fn places(local: &Local) -> Vec<Place> {
    let unix = |name: &str, before, cases| Place { socket: Some(local.socket(name)), before, cases };
    let external = |before, cases| Place { socket: None, before, cases };
    vec![
        unix("dstack.sock", "/", bad_requests(DstackGuest::SERVICE, &[])),
        unix("dstack.sock", "/v0/", bad_requests(DstackGuest::SERVICE, &[])),
        unix("dstack.sock", "/v1/", bad_requests(DstackGuestV1::SERVICE, &[])),
        unix("tappd.sock", "/prpc/", bad_requests(Tappd::SERVICE, &[])),
        unix("tappd.sock", "/prpc/Tappd.", bad_requests(Tappd::SERVICE, &[])),
        // Its request is empty, and any of them powers the machine off.
        unix("host.sock", "/api/", bad_requests(GuestApi::SERVICE, &["Shutdown"])),
        external("/prpc/", bad_requests(Worker::SERVICE, &[])),
        external("/prpc/v0/Worker.", bad_requests(Worker::SERVICE, &[])),
        external("/prpc/v1/", bad_requests(WorkerV1::SERVICE, &[])),
    ]
}

#[test]
fn every_field_of_every_method_may_be_wrong_at_every_socket() {
    let local = Local::new(true);
    let agent = local.start(&Local::compose(&json!({})));
    let resident = || resident_bytes(agent.0.as_ref().unwrap().id()).unwrap();
    let before = local.guest("GetKey", &json!({"path": "kept"})).1;
    let (mut wrong, mut count) = (Vec::new(), 0_usize);
    let places = places(&local);
    let mut pass = || {
        for Place { socket, before, cases } in &places {
            let mut asking = Asking::new(|| -> std::io::Result<Box<dyn Stream>> {
                Ok(match socket {
                    Some(path) => {
                        let stream = UnixStream::connect(path)?;
                        stream.set_read_timeout(Some(ANY_ANSWER))?;
                        Box::new(stream)
                    }
                    None => {
                        let stream = TcpStream::connect(local.external)?;
                        stream.set_read_timeout(Some(ANY_ANSWER))?;
                        Box::new(stream)
                    }
                })
            });
            for case in cases {
                count += 1;
                match asking.ask(&case.bytes(before)) {
                    Ok(answer) => wrong.extend(case.judge(&answer).err().map(|why| format!("{before}{why}"))),
                    Err(error) => wrong.push(format!("{before}{} ({:?}), {}: {error}", case.method, case.form, case.what)),
                }
            }
        }
    };
    pass();
    let first = resident();
    pass();
    let second = resident();
    assert!(count > 3000, "{count}");
    assert!(wrong.is_empty(), "{} of {count}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(second < first + GROWTH_BYTES_MAX, "grew from {first} to {second} bytes");
    assert_eq!(local.guest("GetKey", &json!({"path": "kept"})).1, before, "and it serves on");
}
