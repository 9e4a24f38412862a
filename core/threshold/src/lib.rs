//! DKG, partial evaluation, proofs, combination; knows nothing of policy.
