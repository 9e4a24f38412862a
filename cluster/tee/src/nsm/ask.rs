//! What an attestation document is asked to carry. Owns: the sizes that AWS documents. Never: leaves them to the module, since not
//! every implementation of it keeps them.
//! Source: AWS Nitro Enclaves, attestation process: `user_data` and `nonce` up to 512 bytes, `public_key` up to 1024.

use crate::TeeError;

/// Largest `user_data`.
pub const USER_DATA_BYTES_MAX: usize = 512;
/// Largest `nonce`.
pub const NONCE_BYTES_MAX: usize = 512;
/// Largest `public_key`.
pub const PUBLIC_KEY_BYTES_MAX: usize = 1024;

/// Optional parts of a document.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ask {
    /// Anything; dstack puts its report data here.
    pub user_data: Option<Vec<u8>>,
    /// A challenge of whoever will judge the document.
    pub nonce: Option<Vec<u8>>,
    /// A key of the enclave.
    pub public_key: Option<Vec<u8>>,
}

impl Ask {
    /// # Errors
    /// [`TeeError::TooLarge`] names the part.
    pub(super) fn check(&self) -> Result<(), TeeError> {
        let parts = [
            ("user_data", &self.user_data, USER_DATA_BYTES_MAX),
            ("nonce", &self.nonce, NONCE_BYTES_MAX),
            ("public_key", &self.public_key, PUBLIC_KEY_BYTES_MAX),
        ];
        for (what, part, limit_bytes) in parts {
            let have_bytes = part.as_ref().map_or(0, Vec::len);
            if have_bytes > limit_bytes {
                return Err(TeeError::TooLarge { what, have_bytes, limit_bytes });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_end_at_their_documented_sizes() {
        let ask = |user_data: usize, nonce: usize, public_key: usize| Ask {
            user_data: Some(vec![0; user_data]),
            nonce: Some(vec![0; nonce]),
            public_key: Some(vec![0; public_key]),
        };
        assert_eq!(ask(512, 512, 1024).check(), Ok(()));
        assert_eq!(Ask::default().check(), Ok(()));
        let refused = |what, have_bytes, limit_bytes| Err(TeeError::TooLarge { what, have_bytes, limit_bytes });
        assert_eq!(ask(513, 512, 1024).check(), refused("user_data", 513, 512));
        assert_eq!(ask(512, 513, 1024).check(), refused("nonce", 513, 512));
        assert_eq!(ask(512, 512, 1025).check(), refused("public_key", 1025, 1024));
    }
}
