//! From a TCP connection to a lane: TLS, then the greeting of flimcd-wire.
//!
//! Everything is bounded in time and bytes. A connection that is turned away is told why and closed
//! in such a way that the answer arrives: closing with unread bytes would send a reset, which destroys
//! what the other end has not read yet.

use std::{io, sync::Arc, time::Duration};

use flimcd_core::SiteName;
use flimcd_wire::{
    Hello, HelloError, Refusal, RefusalCode, Welcome, decode_hello, decode_reply, encode_hello,
    encode_reply,
};
use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, server::TlsStream};

use crate::{
    IdentityError, LinkError,
    identity::{explain, site_of},
    lane::{Lane, Traffic},
};
use std::sync::atomic::Ordering;

/// More than any greeting has.
const GREETING_BYTES_MAX: usize = 4096;
/// How long a connection that was turned away may take to read why.
const LINGER: Duration = Duration::from_secs(1);
/// Bytes of it that are read and dropped meanwhile.
const LINGER_BYTES_MAX: usize = 64 * 1024;

/// Dials one lane on a fresh connection.
pub(crate) async fn dial(
    tcp: TcpStream,
    tls: Arc<ClientConfig>,
    hello: &Hello,
    expected: &SiteName,
    traffic: &Traffic,
) -> Result<Lane, LinkError> {
    // No name is sent and none is compared: the verifier looks for the site's name instead.
    let name = ServerName::try_from("site.flimcd").map_err(|error| LinkError::Tls {
        source: rustls::Error::General(error.to_string()),
    })?;
    let mut stream = TlsConnector::from(tls)
        .connect(name, tcp)
        .await
        .map_err(tls_error)?;
    let bytes = encode_hello(hello);
    let greeted = async {
        stream.write_all(&bytes).await?;
        stream.flush().await
    };
    let written = greeted.await;
    // A peer that refuses our certificate says so in an alert, which is worth more than the error of
    // a write that failed because it closed.
    let (welcome, received) = match read_greeting(&mut stream, decode_reply).await {
        Ok((welcome, _version, used)) => (welcome, used),
        Err(error) => return Err(error),
    };
    written.map_err(tls_error)?;
    if &welcome.site != expected {
        return Err(IdentityError::WrongSite {
            expected: expected.clone(),
            found: welcome.site,
        }
        .into());
    }
    traffic
        .sent
        .fetch_add(bytes.len() as u64, Ordering::Relaxed);
    traffic
        .received
        .fetch_add(received as u64, Ordering::Relaxed);
    let (tcp, session) = stream.into_inner();
    Ok(Lane::new(hello.lane, tcp, session.into()))
}

/// An accepted connection whose peer has proved who it is and said what it wants.
pub(crate) struct Greeted {
    stream: TlsStream<TcpStream>,
    pub(crate) hello: Hello,
    version: u16,
}

/// An accepted connection that was turned away.
pub(crate) struct TurnedAway {
    /// The site in its certificate, if it came that far.
    pub(crate) site: Option<SiteName>,
    pub(crate) error: LinkError,
}

/// Takes the TLS handshake and the greeting of an accepted connection. On failure the peer was told.
pub(crate) async fn accept(tcp: TcpStream, tls: Arc<ServerConfig>) -> Result<Greeted, TurnedAway> {
    let accepted = TlsAcceptor::from(tls).accept(tcp).into_fallible().await;
    let mut stream = match accepted {
        Ok(stream) => stream,
        Err((error, tcp)) => {
            // The alert is on its way already.
            linger(tcp).await;
            return Err(TurnedAway {
                site: None,
                error: tls_error(error),
            });
        }
    };
    let certificate_site = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| site_of(chain.first()?));
    let refusal = match (
        read_greeting(&mut stream, decode_hello).await,
        &certificate_site,
    ) {
        (Ok((hello, version, _)), Some(site)) if hello.site == *site => {
            return Ok(Greeted {
                stream,
                hello,
                version,
            });
        }
        (Ok((hello, ..)), site) => Refusal {
            code: RefusalCode::Site,
            text: match site {
                Some(site) => format!(
                    "it says that it is site {}, but its certificate is of site {site}; correct the \
                     name in its configuration",
                    hello.site
                ),
                None => IdentityError::NoSite.to_string(),
            },
        },
        (Err(LinkError::Hello(error @ HelloError::Version { .. })), _) => Refusal {
            code: RefusalCode::Version,
            text: error.to_string(),
        },
        (Err(error), _) => {
            linger(stream).await;
            return Err(TurnedAway {
                site: certificate_site,
                error,
            });
        }
    };
    Err(TurnedAway {
        error: turn_away(stream, refusal).await,
        site: certificate_site,
    })
}

impl Greeted {
    /// Answers that the connection is taken.
    pub(crate) async fn welcome(
        mut self,
        site: &SiteName,
        traffic: &Traffic,
    ) -> Result<Lane, LinkError> {
        let reply = encode_reply(&Ok((Welcome { site: site.clone() }, self.version)));
        self.stream.write_all(&reply).await.map_err(tls_error)?;
        self.stream.flush().await.map_err(tls_error)?;
        traffic
            .sent
            .fetch_add(reply.len() as u64, Ordering::Relaxed);
        let (tcp, session) = self.stream.into_inner();
        Ok(Lane::new(self.hello.lane, tcp, session.into()))
    }

    /// Answers that it is not, and why.
    pub(crate) async fn refuse(self, refusal: Refusal) -> LinkError {
        turn_away(self.stream, refusal).await
    }
}

async fn turn_away(mut stream: TlsStream<TcpStream>, refusal: Refusal) -> LinkError {
    let reply = encode_reply(&Err(refusal.clone()));
    if stream.write_all(&reply).await.is_ok() && stream.shutdown().await.is_ok() {
        linger(stream).await;
    }
    LinkError::TurnedAway(refusal)
}

/// Reads and drops a little, until the other end has closed.
async fn linger(stream: impl AsyncRead) {
    let mut rest = std::pin::pin!(stream.take(LINGER_BYTES_MAX as u64));
    let _ = timeout(LINGER, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
}

type Decoded<T> = Result<Option<(T, u16, usize)>, HelloError>;

/// Reads until `decode` is content. Both greetings end exactly where they say, so what follows in the
/// stream is left in it.
async fn read_greeting<T>(
    stream: &mut (impl AsyncRead + Unpin),
    decode: impl Fn(&[u8]) -> Decoded<T>,
) -> Result<(T, u16, usize), LinkError> {
    let mut bytes = Vec::new();
    loop {
        if let Some(decoded) = decode(&bytes)? {
            return Ok(decoded);
        }
        if bytes.len() >= GREETING_BYTES_MAX {
            return Err(HelloError::Malformed.into());
        }
        // One byte at a time from a buffer in memory: the first frame may follow at once.
        bytes.push(stream.read_u8().await.map_err(tls_error)?);
    }
}

/// The TLS failure inside an I/O error, if there is one.
fn tls_error(error: io::Error) -> LinkError {
    match error.downcast::<rustls::Error>() {
        Ok(error) => explain(error),
        Err(error) => LinkError::io(error),
    }
}
