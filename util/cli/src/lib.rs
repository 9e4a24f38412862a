//! Binary dstack: operators and app owners.
