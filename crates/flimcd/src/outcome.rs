//! How commands end: exit codes and the look of errors.

use std::process::ExitCode;

use flimcd_agent::api::{ClientError, ErrorBody};

/// A command was interrupted and stopped before its work was done (as shells have it, 128 + SIGINT).
pub(crate) const INTERRUPTED: u8 = 130;

/// The exit code for [`INTERRUPTED`].
pub(crate) fn interrupted() -> ExitCode {
    ExitCode::from(INTERRUPTED)
}

/// An error with advice on a line of its own.
#[derive(Debug)]
pub(crate) struct Advice {
    /// What was tried and what went wrong.
    pub(crate) message: String,
    /// What to do.
    pub(crate) hint: String,
}

impl std::fmt::Display for Advice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Advice {}

/// An error that says what to do.
pub(crate) fn advise(message: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Advice {
        message: message.into(),
        hint: hint.into(),
    }
    .into()
}

/// Prints an error for a person: what was tried, what went wrong, what to do.
pub(crate) fn print_error(error: &anyhow::Error) {
    let mut text = String::new();
    let mut hints = Vec::new();
    for cause in error.chain() {
        let (message, hint) = describe(cause);
        // Errors of libraries often have their cause in their own text already.
        if !text.contains(&message) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&message);
        }
        hints.extend(hint);
    }
    eprintln!("error: {text}");
    for hint in hints {
        eprintln!("  hint: {hint}");
    }
}

fn describe(cause: &(dyn std::error::Error + 'static)) -> (String, Option<String>) {
    if let Some(advice) = cause.downcast_ref::<Advice>() {
        return (advice.message.clone(), Some(advice.hint.clone()));
    }
    let body =
        cause
            .downcast_ref::<ErrorBody>()
            .or_else(|| match cause.downcast_ref::<ClientError>() {
                Some(ClientError::Refused(body)) => Some(body),
                _ => None,
            });
    match body {
        Some(body) => (body.message.clone(), body.hint.clone()),
        None => (cause.to_string(), None),
    }
}
