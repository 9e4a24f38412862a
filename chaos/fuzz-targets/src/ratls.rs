//! The certificate that a peer shows in a handshake, before anything of it is believed.

/// See the module text.
pub(crate) fn run(data: &[u8]) {
    dstack_ratls::fuzzing::certificate(data);
}
