//! Fetches collateral from those who publish it. Owns: the HTTP clients and what they may reach.
//! Never: believes what it fetched (`attest` checks it), runs on the path of a request.
//! Source: Intel PCS API v4, AMD KDS, RFC 5280 (AIA, CRL distribution points).
#![forbid(unsafe_code)]
