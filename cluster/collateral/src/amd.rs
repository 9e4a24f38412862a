//! AMD's key distribution service. Owns: its paths. Never: verifies what it answers; a chain is checked when evidence is judged.
//! Source: AMD VCEK Certificate and KDS Interface Specification (57230), sections "VCEK" and "Certificate chain", "CRL".

use dstack_attest::X509Pool;

use crate::folder::pem_blocks;
use crate::http::Http;
use crate::{Endpoint, FetchError};

const DER: &[&str] = &["application/pkix-cert", "application/pkix-crl", "application/octet-stream", "binary/octet-stream"];
const PEM: &[&str] = &["application/x-pem-file", "application/pem-certificate-chain", "text/plain", "application/octet-stream"];

/// Security versions of a chip's firmware, as an attestation report states them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChipTcb {
    /// Boot loader.
    pub boot_loader: u8,
    /// PSP operating system.
    pub tee: u8,
    /// SNP firmware.
    pub snp: u8,
    /// Microcode.
    pub microcode: u8,
}

/// A client of one endpoint.
#[derive(Debug, Clone)]
pub struct Kds {
    http: Http,
    endpoint: Endpoint,
}

impl Kds {
    /// A client.
    #[must_use]
    pub const fn new(http: Http, endpoint: Endpoint) -> Self {
        Self { http, endpoint }
    }

    /// The chip's certificate for these versions, DER.
    /// # Errors
    /// The request failed, or the product's name is none.
    pub fn vcek(&self, product: &str, chip_id: &[u8; 64], tcb: ChipTcb) -> Result<Vec<u8>, FetchError> {
        let ChipTcb { boot_loader, tee, snp, microcode } = tcb;
        let path = format!(
            "/vcek/v1/{}/{}?blSPL={boot_loader:02}&teeSPL={tee:02}&snpSPL={snp:02}&ucodeSPL={microcode:02}",
            named(product)?,
            hex::encode(chip_id)
        );
        Ok(self.http.get(&self.endpoint, &path, DER)?.body)
    }

    /// Intermediates, root and revocation list of a product.
    /// # Errors
    /// A request failed, or an answer is not what was asked for.
    pub fn product(&self, product: &str) -> Result<X509Pool, FetchError> {
        let name = named(product)?;
        let chain = self.http.get(&self.endpoint, &format!("/vcek/v1/{name}/cert_chain"), PEM)?;
        let blocks = std::str::from_utf8(&chain.body).map_err(|_| "not text".to_owned()).and_then(pem_blocks);
        let blocks = blocks.map_err(|why| chain.content(&why, "a PEM chain"))?;
        let certificates = blocks.into_iter().filter(|(label, _)| label == "CERTIFICATE").map(|(_, der)| der).collect();
        let list = self.http.get(&self.endpoint, &format!("/vcek/v1/{name}/crl"), DER)?;
        X509Pool::new(certificates, vec![list.body.clone()]).map_err(|error| list.content(&error.to_string(), "certificates and a list"))
    }
}

/// Product names stand in a path.
fn named(product: &str) -> Result<&str, FetchError> {
    match !product.is_empty() && product.len() <= 32 && product.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        true => Ok(product),
        false => Err(FetchError::Endpoint { url: crate::error::shown(product), why: "not a product name such as Milan or Genoa" }),
    }
}
