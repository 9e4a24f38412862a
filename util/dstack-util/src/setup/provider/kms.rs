//! Keys of a KMS. Owns: the choice between this cluster's own release (mode C, by the measured pin) and dstack's protocol (mode L).
//! Never: asks a second node once one has answered: what follows is measured.
//! Source: util and deploy reference §4 (kms); architecture.md §4.

use std::sync::Arc;

use dstack_client::trust::TrustError;
use dstack_client::{ClientError, EvidenceOf, KcvStore, KmsClient, NodeUrl, Pin, Route, Settings, Trust};
use dstack_protocol::AppId;
use dstack_protocol::release::{KeyClass, Wish};
use dstack_ratls::Now;
use dstack_tee::Opened;

use super::Provided;
use crate::app_keys::AppKeys;
use crate::setup::compose::ProviderKind;

/// Why the KMS gives no keys.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum KmsError {
    /// The host names no node, or one that is no address.
    #[error("kms_urls in .sys-config.json: {reason}")]
    Urls {
        /// What is wrong.
        reason: String,
    },
    /// Settings of whom to trust.
    #[error("{0}")]
    Trust(#[from] TrustError),
    /// The cluster refuses, or nobody answers.
    #[error("{0}")]
    Client(#[from] ClientError),
    /// A wish that no cluster takes.
    #[error("this instance cannot ask for its keys: {reason}")]
    Wish {
        /// What is wrong.
        reason: String,
    },
}

/// Who asks, and whom.
pub struct Asking<'a> {
    /// Makes evidence.
    pub device: &'a Opened,
    /// Nodes, as the host names them.
    pub urls: &'a [String],
    /// The way to them.
    pub route: &'a Route,
    /// What nodes are judged by.
    pub trust: &'a Trust,
    /// How long things may take.
    pub settings: Settings,
    /// Where check values are kept.
    pub kcv_file: std::path::PathBuf,
    /// The clock.
    pub now: Now,
    /// This app.
    pub app_id: [u8; 20],
    /// This instance, 20 bytes or none.
    pub instance_id: &'a [u8],
}

/// By the cluster's own release: no node learns a key. The provider's id is the cluster's.
///
/// # Errors
/// [`KmsError`].
pub async fn native(asking: &Asking<'_>, pin: Pin) -> Result<Provided, KmsError> {
    let wrong = |reason: String| KmsError::Urls { reason };
    let urls = asking.urls.iter().map(|url| base_of(url).parse::<NodeUrl>().map_err(|error| wrong(error.to_string())));
    let urls = urls.collect::<Result<Vec<_>, _>>()?;
    let Some(first) = urls.first().map(ToString::to_string) else { return Err(wrong("there is none".to_owned())) };
    let device = Arc::clone(asking.device);
    let evidence_of: EvidenceOf = Arc::new(move |report_data| device.evidence(report_data).map_err(|error| error.to_string()));
    let kcvs = KcvStore::new(asking.kcv_file.clone());
    let cluster_id = pin.cluster_id;
    let judge = asking.trust.judge()?;
    let client = KmsClient::new(pin, urls, asking.settings, judge, Arc::clone(&asking.now), evidence_of, Some(kcvs))?;
    let client = client.by(asking.route.clone());
    let wish = |class: KeyClass| Wish::new(class, if class == KeyClass::Disk { asking.instance_id.to_vec() } else { Vec::new() });
    let wishes = [KeyClass::Disk, KeyClass::Env, KeyClass::K256].map(wish).into_iter().collect::<Result<Vec<_>, _>>();
    let wishes = wishes.map_err(|error| KmsError::Wish { reason: error.to_string() })?;
    let released = client.release(&AppId(asking.app_id), &wishes).await?;
    Ok(Provided {
        keys: AppKeys::released(&released.keys, &first),
        kind: ProviderKind::Kms,
        id: cluster_id.0.to_vec(),
        os_image_hash: None,
    })
}

/// A URL without dstack's `/prpc`: hosts write both.
fn base_of(url: &str) -> &str {
    let url = url.trim_end_matches('/');
    url.strip_suffix("/prpc").unwrap_or(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_with_and_without_prpc() {
        for url in ["https://k:1", "https://k:1/", "https://k:1/prpc", "https://k:1/prpc/"] {
            assert_eq!(base_of(url), "https://k:1");
        }
    }
}
