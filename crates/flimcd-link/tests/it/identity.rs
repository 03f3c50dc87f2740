//! Who is let in, who is not, and what each side is told.

use std::{
    fs,
    time::{Duration, SystemTime},
};

use flimcd_link::{
    ConfigError, Endpoint, IdentityError, LinkConfig, LinkError, LinkHandle, TlsIdentity,
};
use flimcd_wire::{HelloError, RefusalCode, encode_hello};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::{
    pair::{Authority, next_up, site},
    raw::{connect, greet, hello, read_to_end},
};

/// The failure of a dialler, once there is one.
async fn failure(link: &LinkHandle) -> LinkError {
    loop {
        if let Some(error) = link.last_error() {
            return error;
        }
        tokio::task::yield_now().await;
    }
}

async fn dial(config: LinkConfig, peer: &str, address: &str) -> LinkError {
    let endpoint = Endpoint::new(config).unwrap();
    let link = endpoint.link(&site(peer), address).unwrap();
    let error = failure(&link).await;
    endpoint.stop();
    error
}

/// A certificate of `name` as [`flimcd_link::pki`] would not make it.
fn odd_certificate(
    authority: &Authority,
    name: &str,
    tune: impl Fn(&mut CertificateParams),
) -> TlsIdentity {
    let read = |file| fs::read_to_string(authority.path().join(file)).unwrap();
    let ca_key = KeyPair::from_pem(&read("ca.key")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), ca_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    let uri = format!("flimcd://site/{name}").try_into().unwrap();
    params.subject_alt_names = vec![SanType::URI(uri)];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    tune(&mut params);
    TlsIdentity {
        ca_pem: read("ca.pem"),
        cert_pem: params.signed_by(&key, &issuer).unwrap().pem(),
        key_pem: key.serialize_pem(),
    }
}

#[tokio::test]
async fn names_that_are_no_dns_names_identify_sites() {
    let authority = Authority::new();
    let (long, odd) = ("x".repeat(64), "Ber_lin.1-A");
    let listener = authority.endpoint(&long, &[odd]);
    let address = listener.listen("127.0.0.1:0").await.unwrap().to_string();
    let dialler = authority.endpoint(odd, &[&long]);
    let link = dialler.link(&site(&long), &address).unwrap();
    assert_eq!(next_up(&link).await, 1);
    assert_eq!(next_up(&listener.peer(&site(odd)).unwrap()).await, 1);
    assert!(link.last_error().is_none());
    assert!(listener.peer(&site("other")).is_err());
    dialler.stop();
    listener.stop();
}

#[tokio::test]
async fn a_listener_of_another_authority_or_name_is_not_talked_to() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let listener = theirs.endpoint("east", &["west"]);
    let address = listener.listen("127.0.0.1:0").await.unwrap().to_string();
    let error = dial(ours.config("west", &["east"]), "east", &address).await;
    assert!(
        matches!(error, LinkError::Identity(IdentityError::UnknownAuthority)),
        "{error:?}"
    );
    assert!(error.to_string().contains("flimcd pki issue"), "{error}");

    let error = dial(theirs.config("west", &["north"]), "north", &address).await;
    let LinkError::Identity(IdentityError::WrongSite { expected, found }) = &error else {
        panic!("{error:?}")
    };
    assert_eq!((expected.as_str(), found.as_str()), ("north", "east"));
    listener.stop();
}

#[tokio::test]
async fn a_dialler_that_is_not_let_in_learns_why() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let listener = ours.endpoint("east", &["west"]);
    let address = listener.listen("127.0.0.1:0").await.unwrap().to_string();

    // It trusts our authority, but has its certificate from another one.
    let mut config = theirs.config("west", &["east"]);
    config.tls.ca_pem = ours.identity("west").ca_pem;
    let error = dial(config, "east", &address).await;
    assert!(
        matches!(error, LinkError::Identity(IdentityError::RefusedByPeer(_))),
        "{error:?}"
    );

    let error = dial(ours.config("north", &["east"]), "east", &address).await;
    let LinkError::Hello(HelloError::Refused(refusal)) = &error else {
        panic!("{error:?}")
    };
    assert_eq!(refusal.code, RefusalCode::Site);
    assert!(
        error
            .to_string()
            .contains("site east does not know site north"),
        "{error}"
    );
    listener.stop();
}

#[tokio::test]
async fn expired_and_future_certificates_are_refused_on_both_sides() {
    let authority = Authority::new();
    let day = Duration::from_hours(24);
    let now = SystemTime::now();
    let expired = |name: &str| {
        odd_certificate(&authority, name, |params| {
            params.not_before = (now - day * 9).into();
            params.not_after = (now - day).into();
        })
    };
    let early = odd_certificate(&authority, "east", |params| {
        params.not_before = (now + day).into();
        params.not_after = (now + day * 9).into();
    });
    for (tls, want) in [
        (expired("east"), IdentityError::Expired),
        (early, IdentityError::NotValidYet),
    ] {
        let mut config = authority.config("east", &["west"]);
        config.tls = tls;
        let listener = Endpoint::new(config).unwrap();
        let address = listener.listen("127.0.0.1:0").await.unwrap().to_string();
        let error = dial(authority.config("west", &["east"]), "east", &address).await;
        assert!(
            matches!(&error, LinkError::Identity(got) if *got == want),
            "{error:?}"
        );
        listener.stop();
    }
    let listener = authority.endpoint("east", &["west"]);
    let address = listener.listen("127.0.0.1:0").await.unwrap().to_string();
    let mut config = authority.config("west", &["east"]);
    config.tls = expired("west");
    let error = dial(config, "east", &address).await;
    assert!(error.to_string().contains("expired"), "{error:?}");
    listener.stop();
}

#[tokio::test]
async fn certificates_with_no_site_or_two_are_refused() {
    let authority = Authority::new();
    let listener = authority.endpoint("east", &["west"]);
    let address = listener.listen("127.0.0.1:0").await.unwrap().to_string();
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    for names in [
        vec![],
        vec![uri("flimcd://site/west"), uri("flimcd://site/east")],
        vec![uri("flimcd://site/../west")],
        vec![uri("https://site/west")],
    ] {
        let tls = odd_certificate(&authority, "west", |params| {
            params.subject_alt_names.clone_from(&names);
        });
        let mut stream = connect(&address, Some(&tls)).await;
        let reply = greet(&mut stream, &encode_hello(&hello("west", 0, 3))).await;
        let Some(Err(HelloError::Refused(refusal))) = reply else {
            panic!("{reply:?}")
        };
        assert_eq!(refusal.code, RefusalCode::Site);
    }
    listener.stop();
}

#[tokio::test]
async fn greetings_that_do_not_fit_are_refused_with_the_reason() {
    let authority = Authority::new();
    let listener = authority.endpoint("east", &["west", "north"]);
    let address = listener.listen("127.0.0.1:0").await.unwrap().to_string();
    let identity = authority.identity("west");
    let mut future = encode_hello(&hello("west", 0, 3));
    future[8..12].copy_from_slice(&[7, 0, 9, 0]);
    for (greeting, code, text) in [
        (future, RefusalCode::Version, "versions 7 to 9"),
        (
            encode_hello(&hello("north", 0, 3)),
            RefusalCode::Site,
            "its certificate is of site west",
        ),
        (
            encode_hello(&hello("west", 3, 3)),
            RefusalCode::Bundle,
            "number 3 of 3",
        ),
        (
            encode_hello(&hello("west", 0, 2)),
            RefusalCode::Bundle,
            "number 0 of 2",
        ),
        (
            encode_hello(&hello("west", 0, 200)),
            RefusalCode::Bundle,
            "number 0 of 200",
        ),
    ] {
        let mut stream = connect(&address, Some(&identity)).await;
        let reply = greet(&mut stream, &greeting).await;
        let Some(Err(HelloError::Refused(refusal))) = reply else {
            panic!("{reply:?}")
        };
        assert_eq!(refusal.code, code);
        assert!(refusal.text.contains(text), "{}", refusal.text);
    }
    // The peer's link says so, too.
    let link = listener.peer(&site("west")).unwrap();
    let error = failure(&link).await;
    assert!(matches!(error, LinkError::TurnedAway(_)), "{error:?}");
    // Without a certificate nobody even hears the greeting.
    let mut stream = connect(&address, None).await;
    assert_eq!(
        greet(&mut stream, &encode_hello(&hello("west", 0, 3))).await,
        None
    );
    // What is no greeting at all gets no answer either.
    let mut stream = connect(&address, Some(&identity)).await;
    assert_eq!(greet(&mut stream, b"GET / HTTP/1.1\r\n\r\n").await, None);
    read_to_end(&mut stream).await;
    listener.stop();
}

#[tokio::test]
async fn what_does_not_speak_tls_is_named_as_such() {
    let authority = Authority::new();
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = other.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = other.accept().await {
            let _ = tcp.write_all(b"220 smtp ready\r\n220 really\r\n").await;
            let _ = tcp.read_to_end(&mut Vec::new()).await;
        }
    });
    let error = dial(authority.config("west", &["east"]), "east", &address).await;
    assert!(matches!(error, LinkError::Tls { .. }), "{error:?}");
    assert!(
        error.to_string().contains("check the address and port"),
        "{error}"
    );

    // The other way round: plain bytes at our port are shut out, and so is silence.
    let mut config = authority.config("east", &["west"]);
    config.handshake_timeout = Duration::from_millis(300);
    let listener = Endpoint::new(config).unwrap();
    let address = listener.listen("127.0.0.1:0").await.unwrap();
    for sent in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 9000], b""] {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.write_all(sent).await.unwrap();
        let _ = tcp.read_to_end(&mut Vec::new()).await;
    }
    listener.stop();
}

#[tokio::test]
async fn nobody_there_and_no_such_name_say_what_to_check() {
    let authority = Authority::new();
    let vacant = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = vacant.local_addr().unwrap().to_string();
    let config = authority.config("west", &["east"]);
    let second = authority
        .endpoint("south", &[])
        .listen(&address)
        .await
        .unwrap_err();
    assert!(
        second
            .to_string()
            .contains("stop the process that uses the port"),
        "{second}"
    );
    drop(vacant);
    let error = dial(config.clone(), "east", &address).await;
    assert!(matches!(error, LinkError::Connect { .. }), "{error:?}");
    assert!(error.to_string().contains(&address), "{error}");
    let error = dial(config, "east", "127.0.0.1:port").await;
    assert!(matches!(error, LinkError::Resolve { .. }), "{error:?}");
}

#[test]
fn wrong_configurations_are_refused_before_anything_is_opened() {
    let authority = Authority::new();
    let check = |tune: &dyn Fn(&mut LinkConfig), part: &str| {
        let mut config = authority.config("east", &["west"]);
        tune(&mut config);
        let error = Endpoint::new(config).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        error
    };
    check(&|c| c.tls.ca_pem.clear(), "certificate of the authority");
    check(
        &|c| c.tls.cert_pem = "rubbish".into(),
        "certificate of this site",
    );
    check(&|c| c.tls.key_pem.clear(), "private key of this site");
    check(
        &|c| c.tls.key_pem = authority.identity("west").key_pem,
        "certificate and key",
    );
    check(&|c| c.peers.push(site("east")), "its own peers");
    check(&|c| c.bulk_connections = Some(9), "between 1 and 8");
    check(&|c| c.bulk_connections = Some(0), "between 1 and 8");
    check(&|c| c.ceiling_bytes_per_sec = Some(10), "bandwidth limit");
    let error = check(
        &|c| c.tls = authority.identity("west"),
        "configured as east",
    );
    assert!(matches!(error, ConfigError::WrongSite { .. }));
}
