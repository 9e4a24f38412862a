//! What the fuzz targets call. Owns: nothing. Never: part of the public face; no product uses it.

use crate::peer::ParsedPeer;

/// Parses a certificate of any origin; what it holds stays inside.
pub fn certificate(der: &[u8]) {
    drop(ParsedPeer::parse(der));
}
