//! Length-prefixed frames of the software device's socket. Owns: `length(u32 BE) ‖ bytes` on a blocking stream.
//! Never: allocates more than a peer has sent or was allowed to announce; knows what the bytes mean.

use super::protocol::FRAME_BYTES_MAX;
use std::io::{Error, ErrorKind, Read, Result, Write};
use zeroize::Zeroizing;

/// Reads one frame. `None`: the peer closed between two frames.
///
/// # Errors
/// `InvalidData`: the announced length is 0 or above [`FRAME_BYTES_MAX`] (the stream is unusable then);
/// `UnexpectedEof`: closed inside a frame; else what the stream says, its timeout among it.
pub fn read_frame(stream: &mut impl Read) -> Result<Option<Zeroizing<Vec<u8>>>> {
    let mut prefix = [0u8; 4];
    let Some((first, rest)) = prefix.split_first_mut() else {
        return Ok(None);
    };
    loop {
        match stream.read(std::slice::from_mut(first)) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    stream.read_exact(rest)?;
    let length = usize::try_from(u32::from_be_bytes(prefix)).unwrap_or(usize::MAX);
    if length == 0 || length > FRAME_BYTES_MAX {
        return Err(Error::new(ErrorKind::InvalidData, format!("frame of {length} bytes, allowed 1 to {FRAME_BYTES_MAX}")));
    }
    let mut frame = Zeroizing::new(vec![0u8; length]);
    stream.read_exact(&mut frame)?;
    Ok(Some(frame))
}

/// Writes one frame in a single write and flushes it.
///
/// # Errors
/// `InvalidInput`: `bytes` is empty or above [`FRAME_BYTES_MAX`] (nothing was written); else what the stream says.
pub fn write_frame(stream: &mut impl Write, bytes: &[u8]) -> Result<()> {
    let length = u32::try_from(bytes.len()).ok().filter(|_| !bytes.is_empty() && bytes.len() <= FRAME_BYTES_MAX);
    let Some(length) = length else {
        return Err(Error::new(ErrorKind::InvalidInput, format!("frame of {} bytes, allowed 1 to {FRAME_BYTES_MAX}", bytes.len())));
    };
    let mut frame = Zeroizing::new(Vec::with_capacity(bytes.len().saturating_add(4)));
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(bytes);
    stream.write_all(&frame)?;
    stream.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip_and_end_cleanly() {
        let mut wire = Vec::new();
        write_frame(&mut wire, b"one").unwrap();
        write_frame(&mut wire, b"two").unwrap();
        let mut reader = wire.as_slice();
        assert_eq!(read_frame(&mut reader).unwrap().unwrap().as_slice(), b"one");
        assert_eq!(read_frame(&mut reader).unwrap().unwrap().as_slice(), b"two");
        assert!(read_frame(&mut reader).unwrap().is_none());
    }

    #[test]
    fn refuses_lengths_out_of_bounds_and_cut_frames() {
        let kind = |bytes: &[u8]| read_frame(&mut &bytes[..]).unwrap_err().kind();
        assert_eq!(kind(&[0, 0, 0, 0]), ErrorKind::InvalidData);
        assert_eq!(kind(&[0xff, 0xff, 0xff, 0xff]), ErrorKind::InvalidData);
        assert_eq!(kind(&[0, 0x10, 0, 1]), ErrorKind::InvalidData);
        assert_eq!(kind(&[0, 0]), ErrorKind::UnexpectedEof);
        assert_eq!(kind(&[0, 0, 0, 5, b'a']), ErrorKind::UnexpectedEof);
        assert_eq!(write_frame(&mut Vec::new(), b"").unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(write_frame(&mut Vec::new(), &vec![0; FRAME_BYTES_MAX + 1]).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
