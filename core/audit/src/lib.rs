//! Merkle log, inclusion proofs, receipts, head certificates.
