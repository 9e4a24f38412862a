//! The one temporal rule, shown of one platform's evidence: each part holds from its first to its last moment, to the millisecond, and is
//! refused just outside of both with the class that `DATED_PARTS` says.

use dstack_attest::{AttestError, DATED_PARTS};
use dstack_protocol::UnixMillis;

/// Evidence in which one part is what decides at its own dates.
pub(crate) struct Dated<'t> {
    /// As in `DATED_PARTS`.
    pub(crate) part: &'static str,
    /// The first and the last moment, both inside.
    pub(crate) moments_ms: (u64, u64),
    /// Judges the evidence at a time.
    pub(crate) judge: Box<dyn Fn(UnixMillis) -> Result<(), AttestError> + 't>,
}

/// The last moment of a date that names a second.
pub(crate) fn end_of_second(ms: u64) -> u64 {
    ms - ms % 1000 + 999
}

/// Judges every part of `platform` at both moments and just outside; `parts` are those of the table, in its order.
#[track_caller]
pub(crate) fn hold(platform: &str, parts: &[Dated<'_>]) {
    let rows: Vec<_> = DATED_PARTS.iter().filter(|row| row.platform == platform).collect();
    let named: Vec<&str> = rows.iter().map(|row| row.part).collect();
    assert_eq!(parts.iter().map(|dated| dated.part).collect::<Vec<_>>(), named, "{platform}: the parts of the table");
    for (row, Dated { part, moments_ms: (first_ms, last_ms), judge }) in rows.iter().zip(parts) {
        let judged = |ms: u64| judge(UnixMillis(ms)).map_err(|error| error.class());
        assert_eq!(judged(*first_ms), Ok(()), "{platform}, {part}: the first moment");
        assert_eq!(judged(*last_ms), Ok(()), "{platform}, {part}: the last moment");
        assert_eq!(judged(first_ms - 1), Err(row.early), "{platform}, {part}: a clock before the first moment");
        assert_eq!(judged(last_ms + 1), Err(row.late), "{platform}, {part}: just over");
        assert_eq!(judged(last_ms + 86_400_000), Err(row.late), "{platform}, {part}: over for a day");
    }
}
