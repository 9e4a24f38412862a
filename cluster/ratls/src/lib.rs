//! Rustls with evidence in certificates; peer verification; HTTP edges.
