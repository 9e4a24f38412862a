//! Sealed share files of foreign bytes: they end in an error, since nobody but the key's owner can make one.

use dstack_protocol::ClusterId;
use dstack_secret::Secret;
use dstack_threshold::share_file::{SealingKey, name_of, open};

/// See the module text.
pub(crate) fn run(data: &[u8]) {
    if let Ok(name) = name_of(data) {
        let platform_key = Secret::<32>::from_fn(|key| key.fill(7));
        let key = SealingKey::derive(&ClusterId([1; 32]), b"measurement", None, Some(&platform_key)).expect("a secret is given");
        assert!(open(&key, &name, data).is_err(), "nobody sealed this");
    }
}
