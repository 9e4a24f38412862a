//! The kernel's configfs-tsm and RTMR files, emulated by FUSE over a software TD: what a guest's kernel shows, with a host that can be
//! told to fail. Owns: the semantics of those files, the mount. Never: needs a real TD; needs libfuse or fusermount.
//! Source: Linux, `Documentation/ABI/testing/configfs-tsm-report`, `drivers/virt/coco/tsm.c`, `fs/configfs/file.c`,
//! `sysfs-devices-virtual-misc-tdx_guest`; compared by hand with a 6.12 kernel's own configfs-tsm over a provider module.

mod filesystem;
mod kernel;
mod mount;
mod td;

pub use kernel::Fault;
pub use mount::{Mounted, mount};
pub use td::SoftwareTd;
