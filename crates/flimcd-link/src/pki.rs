//! Certificates: one authority per installation, one certificate per site.
//!
//! Files in one directory: `ca.pem`, `ca.key`, `SITE.pem`, `SITE.key`; keys are readable by their owner
//! only. A site's name is the URI `flimcd://site/NAME` in its certificate (a DNS name could not hold
//! every site name). Nothing is overwritten unless asked for.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use flimcd_core::SiteName;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// What stands before a site's name in its certificate.
pub(crate) const SITE_URI: &str = "flimcd://site/";
/// Name of the authority's files; no site can have it.
const CA: &str = "ca";
const DAY: Duration = Duration::from_hours(24);
const CA_VALIDITY: Duration = DAY.saturating_mul(3653);
const SITE_VALIDITY: Duration = DAY.saturating_mul(731);
/// Clocks of two sites may differ by this much.
const CLOCK_SKEW: Duration = DAY;

/// Why no certificate was made. Nothing was changed, unless a write failed half-way.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file is in the way.
    #[error(
        "{} exists already and is kept; to replace it use --force (certificates issued with the old \
         one stop working), or choose another directory", .0.display()
    )]
    Exists(PathBuf),
    /// The authority is not there.
    #[error(
        "there is no certificate authority in {}: cannot read {}; run `flimcd pki init` first, or name \
         the directory where that was done", .directory.display(), .file.display()
    )]
    NoAuthority {
        /// Where it was looked for.
        directory: PathBuf,
        /// The file that is missing.
        file: PathBuf,
    },
    /// A name that the authority itself uses.
    #[error(
        "a site cannot be called {0:?}, because the authority's files have that name; choose another"
    )]
    ReservedName(String),
    /// A file cannot be read or written.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The authority's files make no sense, or the cryptography failed.
    #[error("cannot make a certificate with the authority in {}: {source}; if its files are damaged, restore them from a backup", .directory.display())]
    Certificate {
        /// The directory of the authority.
        directory: PathBuf,
        /// What went wrong.
        source: rcgen::Error,
    },
}

/// Files that were made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// The certificate.
    pub certificate: PathBuf,
    /// The private key, readable by its owner only.
    pub key: PathBuf,
}

/// Makes a certificate authority in `directory`, which is created (0700) if need be.
///
/// # Errors
/// [`PkiError::Exists`] without `force`, if there is one already.
pub fn create_ca(directory: &Path, force: bool) -> Result<Issued, PkiError> {
    let made = |source| PkiError::Certificate {
        directory: directory.to_owned(),
        source,
    };
    let files = files(directory, CA);
    refuse_existing(&files, force)?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|source| PkiError::Io {
            action: "create the directory",
            path: directory.to_owned(),
            source,
        })?;
    let key = KeyPair::generate().map_err(made)?;
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "flimcd certificate authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, CA_VALIDITY);
    let certificate = params.self_signed(&key).map_err(made)?;
    write_pair(&files, &certificate.pem(), &key.serialize_pem())?;
    Ok(files)
}

/// Makes a certificate and a key for `site`, signed by the authority in `directory`.
///
/// # Errors
/// [`PkiError::NoAuthority`] without `create_ca` before; [`PkiError::Exists`] without `force`, if the
/// site has a certificate already.
pub fn issue(directory: &Path, site: &SiteName, force: bool) -> Result<Issued, PkiError> {
    let made = |source| PkiError::Certificate {
        directory: directory.to_owned(),
        source,
    };
    if site.as_str().eq_ignore_ascii_case(CA) {
        return Err(PkiError::ReservedName(site.to_string()));
    }
    let authority = files(directory, CA);
    let ca_key = KeyPair::from_pem(&read(directory, &authority.key)?).map_err(made)?;
    let ca_pem = read(directory, &authority.certificate)?;
    let issuer = Issuer::from_ca_cert_pem(&ca_pem, ca_key).map_err(made)?;
    let files = files(directory, site.as_str());
    refuse_existing(&files, force)?;
    let key = KeyPair::generate().map_err(made)?;
    let uri = format!("{SITE_URI}{site}").try_into().map_err(made)?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(uri)];
    params
        .distinguished_name
        .push(DnType::CommonName, site.as_str());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, SITE_VALIDITY);
    let certificate = params.signed_by(&key, &issuer).map_err(made)?;
    write_pair(&files, &certificate.pem(), &key.serialize_pem())?;
    Ok(files)
}

fn files(directory: &Path, name: &str) -> Issued {
    Issued {
        certificate: directory.join(format!("{name}.pem")),
        key: directory.join(format!("{name}.key")),
    }
}

fn set_validity(params: &mut CertificateParams, validity: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + validity).into();
}

fn refuse_existing(files: &Issued, force: bool) -> Result<(), PkiError> {
    for path in [&files.certificate, &files.key] {
        if !force && path.symlink_metadata().is_ok() {
            return Err(PkiError::Exists(path.clone()));
        }
    }
    Ok(())
}

fn read(directory: &Path, path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => PkiError::NoAuthority {
            directory: directory.to_owned(),
            file: path.to_owned(),
        },
        _ => PkiError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        },
    })
}

fn write_pair(files: &Issued, certificate: &str, key: &str) -> Result<(), PkiError> {
    write(&files.key, key, 0o600)?;
    write(&files.certificate, certificate, 0o644)
}

/// Writes beside the file and renames, so that no reader sees half of it and a key never has wider
/// rights, not even for a moment.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let temporary = PathBuf::from(name);
    let result = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&temporary, path));
    result.map_err(|source| {
        let _ = fs::remove_file(&temporary);
        PkiError::Io {
            action: "write",
            path: path.to_owned(),
            source,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn keys_are_private_and_nothing_is_overwritten_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let pki = dir.path().join("pki");
        let site: SiteName = "Ber_lin.1-x".parse().unwrap();
        assert!(matches!(
            issue(&pki, &site, false),
            Err(PkiError::NoAuthority { .. })
        ));
        let ca = create_ca(&pki, false).unwrap();
        let issued = issue(&pki, &site, false).unwrap();
        for key in [&ca.key, &issued.key] {
            assert_eq!(
                fs::metadata(key).unwrap().permissions().mode() & 0o777,
                0o600
            );
        }
        let before = fs::read(&issued.key).unwrap();
        assert!(matches!(create_ca(&pki, false), Err(PkiError::Exists(_))));
        assert!(matches!(
            issue(&pki, &site, false),
            Err(PkiError::Exists(_))
        ));
        assert_eq!(fs::read(&issued.key).unwrap(), before);
        issue(&pki, &site, true).unwrap();
        assert_ne!(fs::read(&issued.key).unwrap(), before);
        let reserved = "CA".parse().unwrap();
        assert!(matches!(
            issue(&pki, &reserved, true),
            Err(PkiError::ReservedName(_))
        ));
        assert_eq!(
            fs::read_dir(&pki).unwrap().count(),
            4,
            "no temporary file is left"
        );
    }
}
