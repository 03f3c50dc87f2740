//! `flimcd pki`: certificates.

use std::process::ExitCode;

use flimcd_link::pki;

use crate::args::{PkiArgs, PkiCommand};

pub(crate) fn run(args: &PkiArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        PkiCommand::Init { dir, force } => {
            let made = pki::create_ca(dir, *force)?;
            println!("authority  {}", made.certificate.display());
            println!(
                "its key    {}   keep it here and safe: it can name any site",
                made.key.display()
            );
        }
        PkiCommand::Issue { site, dir, force } => {
            let made = pki::issue(dir, site, *force)?;
            println!("certificate  {}", made.certificate.display());
            println!("key          {}", made.key.display());
            println!(
                "Copy both and {} to the host of {site}.",
                dir.join("ca.pem").display()
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}
