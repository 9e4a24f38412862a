//! The certificate of the cluster's root CA, in mode C. Owns: the question, holding the answer against the pin. Never: takes a certificate
//! that the pin does not speak for: without `ca_pub` there is none.
//! Source: threshold.md §5.1; util and deploy reference §2 (`ca_cert`).

use dstack_certificates::pem;
use dstack_certificates::read::Certificate;
use dstack_protocol::Wire;
use dstack_protocol::codec::{DecodeError, Reader, Writer};
use dstack_protocol::rpc::{PATH_ROOT_CA, ROOT_CA_BYTES_MAX};
use hyper::Method;

use crate::channel::Question;
use crate::client::KmsClient;
use crate::error::{ClientError, NodeFault};
use crate::race::first_answer;

/// DER.
struct Answer(Vec<u8>);

impl Wire for Answer {
    const BYTES_MAX: usize = ROOT_CA_BYTES_MAX;

    fn write(&self, w: &mut Writer) {
        w.raw(&self.0);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self(r.rest().to_vec()))
    }
}

/// Of the pinned key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootCertificate {
    /// PEM.
    pub pem: String,
    /// SubjectPublicKeyInfo, DER.
    pub spki: Vec<u8>,
}

impl KmsClient {
    /// The cluster's root certificate; `None` where the pin has no `ca_pub` to hold one against.
    ///
    /// # Errors
    /// [`ClientError`]; of a certificate of another key [`NodeFault::RootCa`].
    pub async fn root_ca(&self) -> Result<Option<RootCertificate>, ClientError> {
        let Some(pinned) = self.pin().ca_pub else { return Ok(None) };
        let pinned = pinned.spki().ok_or(ClientError::CaPub)?;
        let (request_id, timeout) = (self.begin()?, self.settings().request_timeout);
        let question = Question { method: Method::GET, path: PATH_ROOT_CA, body: Vec::new().into(), request_id: &request_id, timeout };
        let (question, pinned) = (&question, &pinned);
        let order = self.nodes().order();
        let outcome = first_answer(&order, self.settings().hedge_after, |place| async move {
            let Answer(der) = self.anonymous().ask(self.nodes(), place, question).await?;
            judged(&der, pinned).map_err(|fault| self.disbelieved(place, fault))
        });
        outcome.await.map(|(_, root)| Some(root)).map_err(|faults| self.failed(faults))
    }
}

fn judged(der: &[u8], pinned: &[u8]) -> Result<RootCertificate, NodeFault> {
    let wrong = |reason| NodeFault::RootCa { reason };
    let certificate = Certificate::read(der).map_err(|_| wrong("it is no certificate"))?;
    let spki = certificate.key().spki();
    if spki != pinned {
        return Err(wrong("it is of another key"));
    }
    if certificate.ca().is_none() {
        return Err(wrong("it is of no CA"));
    }
    certificate.signed_by(certificate.key()).map_err(|_| wrong("it is not signed by its own key"))?;
    Ok(RootCertificate { pem: pem::certificate(der), spki })
}
