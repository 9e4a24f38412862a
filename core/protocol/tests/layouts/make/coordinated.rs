//! Makes what a node says of the intents it combines. Owns: as many statements as there are intents of modes L and E.

use dstack_protocol::coordinated::{Coordinated, CoordinatorWord, Named};
use dstack_protocol::release::{Intent, Mode};

use super::{Make, Source};

impl Make for Coordinated {
    fn make(s: &mut Source<'_>) -> Self {
        let intents: Vec<Intent> = s.list(1, 3);
        let statements = intents.iter().filter(|intent| intent.mode != Mode::Client).map(|_| Make::make(s)).collect();
        Self { coordinator: Make::make(s), sig: Make::make(s), intents, statements }
    }
}

impl Make for Named {
    fn make(s: &mut Source<'_>) -> Self {
        Self { intent_id: Make::make(s), statement_id: Make::make(s) }
    }
}

impl Make for CoordinatorWord {
    fn make(s: &mut Source<'_>) -> Self {
        Self { coordinator: Make::make(s), named: s.list(1, 4), sig: Make::make(s) }
    }
}
