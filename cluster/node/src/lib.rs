//! Binary dstack-kms: one node of the cluster.
