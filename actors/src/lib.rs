//! Thin supervised actix shells around the cores.
