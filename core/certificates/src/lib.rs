//! Certificates of a cluster's CA. Owns: names, extensions and dates of each kind, building what is to be signed, reading it back.
//! Never: a clock, randomness, a root key. Source: threshold.md §5.2; KMS API reference §8.
