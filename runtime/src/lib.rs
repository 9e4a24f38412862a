//! Configuration, telemetry, clock, process hardening; shared by the binaries.
