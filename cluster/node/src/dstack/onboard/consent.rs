//! Whether this node may take part in its cluster yet, where an operator has to say so. Owns: the word for it, on disk and for those who
//! wait. Never: a secret; decides membership: that is attestation, the genesis document and the quorum.
//!
//! The file proves nothing to anybody: a host that makes or removes it makes a node ask for admission, or wait for its operator.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use tokio::sync::watch;
use tracing::info;

use crate::files::write_durably;

const FILE: &str = "onboarding";

/// By which method an operator let this node take part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// `Bootstrap`: it forms the cluster with the others.
    Bootstrap,
    /// `Onboard`: it joins a cluster that is formed.
    Onboard,
}

impl By {
    const ALL: [Self; 2] = [Self::Bootstrap, Self::Onboard];

    const fn word(self) -> &'static str {
        match self {
            Self::Bootstrap => "bootstrap",
            Self::Onboard => "onboard",
        }
    }
}

/// See the module text.
pub(crate) struct Consent {
    path: PathBuf,
    /// `None` while nobody has said so.
    given: watch::Sender<Option<By>>,
}

/// Waits for it.
#[derive(Debug, Clone)]
pub(crate) struct Permit(Option<watch::Receiver<Option<By>>>);

impl Permit {
    /// Of a node that asks nobody.
    pub(crate) const fn free() -> Self {
        Self(None)
    }

    /// Returns when the node may take part.
    pub(crate) async fn given(mut self) {
        if let Some(given) = &mut self.0
            && given.wait_for(Option::is_some).await.is_err()
        {
            // Whoever could give it is gone: the node stops.
            std::future::pending::<()>().await;
        }
    }
}

impl Consent {
    /// Reads what was said before this start.
    ///
    /// # Errors
    /// The file cannot be read, or no node wrote it.
    pub(crate) fn load(data_dir: &std::path::Path) -> anyhow::Result<Arc<Self>> {
        let path = data_dir.join(FILE);
        let given = match std::fs::read_to_string(&path) {
            Ok(text) => match By::ALL.into_iter().find(|by| by.word() == text.trim_end()) {
                Some(by) => Some(by),
                None => bail!("{}: not written by a node; remove it and call Bootstrap or Onboard", path.display()),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        Ok(Arc::new(Self { path, given: watch::Sender::new(given) }))
    }

    /// What was said.
    pub(crate) fn by(&self) -> Option<By> {
        *self.given.borrow()
    }

    /// For those who wait.
    pub(crate) fn permit(&self) -> Permit {
        Permit(Some(self.given.subscribe()))
    }

    /// Returns when it is given by this method.
    pub(super) async fn given_by(&self, by: By) {
        let mut given = self.given.subscribe();
        if given.wait_for(|given| *given == Some(by)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Gives it, durably: a node that took part goes on after a restart without its operator. Again by the same method, nothing happens.
    ///
    /// # Errors
    /// The file cannot be written; nothing is given.
    pub(super) async fn give(&self, by: By) -> anyhow::Result<()> {
        if self.by() == Some(by) {
            return Ok(());
        }
        let path = self.path.clone();
        tokio::task::spawn_blocking(move || write_durably(&path, format!("{}\n", by.word()).as_bytes())).await.context("thread")??;
        self.given.send_replace(Some(by));
        info!(by = by.word(), "an operator lets this node take part");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn is_given_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let consent = Consent::load(dir.path()).unwrap();
        assert_eq!(consent.by(), None);
        let waiting = tokio::spawn(consent.permit().given());
        assert!(!waiting.is_finished());
        consent.give(By::Onboard).await.unwrap();
        waiting.await.unwrap();
        consent.given_by(By::Onboard).await;
        let again = Consent::load(dir.path()).unwrap();
        assert_eq!(again.by(), Some(By::Onboard));
        again.permit().given().await;
        Permit::free().given().await;
    }

    #[test]
    fn refuses_a_file_that_no_node_wrote() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "yes\n", "bootstrap onboard\n"] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            assert!(Consent::load(dir.path()).is_err(), "{text:?}");
        }
    }
}
