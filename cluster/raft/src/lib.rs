//! Openraft: types, network, state machine, linearizable reads.
