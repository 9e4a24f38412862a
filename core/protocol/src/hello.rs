//! First bytes of each side of a node connection (architecture.md §2).

use crate::codec::{DecodeError, Reader, Wire, Writer};
use crate::ids::{ClusterId, Seat};

/// Exporter label under which the connecting node signs.
pub const EXPORTER_LABEL_CLIENT: &str = "EXPORTER-DKMS-V1-C";
/// Exporter label under which the accepting node signs.
pub const EXPORTER_LABEL_SERVER: &str = "EXPORTER-DKMS-V1-S";
/// Encoded length of a [`Hello`], bytes.
pub const HELLO_BYTES: usize = 13 + 1 + 32 + 2 + 32 + 64;

/// `HELLO = "DKMS-V1-HELLO" ‖ version(1)=1 ‖ cluster_id(32) ‖ seat(2) ‖ node_key(32) ‖ sig(64)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Cluster the sender belongs to.
    pub cluster_id: ClusterId,
    /// Seat it holds.
    pub seat: Seat,
    /// Ed25519 key of the node.
    pub node_key: [u8; 32],
    /// Signature over [`signed_bytes`].
    pub sig: [u8; 64],
}

/// `"DKMS-V1-TLS" ‖ cluster_id ‖ seat ‖ exporter`: what the node key signs.
#[must_use]
pub fn signed_bytes(cluster_id: &ClusterId, seat: Seat, exporter: &[u8; 32]) -> Vec<u8> {
    let mut w = Writer::labelled("DKMS-V1-TLS");
    w.raw(&cluster_id.0).u16(seat.0).raw(exporter);
    w.into_bytes()
}

impl Wire for Hello {
    const BYTES_MAX: usize = HELLO_BYTES;
    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-HELLO").raw(&self.cluster_id.0).u16(self.seat.0).raw(&self.node_key).raw(&self.sig);
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-HELLO")?;
        Ok(Self {
            cluster_id: ClusterId::read("cluster_id", r)?,
            seat: Seat::read("seat", r)?,
            node_key: r.array("node_key")?,
            sig: r.array("sig")?,
        })
    }
}
