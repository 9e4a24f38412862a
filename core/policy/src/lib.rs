//! Identity + rules + log position -> Grant, or a refusal with its explanation.
