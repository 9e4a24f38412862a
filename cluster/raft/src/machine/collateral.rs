//! Pins: how the collateral in force is replaced.
//!
//! Owns: what a new bundle must be, judged at log time by every node alike. Never: fetches one, judges evidence with it.
//! The vendors' signatures make a bundle true; these rules keep a proposer from going back to an older truth. A change of them, or
//! of what `attest` takes for verified collateral, needs a new version of the command. Source: issue "attestation complete" item 4; ADR 0010.

use dstack_attest::{CollateralBundle, TrustRoots};
use dstack_protocol::collateral::Pin;
use dstack_protocol::limits::{COLLATERALS_KEPT_MAX, TCB_DATES_MAX};
use dstack_protocol::state::{Blob, State};
use dstack_protocol::{Refusal, RefusalCode, UnixMillis};

/// Its beginning is what the panic hook knows guarded threads by (`dstack_runtime::guard`).
const GUARDED: &str = "guarded-pin";
const STACK_BYTES: usize = 8 * 1024 * 1024;

/// What a pin is judged against, out of the state.
#[derive(Debug, Clone)]
pub struct Standing {
    log_time: UnixMillis,
    collateral_id: [u8; 32],
    kept_count: usize,
    bundle: Vec<u8>,
}

impl Standing {
    /// That of this state.
    #[must_use]
    pub fn of(state: &State) -> Self {
        Self {
            log_time: state.log_time,
            collateral_id: state.collateral_id,
            kept_count: state.collaterals.len(),
            bundle: state.collaterals.get(&state.collateral_id).map(|blob| blob.0.clone()).unwrap_or_default(),
        }
    }

    /// The same at another time: a node whose log stands still judges by its own clock what it takes for itself.
    #[must_use]
    pub fn at(mut self, now: UnixMillis) -> Self {
        self.log_time = now;
        self
    }

    /// The bundle in force, which was verified when it was pinned (that of the genesis document: when that was made).
    #[must_use]
    pub fn in_force(&self) -> CollateralBundle {
        CollateralBundle::parse(&self.bundle).unwrap_or_else(|_| CollateralBundle::empty())
    }
}

/// Judges a pin against the state it would change. What `apply` answers, with its reason.
///
/// # Errors
/// The first rule broken, cheap ones first.
pub fn judge(state: &Standing, roots: &TrustRoots, pin: &Pin) -> Result<CollateralBundle, Refusal> {
    let refuse = |code, expected: &str, got: String| Err(Refusal::new(code, expected, got));
    if state.log_time.0 == 0 {
        return refuse(RefusalCode::OutOfOrder, "a beacon before a pin", "log time 0".to_owned());
    }
    let id = pin.collateral_id();
    if id == state.collateral_id {
        return refuse(RefusalCode::CollateralUnchanged, "another bundle than the one in force", hex(&id));
    }
    if state.kept_count >= COLLATERALS_KEPT_MAX {
        let got = format!("{} bundles", state.kept_count);
        return refuse(RefusalCode::CollateralTooMany, "open intents that name fewer bundles", got)
            .map_err(|refusal: Refusal| refusal.retry_after(30_000));
    }
    let invalid =
        |error: dstack_attest::AttestError| Refusal::new(RefusalCode::CollateralInvalid, "verified collateral", error.to_string());
    let bundle = CollateralBundle::parse(&pin.bundle).map_err(invalid)?;
    if !bundle.is_canonical() {
        return refuse(RefusalCode::CollateralInvalid, "the one text of the bundle's parts", "another text of them".to_owned());
    }
    not_older(state, &bundle, pin)?;
    bundle.check(state.log_time, roots).map_err(invalid)?;
    match bundle.x509().check(state.log_time, roots).first() {
        None => Ok(bundle),
        Some(finding) => {
            let expected = "a pool whose certificates end at known roots and whose lists their issuers signed, all in their time";
            refuse(RefusalCode::CollateralInvalid, expected, finding.to_string())
        }
    }
}

/// Replaces the bundle in force. The old one stays while open intents name it (`beacon::settle`).
pub(super) fn apply(state: &mut State, roots: &TrustRoots, pin: &Pin) -> Result<(), RefusalCode> {
    let standing = Standing::of(state);
    let dates = guarded(|| {
        let bundle = judge(&standing, roots, pin).map_err(|refusal| refusal.code)?;
        Ok((standing.in_force().tcb_dates(), bundle.tcb_dates()))
    });
    let (before, after) = dates?;
    let known = &mut state.tcb_known;
    // What the genesis document's bundle has was known before the first pin.
    let early = if known.is_empty() { UnixMillis(0) } else { state.log_time };
    before.into_iter().for_each(|date| _ = known.entry(date).or_insert(early));
    after.into_iter().for_each(|date| _ = known.entry(date).or_insert(state.log_time));
    while known.len() > TCB_DATES_MAX {
        known.pop_first();
    }
    let id = pin.collateral_id();
    state.collaterals.insert(id, Blob(pin.bundle.clone()));
    state.collateral_id = id;
    Ok(())
}

/// Judges on a thread that is guarded by its name, with a stack of a fixed size: a panic of a parser refuses the pin, on every node
/// alike, and does not stop the log. What it works on is gone with it.
fn guarded<T: Send>(judge: impl FnOnce() -> Result<T, RefusalCode> + Send) -> Result<T, RefusalCode> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(GUARDED.to_owned()).stack_size(STACK_BYTES).spawn_scoped(scope, judge);
        // Without a thread no verdict can be the others': the process ends, and a start applies the entry anew.
        let thread = thread.expect("the system gives a thread to judge a pin");
        thread.join().unwrap_or(Err(RefusalCode::InternalParser))
    })
}

/// No part is older than in force, no platform is lost, something is newer.
fn not_older(state: &Standing, bundle: &CollateralBundle, pin: &Pin) -> Result<(), Refusal> {
    let current = state.in_force();
    let (before, after) = (current.facts(), bundle.facts());
    let mut newer = bundle.x509() != current.x509();
    for fmspc in bundle.fmspcs() {
        match (before.get(fmspc), after.get(fmspc)) {
            (Some(old), Some(new)) => {
                if let Some(part) = new.older_part(old) {
                    let expected = format!("platform {}: nothing older than in force ({old:?})", hex(fmspc));
                    return Err(Refusal::new(RefusalCode::CollateralOlder, expected, format!("older {part} ({new:?})")));
                }
                newer |= new != old;
            }
            (None, Some(_)) => newer = true,
            (_, None) => {
                let got = format!("platform {}: dates that cannot be read", hex(fmspc));
                return Err(Refusal::new(RefusalCode::CollateralInvalid, "verified collateral", got));
            }
        }
    }
    let missing: Vec<[u8; 6]> = current.fmspcs().filter(|fmspc| !bundle.tdx_platforms().contains_key(*fmspc)).copied().collect();
    if missing != pin.dropped {
        let names = |list: &[[u8; 6]]| list.iter().map(|fmspc| hex(fmspc)).collect::<Vec<_>>().join(" ");
        let expected = format!("dropped: {}", names(&missing));
        return Err(Refusal::new(RefusalCode::CollateralDrops, expected, format!("dropped: {}", names(&pin.dropped))));
    }
    for fmspc in &missing {
        if before.get(fmspc).is_some_and(|facts| facts.next_update >= state.log_time) {
            let got = format!("platform {} is dropped while its collateral holds", hex(fmspc));
            return Err(Refusal::new(RefusalCode::CollateralDrops, "every platform whose collateral holds", got));
        }
    }
    if let Some(part) = current.x509().lost_in(bundle.x509(), state.log_time) {
        let got = format!("a {part} is left out while it holds");
        return Err(Refusal::new(RefusalCode::CollateralDrops, "every certificate and list that holds", got));
    }
    if !newer && missing.is_empty() {
        return Err(Refusal::new(RefusalCode::CollateralUnchanged, "a newer part or another platform", "the same parts"));
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
