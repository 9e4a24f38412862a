//! `expand_message_xmd` of RFC 9380 §5.3.1, for SHA-256 and SHA-512.
//!
//! Owns: stretching of a message under a domain separation tag. The message is taken in parts, so that a part that is secret
//! need not be copied into a longer buffer.

use sha2::digest::Digest;
use sha2::{Sha256, Sha512};
use zeroize::Zeroize as _;

/// A hash with its block and output size.
pub(crate) trait XmdHash {
    type Hash: Digest;
    const BLOCK_BYTES: usize;
    const OUTPUT_BYTES: usize;
}

pub(crate) struct XmdSha256;
pub(crate) struct XmdSha512;

impl XmdHash for XmdSha256 {
    type Hash = Sha256;
    const BLOCK_BYTES: usize = 64;
    const OUTPUT_BYTES: usize = 32;
}

impl XmdHash for XmdSha512 {
    type Hash = Sha512;
    const BLOCK_BYTES: usize = 128;
    const OUTPUT_BYTES: usize = 64;
}

/// Stretches the concatenation of `parts` to `LEN` bytes under the tag `dst` (parts too). `dst` is at most 255 bytes and `LEN`
/// at most 255 hash outputs; both are constants of this crate.
pub(crate) fn expand<H: XmdHash, const LEN: usize>(parts: &[&[u8]], dst: &[&[u8]]) -> [u8; LEN] {
    const { assert!(LEN > 0 && LEN <= 255 * H::OUTPUT_BYTES && H::BLOCK_BYTES.is_multiple_of(64)) };
    let dst_bytes = dst.iter().map(|d| d.len()).sum::<usize>();
    let dst_len = [u8::try_from(dst_bytes).expect("tags of this crate are short")];
    let finish = |mut hash: H::Hash| {
        for part in dst {
            hash.update(part);
        }
        hash.update(dst_len);
        hash.finalize()
    };

    let mut first = H::Hash::new();
    // Z_pad: one block of zeros.
    (0..H::BLOCK_BYTES / 64).for_each(|_| first.update([0u8; 64]));
    for part in parts {
        first.update(part);
    }
    first.update((LEN as u16).to_be_bytes());
    first.update([0]);
    let mut b0 = finish(first);

    let mut out = [0u8; LEN];
    let mut previous = [0u8; 64];
    for (counter, chunk) in (1u8..=255).zip(out.chunks_mut(H::OUTPUT_BYTES)) {
        let mut hash = H::Hash::new();
        for (b, p) in b0.iter().zip(&previous) {
            hash.update([b ^ p]);
        }
        hash.update([counter]);
        let mut block = finish(hash);
        for (to, from) in previous.iter_mut().zip(block.iter()) {
            *to = *from;
        }
        for (to, from) in chunk.iter_mut().zip(block.iter()) {
            *to = *from;
        }
        block.as_mut_slice().zeroize();
    }
    previous.zeroize();
    b0.as_mut_slice().zeroize();
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG_512: &[u8] = b"QUUX-V01-CS02-with-expander-SHA512-256";
    const TAG_256: &[u8] = b"QUUX-V01-CS02-with-expander-SHA256-128";

    #[test]
    fn rfc_9380_k3_sha512() {
        for (message, want) in [
            ("", "6b9a7312411d92f921c6f68ca0b6380730a1a4d982c507211a90964c394179ba"),
            ("abc", "0da749f12fbe5483eb066a5f595055679b976e93abe9be6f0f6318bce7aca8dc"),
            ("abcdef0123456789", "087e45a86e2939ee8b91100af1583c4938e0f5fc6c9db4b107b83346bc967f58"),
        ] {
            let got: [u8; 32] = expand::<XmdSha512, 32>(&[message.as_bytes()], &[TAG_512]);
            assert_eq!(hex::encode(got), want, "message {message:?}");
        }
    }

    #[test]
    fn rfc_9380_k1_sha256() {
        for (message, want) in [
            ("", "68a985b87eb6b46952128911f2a4412bbc302a9d759667f87f7a21d803f07235"),
            ("abc", "d8ccab23b5985ccea865c6c97b6e5b8350e794e603b4b97902f53a8a0d605615"),
        ] {
            let got: [u8; 32] = expand::<XmdSha256, 32>(&[message.as_bytes()], &[TAG_256]);
            assert_eq!(hex::encode(got), want, "message {message:?}");
        }
    }

    #[test]
    fn parts_are_their_concatenation_and_lengths_are_bound() {
        let whole: [u8; 64] = expand::<XmdSha512, 64>(&[b"abcdef"], &[b"tag"]);
        let parts: [u8; 64] = expand::<XmdSha512, 64>(&[b"ab", b"", b"cdef"], &[b"t", b"ag"]);
        assert_eq!(whole, parts);
        let short: [u8; 32] = expand::<XmdSha512, 32>(&[b"abcdef"], &[b"tag"]);
        assert_ne!(whole[..32], short);
    }
}
