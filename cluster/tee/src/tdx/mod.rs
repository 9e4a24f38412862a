//! Evidence of a TD, made by its kernel. Owns: quotes by configfs-tsm, runtime registers by sysfs, the two event logs, the device.
//! Never: judges a quote; talks to the host beside the kernel.

mod device;
mod guest;
mod rtmr;
mod tsm;

pub use device::TdxDevice;
#[cfg(feature = "tpm")]
pub(crate) use guest::firmware_log;
pub use guest::{Attested, TdGuest};
pub use rtmr::{RTMR_DIR, Rtmr};
pub use tsm::{QUOTE_BYTES_MAX, TSM_ROOT, Tsm, TsmError};
