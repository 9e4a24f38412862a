//! Nitro enclave images (EIF) of a kernel, a command line and ramdisks. Owns: the format and its measurements; the same parts give the
//! same bytes. Never: signs an image, builds a kernel.
//! Source: the public enclave image format, version 4; its measurements are compared with those of a booted image in a test.

mod cpio;
mod image;

pub use cpio::Ramdisk;
pub use image::{Image, Pcrs};
