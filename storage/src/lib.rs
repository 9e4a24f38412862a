//! Storage engines (sled, redb), authenticated records, audit segment files.
