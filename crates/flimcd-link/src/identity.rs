//! Who is at the other end: TLS 1.3 with certificates on both sides, and the site's name in them.
//!
//! Chains are checked by webpki. On top of that the certificate must hold exactly one site name
//! (see [`crate::pki`]), because that, and not an address, is a peer's identity.

use std::sync::Arc;

use flimcd_core::SiteName;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError,
    RootCertStore, ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, ring, verify_tls13_signature},
    pki_types::{
        CertificateDer, PrivateKeyDer, ServerName, UnixTime,
        pem::{self, PemObject as _},
    },
    server::{ParsedCertificate, WebPkiClientVerifier},
    version::TLS13,
};
use x509_parser::{extensions::GeneralName, prelude::FromDer as _};

use crate::{ConfigError, IdentityError, LinkError, pki::SITE_URI};

/// A site's certificates, as PEM text.
#[derive(Clone)]
pub struct TlsIdentity {
    /// The authority that both sites trust (`ca.pem`).
    pub ca_pem: String,
    /// This site's certificate (`SITE.pem`).
    pub cert_pem: String,
    /// This site's private key (`SITE.key`).
    pub key_pem: String,
}

impl std::fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsIdentity").finish_non_exhaustive()
    }
}

/// What is needed to open and to accept connections.
pub(crate) struct Credentials {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    pub(crate) server: Arc<ServerConfig>,
}

impl Credentials {
    pub(crate) fn new(site: &SiteName, pem: &TlsIdentity) -> Result<Self, ConfigError> {
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        for authority in certificates("certificate of the authority (ca)", &pem.ca_pem)? {
            roots.add(authority)?;
        }
        let roots = Arc::new(roots);
        let chain = certificates("certificate of this site (cert)", &pem.cert_pem)?;
        let key = PrivateKeyDer::from_pem_slice(pem.key_pem.as_bytes())
            .map_err(|error| pem_error("private key of this site (key)", &error))?;
        match site_of(&chain[0]) {
            Some(found) if &found == site => {}
            Some(found) => {
                return Err(ConfigError::WrongSite {
                    configured: site.clone(),
                    found,
                });
            }
            None => return Err(ConfigError::NoSite),
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| ConfigError::Pem {
                what: "certificate of the authority (ca)",
                problem: error.to_string(),
            })?;
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())?;
        // Every connection proves both identities anew.
        server.send_tls13_tickets = 0;
        Ok(Self {
            provider,
            roots,
            chain,
            key,
            server: Arc::new(server),
        })
    }

    /// TLS settings to dial `expected` and nobody else.
    pub(crate) fn client(&self, expected: &SiteName) -> Result<Arc<ClientConfig>, ConfigError> {
        let verifier = SiteVerifier {
            provider: self.provider.clone(),
            roots: self.roots.clone(),
            expected: expected.clone(),
        };
        let mut client = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        Ok(Arc::new(client))
    }

    /// Unpredictable bits.
    pub(crate) fn random(&self) -> u64 {
        let mut bytes = [0; 8];
        // Without randomness there is no TLS either, so the connection fails a moment later; a
        // constant here only makes two bundles look alike until then.
        let _ = self.provider.secure_random.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }
}

fn certificates(
    what: &'static str,
    pem: &str,
) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let found = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| pem_error(what, &error))?;
    if found.is_empty() {
        return Err(pem_error(what, &pem::Error::NoItemsFound));
    }
    Ok(found)
}

fn pem_error(what: &'static str, error: &pem::Error) -> ConfigError {
    ConfigError::Pem {
        what,
        problem: error.to_string(),
    }
}

/// The site that a certificate names: its only URI of our scheme, and a valid name.
pub(crate) fn site_of(certificate: &[u8]) -> Option<SiteName> {
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    let names = parsed.subject_alternative_name().ok()??;
    let mut sites = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix(SITE_URI),
            _ => None,
        });
    let site = sites.next()?;
    if sites.next().is_some() {
        return None;
    }
    site.parse().ok()
}

/// Takes a server whose chain leads to our authority and whose certificate names the expected site.
#[derive(Debug)]
struct SiteVerifier {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    expected: SiteName,
}

impl ServerCertVerifier for SiteVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        let problem = match site_of(end_entity) {
            Some(found) if found == self.expected => return Ok(ServerCertVerified::assertion()),
            Some(found) => IdentityError::WrongSite {
                expected: self.expected.clone(),
                found,
            },
            None => IdentityError::NoSite,
        };
        Err(CertificateError::Other(OtherError(Arc::new(problem))).into())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}

/// What a TLS failure means for a person.
pub(crate) fn explain(error: rustls::Error) -> LinkError {
    use rustls::{AlertDescription as Alert, Error};
    match error {
        Error::InvalidCertificate(problem) => explain_certificate(&problem).into(),
        Error::NoCertificatesPresented => {
            IdentityError::Refused("it presented none".into()).into()
        }
        Error::AlertReceived(alert) => match alert {
            Alert::UnknownCA => IdentityError::RefusedByPeer(
                "it trusts another authority; issue the certificates of both sites with the same \
                 one (flimcd pki issue)",
            )
            .into(),
            Alert::CertificateExpired => IdentityError::RefusedByPeer(
                "it has expired, or a clock is wrong; issue a new one (flimcd pki issue SITE --force)",
            )
            .into(),
            Alert::BadCertificate | Alert::CertificateUnknown | Alert::UnsupportedCertificate => {
                IdentityError::RefusedByPeer(
                    "it does not verify there, or it names another site than the peer expects; \
                     check the names in both configurations",
                )
                .into()
            }
            Alert::DecryptError => IdentityError::RefusedByPeer(
                "its signature does not verify; issue the certificates of both sites with the same \
                 authority (flimcd pki issue)",
            )
            .into(),
            _ => LinkError::Tls { source: error },
        },
        _ => LinkError::Tls { source: error },
    }
}

fn explain_certificate(problem: &CertificateError) -> IdentityError {
    match problem {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            IdentityError::UnknownAuthority
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            IdentityError::Expired
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            IdentityError::NotValidYet
        }
        CertificateError::Other(OtherError(other)) => other
            .downcast_ref::<IdentityError>()
            .cloned()
            .unwrap_or_else(|| IdentityError::Refused(other.to_string())),
        other => IdentityError::Refused(other.to_string()),
    }
}
