//! `quote`, `eventlog`, `extend`, `replay-imr`: this machine's raw quote and its log. Owns: their output. Never: proves anything to the one who
//! runs them; the log is this machine's own word.

use std::fmt::Write as _;
use std::io::Read as _;

use anyhow::{Context as _, bail};
use dstack_attest::eventlog::runtime_digest;
use dstack_attest::wire::{RuntimeEvent, TdxEvent};
use dstack_protocol::Platform;
use sha2::{Digest as _, Sha384};

use super::{filled, hex_bytes, put};
use crate::machine::{Machine, event};

/// Report data from standard input, the raw quote to standard output.
///
/// # Errors
/// The device's; an enclave has no raw quote.
pub fn quote(machine: &Machine) -> anyhow::Result<()> {
    let mut input = Vec::new();
    std::io::stdin().take(65).read_to_end(&mut input).context("cannot read report data")?;
    let report_data = filled(&input)?;
    if machine.device().platform() == Platform::Nitro {
        bail!("an enclave has no raw quote: use quote-report");
    }
    put(None, &machine.device().quote(report_data)?.quote, "", 0o600)
}

/// The whole event log, a JSON array.
///
/// # Errors
/// The device's.
pub fn eventlog(machine: &Machine) -> anyhow::Result<()> {
    let log: serde_json::Value =
        serde_json::from_str(&machine.device().quote([0; 64])?.event_log).context("the device's log is no JSON")?;
    put(None, serde_json::to_string_pretty(&log)?.as_bytes(), "\n", 0o600)
}

/// Measures one event.
///
/// # Errors
/// The device's.
pub fn extend(machine: &Machine, name: &str, payload: &str) -> anyhow::Result<()> {
    Ok(machine.measure(&event(name, &hex_bytes("the payload", payload)?))?)
}

/// What the log leads to, by register.
///
/// # Errors
/// The device's; an event of a register that does not exist.
pub fn replay_imr(machine: &Machine) -> anyhow::Result<()> {
    let quote = machine.device().quote([0; 64])?;
    let log = TdxEvent::parse_log(quote.event_log.as_bytes()).context("the device's log")?;
    put(None, replayed(&log)?.as_bytes(), "", 0o600)
}

fn replayed(log: &[TdxEvent]) -> anyhow::Result<String> {
    let (mut registers, mut counts) = ([[0u8; 48]; 4], [0usize; 4]);
    for event in log {
        let at = usize::try_from(event.imr)?;
        let (register, count) = registers.get_mut(at).zip(counts.get_mut(at)).with_context(|| format!("an event of register {at}"))?;
        let digest = match event.digest.is_empty() && event.is_runtime() {
            // stripped: the digest is that of name and payload
            true => {
                runtime_digest(&RuntimeEvent { event: event.event.clone(), payload: event.event_payload.clone(), version: event.version })
                    .to_vec()
            }
            false => event.digest.clone(),
        };
        *register = Sha384::new().chain_update(*register).chain_update(digest).finalize().into();
        *count = count.saturating_add(1);
    }
    let mut out = format!("events: {}\n", log.len());
    for (at, (register, count)) in registers.iter().zip(counts).enumerate() {
        writeln!(out, "IMR {at}: {count} events, {}", hex::encode(register))?;
    }
    out.push_str("What the log leads to, not what the hardware holds: compare with the RTMRs of a verified quote.\n");
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dstack_attest::eventlog::replay_runtime;
    use dstack_attest::wire::RUNTIME_EVENT_TYPE;

    #[test]
    fn stripped_and_whole_logs_lead_to_the_same_register() {
        let events = [event("app-id", &[0x11; 20]), event("compose-hash", &[0x44; 32])];
        let logged = |digest: bool| {
            let of = |event: &RuntimeEvent| TdxEvent {
                imr: 3,
                event_type: RUNTIME_EVENT_TYPE,
                digest: if digest { runtime_digest(event).to_vec() } else { Vec::new() },
                event: event.event.clone(),
                event_payload: event.payload.clone(),
                ..TdxEvent::default()
            };
            events.iter().map(of).collect::<Vec<_>>()
        };
        let expected = format!("IMR 3: 2 events, {}\n", hex::encode(replay_runtime(&events)));
        for digest in [true, false] {
            assert!(replayed(&logged(digest)).unwrap().contains(&expected));
        }
        let beyond = TdxEvent { imr: 4, ..TdxEvent::default() };
        assert!(replayed(&[beyond]).is_err());
    }
}
