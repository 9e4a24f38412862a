//! The publishers that the configuration names, asked in one go.
//!
//! Owns: which of them a round asks for what, and putting the answers into one bundle. Never: proposes, believes an answer (each part
//! is checked before it is in the bundle, and again by the log).

use std::collections::{BTreeMap, BTreeSet};

use dstack_attest::{CollateralBundle, TrustRoots, X509Pool};
use dstack_collateral::{Endpoint, FetchError, Http, Intel, Kds, LinkHosts, PoolSources, Refreshed, gather, merge, refresh};
use dstack_protocol::UnixMillis;
use dstack_protocol::collateral::{Want, Wants};

use super::service::Round;
use crate::config::CollateralConfig;

/// See the module text.
#[derive(Clone)]
pub(super) struct Sources {
    intel: Vec<Intel>,
    pool: PoolSources,
}

impl Sources {
    /// Those of a checked configuration.
    pub(super) fn of(config: &CollateralConfig) -> Self {
        let endpoints = |urls: &[String]| urls.iter().filter_map(|url| Endpoint::parse(url).ok()).collect::<Vec<_>>();
        let http = Http::default();
        Self {
            intel: endpoints(&config.intel).into_iter().map(|endpoint| Intel::new(http, endpoint)).collect(),
            pool: PoolSources {
                kds: endpoints(&config.amd).into_iter().map(|endpoint| Kds::new(http, endpoint)).collect(),
                http,
                // Checked when the configuration was: none is reached otherwise.
                hosts: LinkHosts::new(&config.link_hosts).unwrap_or_else(|_| LinkHosts::none()),
            },
        }
    }

    /// Asks. Blocking.
    pub(super) fn ask(
        &self,
        current: &CollateralBundle,
        wants: &Wants,
        round: Round,
        roots: &TrustRoots,
        now: UnixMillis,
    ) -> Result<Refreshed, FetchError> {
        let platforms: BTreeSet<[u8; 6]> =
            wants.0.iter().filter_map(|want| if let Want::Tdx(fmspc) = want { Some(*fmspc) } else { None }).collect();
        let mut refreshed = match round {
            Round::All => refresh(current, &platforms, &self.intel, roots, now)?,
            Round::Missing => {
                // Of the bundle in force nothing is asked for anew.
                let asked = refresh(&CollateralBundle::empty(), &platforms, &self.intel, roots, now)?;
                let parts = asked.bundle.map(|bundle| bundle.tdx_platforms().clone()).unwrap_or_default();
                let parts: BTreeMap<_, _> = parts.into_iter().filter(|(fmspc, _)| !current.tdx_platforms().contains_key(fmspc)).collect();
                let bundle = if parts.is_empty() { None } else { Some(merge(current, parts, &X509Pool::default(), now)?) };
                Refreshed { bundle, ..asked }
            }
        };
        let gathered = gather(current.x509(), wants, round == Round::All, &self.pool, roots, now);
        refreshed.failures.extend(gathered.failures);
        refreshed.unanswered_others = gathered.unanswered;
        if !gathered.pool.is_empty() {
            let base = refreshed.bundle.as_ref().unwrap_or(current);
            refreshed.bundle = Some(merge(base, BTreeMap::new(), &gathered.pool, now)?);
        }
        Ok(refreshed)
    }
}
