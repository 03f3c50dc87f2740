//! A peer made by hand: real TLS with a real certificate, and then whatever a test wants to send.

use std::sync::Arc;

use flimcd_link::TlsIdentity;
use flimcd_wire::{Hello, HelloError, Welcome, decode_reply, encode_hello};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    version::TLS13,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::pair::site;

/// Takes any server: it is the server that is tested here.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

pub(crate) fn hello(name: &str, lane: u8, lanes: u8) -> Hello {
    Hello {
        site: site(name),
        bundle: 1,
        lane,
        lanes,
    }
}

/// A TLS connection to `address`, with a certificate or without one.
pub(crate) async fn connect(address: &str, identity: Option<&TlsIdentity>) -> TlsStream<TcpStream> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone));
    let config = match identity {
        Some(identity) => {
            let chain = CertificateDer::from_pem_slice(identity.cert_pem.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).unwrap();
            builder.with_client_auth_cert(vec![chain], key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("anyone").unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await
        .unwrap()
}

/// Sends a greeting as bytes and returns the answer; `None` when the connection ends instead.
pub(crate) async fn greet(
    stream: &mut TlsStream<TcpStream>,
    greeting: &[u8],
) -> Option<Result<Welcome, HelloError>> {
    stream.write_all(greeting).await.ok()?;
    stream.flush().await.ok()?;
    let mut bytes = Vec::new();
    loop {
        match decode_reply(&bytes) {
            Ok(Some((welcome, ..))) => return Some(Ok(welcome)),
            Ok(None) => bytes.push(stream.read_u8().await.ok()?),
            Err(error) => return Some(Err(error)),
        }
    }
}

/// All lanes of a bundle, greeted.
pub(crate) async fn bundle(
    address: &str,
    identity: &TlsIdentity,
    name: &str,
    number: u64,
) -> Vec<TlsStream<TcpStream>> {
    let mut lanes = Vec::new();
    for lane in 0..3 {
        let mut stream = connect(address, Some(identity)).await;
        let hello = Hello {
            bundle: number,
            ..hello(name, lane, 3)
        };
        greet(&mut stream, &encode_hello(&hello))
            .await
            .unwrap()
            .unwrap();
        lanes.push(stream);
    }
    lanes
}

/// Reads until the other end closes.
pub(crate) async fn read_to_end(stream: &mut TlsStream<TcpStream>) {
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
}
