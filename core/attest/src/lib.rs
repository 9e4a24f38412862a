//! Evidence + collateral + time -> VerifiedIdentity; one module per platform.
