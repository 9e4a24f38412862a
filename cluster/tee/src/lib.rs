//! Evidence producers and sealing: the software device and, later, hardware.
