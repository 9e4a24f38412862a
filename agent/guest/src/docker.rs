//! The container runtime, as far as its socket says: containers, their logs. Owns: the questions, reading multiplexed logs.
//! Never: starts, stops or changes a container.
//! Source: Docker Engine API, "List containers", "Get container logs" (stream format).

use std::path::Path;

use http_body_util::BodyExt as _;
use hyper::body::{Bytes, Incoming};
use serde::Deserialize;

use crate::outgoing::{OutgoingError, get_unix, whole};

/// Largest list of containers, bytes.
const LIST_BYTES_MAX: usize = 4 << 20;
/// Largest piece of a log passed on at once, bytes.
const PIECE_BYTES_MAX: usize = 64 * 1024;

/// A container, as the runtime lists it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[derive(Default)]
pub struct Container {
    /// Of the runtime.
    pub id: String,
    /// With a leading slash.
    pub names: Vec<String>,
    /// Image name.
    pub image: String,
    /// Image digest.
    #[serde(rename = "ImageID")]
    pub image_id: String,
    /// Unix seconds.
    pub created: i64,
    /// `running`, `exited`.
    pub state: String,
    /// For people.
    pub status: String,
}

impl Container {
    /// Its first name, without the slash.
    #[must_use]
    pub fn name(&self) -> &str {
        self.names.first().map_or(self.id.as_str(), |name| name.trim_start_matches('/'))
    }
}

/// All containers.
///
/// # Errors
/// [`OutgoingError`].
pub async fn containers(socket: &Path) -> Result<Vec<Container>, OutgoingError> {
    let place = socket.display().to_string();
    let response = get_unix(socket, "/containers/json?all=1").await?;
    let body = whole(response, &place, LIST_BYTES_MAX).await?;
    serde_json::from_slice(&body).map_err(|error| OutgoingError::Answer { place, reason: error.to_string() })
}

/// What a reader of a log wants.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogQuery {
    /// Unix seconds; 0 for the beginning.
    pub since: i64,
    /// Unix seconds; 0 for the end.
    pub until: i64,
    /// Goes on as long as the container writes.
    pub follow: bool,
    /// Each line with its time.
    pub timestamps: bool,
    /// Lines from the end, or `all`.
    pub tail: String,
}

/// The log of a container.
///
/// # Errors
/// [`OutgoingError`]; status 404 for no such container.
pub async fn logs(socket: &Path, container: &str, query: &LogQuery) -> Result<Log, OutgoingError> {
    let LogQuery { since, until, follow, timestamps, tail } = query;
    let path = format!(
        "/containers/{container}/logs?stdout=1&stderr=1&since={since}&until={until}&follow={follow}&timestamps={timestamps}&tail={tail}"
    );
    Ok(Log { body: get_unix(socket, &path).await?.into_body(), demux: Demux::default(), is_over: false })
}

/// Whether a text can be a container's name or id: it goes into a path.
#[must_use]
pub fn is_container_name(text: &str) -> bool {
    let is_fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    (1..=128).contains(&text.len()) && text.bytes().all(is_fine) && text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
}

/// Which stream a piece is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// Standard output, also of a container with a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Channel {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// A log that is being read.
#[derive(Debug)]
pub struct Log {
    body: Incoming,
    demux: Demux,
    is_over: bool,
}

impl Log {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// The connection's.
    pub async fn next(&mut self) -> Result<Option<(Channel, Vec<u8>)>, hyper::Error> {
        loop {
            if let Some(piece) = self.demux.piece(self.is_over) {
                return Ok(Some(piece));
            }
            if self.is_over {
                return Ok(None);
            }
            match self.body.frame().await {
                None => self.is_over = true,
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        self.demux.push(&data);
                    }
                }
            }
        }
    }
}

/// Takes the runtime's frames apart: `channel(1) ‖ 0³ ‖ length(4, big-endian) ‖ data`. A container with a terminal has none: its bytes
/// come as they are, so it can write whatever looks like frames, empty ones without end among them.
#[derive(Debug, Default)]
struct Demux {
    held: Vec<u8>,
    /// So many of them are taken.
    taken: usize,
    /// Bytes still to come of a frame, and its channel.
    open: Option<(Channel, usize)>,
    is_plain: bool,
}

impl Demux {
    fn push(&mut self, data: &Bytes) {
        // Once a push: what is taken piece by piece is not moved each time.
        self.held.drain(..self.taken.min(self.held.len()));
        self.taken = 0;
        self.held.extend_from_slice(data);
    }

    fn rest(&self) -> &[u8] {
        self.held.get(self.taken..).unwrap_or_default()
    }

    fn piece(&mut self, is_over: bool) -> Option<(Channel, Vec<u8>)> {
        loop {
            if self.open.is_none() && !self.is_plain {
                match self.rest().first_chunk::<8>() {
                    Some([kind @ (0..=2), 0, 0, 0, length @ ..]) => {
                        let channel = if *kind == 2 { Channel::Stderr } else { Channel::Stdout };
                        self.open = Some((channel, usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX)));
                        self.taken = self.taken.saturating_add(8);
                    }
                    Some(_) => self.is_plain = true,
                    None if is_over => self.is_plain = true,
                    None => return None,
                }
            }
            let (channel, want) = self.open.unwrap_or((Channel::Stdout, usize::MAX));
            let data: Vec<u8> = self.rest().iter().take(want.min(PIECE_BYTES_MAX)).copied().collect();
            self.taken = self.taken.saturating_add(data.len());
            if self.open.is_some() {
                let left = want.saturating_sub(data.len());
                self.open = (left > 0).then_some((channel, left));
            }
            if !data.is_empty() {
                return Some((channel, data));
            }
            // An empty frame: the next may stand behind it.
            if self.open.is_some() || self.is_plain || self.rest().is_empty() {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(chunks: &[&[u8]]) -> Vec<(Channel, Vec<u8>)> {
        let mut demux = Demux::default();
        let mut out = Vec::new();
        for chunk in chunks {
            demux.push(&Bytes::copy_from_slice(chunk));
            while let Some(piece) = demux.piece(false) {
                out.push(piece);
            }
        }
        while let Some(piece) = demux.piece(true) {
            out.push(piece);
        }
        out
    }

    #[test]
    fn frames_are_taken_apart_wherever_they_are_cut() {
        let whole = b"\x01\0\0\0\0\0\0\x03abc\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\x02de";
        let expected = [(Channel::Stdout, b"abc".to_vec()), (Channel::Stderr, b"de".to_vec())];
        assert_eq!(pieces(&[whole]), expected);
        for at in 1..whole.len() {
            let (head, tail) = whole.split_at(at);
            let mut joined: Vec<(Channel, Vec<u8>)> = Vec::new();
            for (channel, data) in pieces(&[head, tail]) {
                match joined.last_mut() {
                    Some((last, held)) if *last == channel => held.extend(data),
                    _ => joined.push((channel, data)),
                }
            }
            assert_eq!(joined, expected, "{at}");
        }
        assert_eq!(pieces(&[b"plain text of a terminal"]), [(Channel::Stdout, b"plain text of a terminal".to_vec())]);
        assert_eq!(pieces(&[b"hi"]), [(Channel::Stdout, b"hi".to_vec())]);
    }

    /// What a container with a terminal writes comes as it is: zeros look like the heads of empty frames.
    #[test]
    fn a_million_empty_frames_use_up_no_stack() {
        let mut whole = vec![0; 8 << 20];
        whole.extend_from_slice(b"\x01\0\0\0\0\0\0\x01x");
        assert_eq!(pieces(&[&whole]), [(Channel::Stdout, b"x".to_vec())]);
    }

    #[test]
    fn names_that_would_change_the_path_are_none() {
        for name in ["app", "app_1", "a-b.c", &"f".repeat(64)] {
            assert!(is_container_name(name), "{name}");
        }
        for name in ["", ".", "../x", "a/b", "a?b", "a b", "ä", &"x".repeat(129)] {
            assert!(!is_container_name(name), "{name}");
        }
    }
}
