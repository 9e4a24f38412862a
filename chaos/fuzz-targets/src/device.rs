//! The software device's socket: frames of foreign bytes, and the JSON in them. What reads as a message reads the same when written again.

use dstack_tee::software::frame::{read_frame, write_frame};
use dstack_tee::software::protocol::{FRAME_BYTES_MAX, Request, Response};

/// See the module text. An input is a stream of frames; the JSON of each is tried as a request and as an answer. An input that is no
/// stream of frames is tried as JSON itself, or the fuzzer would first have to learn to write lengths.
pub(crate) fn run(data: &[u8]) {
    let mut stream = data;
    while let Ok(Some(frame)) = read_frame(&mut stream) {
        assert!(!frame.is_empty() && frame.len() <= FRAME_BYTES_MAX, "a frame keeps to its bounds");
        let mut again = Vec::new();
        write_frame(&mut again, &frame).expect("what was read can be written");
        assert_eq!(read_frame(&mut again.as_slice()).expect("a frame").expect("one frame"), frame, "and read again");
        judge(&frame);
    }
    judge(data);
}

fn judge(json: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<Request>(json) {
        let again = serde_json::to_vec(&request).expect("a request can be written");
        assert_eq!(serde_json::from_slice::<Request>(&again).expect("and read again"), request);
    }
    if let Ok(response) = serde_json::from_slice::<Response>(json) {
        let again = serde_json::to_vec(&response).expect("a response can be written");
        assert_eq!(serde_json::from_slice::<Response>(&again).expect("and read again"), response);
    }
}
