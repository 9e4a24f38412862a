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
use crate::dstack_kms::{self, Answered, DstackKmsError, Question, base_of};
use crate::published::Published;
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
    /// By dstack's protocol.
    #[error("{0}")]
    Dstack(#[from] DstackKmsError),
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
    let urls = nodes(asking.urls)?;
    let first = urls.first().map(ToString::to_string).unwrap_or_default();
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
    let published = Published::of(&client, &AppId(asking.app_id), &released.keys).await;
    Ok(Provided {
        keys: AppKeys::released(&released.keys, &first, published),
        kind: ProviderKind::Kms,
        id: cluster_id.0.to_vec(),
        os_image_hash: None,
    })
}

/// By dstack's protocol: the node that answers learns the keys. The provider's id is its root CA's public key.
///
/// # Errors
/// [`KmsError`].
pub async fn dstack(asking: &Asking<'_>, root_ca: Option<&str>, vm_config: &str) -> Result<Provided, KmsError> {
    let urls = nodes(asking.urls)?;
    let device = Arc::clone(asking.device);
    let evidence_of: EvidenceOf = Arc::new(move |report_data| device.evidence(report_data).map_err(|error| error.to_string()));
    let question = Question {
        urls: &urls,
        route: asking.route,
        settings: asking.settings,
        now: &asking.now,
        root_ca,
        vm_config,
        evidence_of: &evidence_of,
    };
    let Answered { keys, root_spki, os_image_hash } = dstack_kms::fetch(&question).await?;
    let os_image_hash = Some(os_image_hash).filter(|hash| !hash.is_empty());
    Ok(Provided { keys, kind: ProviderKind::Kms, id: root_spki, os_image_hash })
}

/// Addresses, with or without dstack's `/prpc`.
///
/// # Errors
/// [`KmsError::Urls`].
pub fn nodes(urls: &[String]) -> Result<Vec<NodeUrl>, KmsError> {
    let wrong = |reason: String| KmsError::Urls { reason };
    let nodes = urls.iter().map(|url| base_of(url).parse::<NodeUrl>().map_err(|error| wrong(error.to_string())));
    let nodes = nodes.collect::<Result<Vec<_>, _>>()?;
    if nodes.is_empty() { Err(wrong("there is none".to_owned())) } else { Ok(nodes) }
}
