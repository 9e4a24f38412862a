//! Values of what pins collateral.

use dstack_protocol::collateral::{Pin, PinRequest};

use super::{Make, Source};

impl Make for Pin {
    fn make(s: &mut Source<'_>) -> Self {
        Self { dropped: s.set(3), bundle: s.bytes(0, 60) }
    }
}

impl Make for PinRequest {
    fn make(s: &mut Source<'_>) -> Self {
        Self { operator: Make::make(s), sig: Make::make(s), pin: Make::make(s) }
    }
}
