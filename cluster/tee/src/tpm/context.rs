//! Talking to the TPM. Owns: the TCTI text, a context per request, turns. Never: keeps an object in the TPM between two requests: a raw
//! TPM has three slots and nobody to swap them.

use super::TpmError;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use tss_esapi::handles::ObjectHandle;
use tss_esapi::{Context, TctiNameConf};

/// One TPM. Threads take turns: a context belongs to one of them, and a TPM without a resource manager to one connection.
#[derive(Debug)]
pub struct Tpm {
    tcti: String,
    name: TctiNameConf,
    turn: Mutex<()>,
}

impl Tpm {
    /// The TPM behind `tcti`: `device:PATH` or `swtpm:host=ADDRESS,port=PORT`. Connects once to see whether it answers.
    ///
    /// # Errors
    /// [`TpmError::BadTcti`], [`TpmError::Unreachable`].
    pub fn open(tcti: &str) -> Result<Self, TpmError> {
        let bad = || TpmError::BadTcti { tcti: tcti.to_owned() };
        let known = ["device:", "swtpm:"].iter().any(|kind| tcti.starts_with(kind));
        let name = TctiNameConf::from_str(tcti).ok().filter(|_| known).ok_or_else(bad)?;
        let tpm = Self { tcti: tcti.to_owned(), name, turn: Mutex::new(()) };
        tpm.with(|_| Ok(()))?;
        Ok(tpm)
    }

    /// Runs `work` on a connection of its own. What it loaded is flushed at the end.
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Context) -> Result<T, TpmError>) -> Result<T, TpmError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let unreachable = |cause: tss_esapi::Error| TpmError::Unreachable { tcti: self.tcti.clone(), cause: cause.to_string() };
        let mut context = Context::new(self.name.clone()).map_err(unreachable)?;
        work(&mut context)
    }
}

/// Gives `object` to `work` and flushes it, whatever became of the work.
pub(super) fn with_object<T>(
    context: &mut Context,
    object: ObjectHandle,
    work: impl FnOnce(&mut Context) -> Result<T, TpmError>,
) -> Result<T, TpmError> {
    let result = work(context);
    match context.flush_context(object) {
        Ok(()) => result,
        Err(cause) => result.and(Err(TpmError::of("flush an object")(cause))),
    }
}
