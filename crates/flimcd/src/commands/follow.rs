//! Following something long to its end: progress, Ctrl-C, an agent that is restarted meanwhile.

use std::time::Duration;

use anyhow::Context as _;
use flimcd_agent::api::{ApiCode, Client, ClientError};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use crate::progress::{Progress, Shown};

const POLL: Duration = Duration::from_millis(250);
/// With --json a line is printed at every so-manieth poll.
const POLLS_PER_LINE: u32 = 4;
/// An agent that is restarted is waited for this long before following ends.
const AGENT_AWAY_MAX: Duration = Duration::from_secs(30);

/// What is followed.
pub(crate) trait Followed {
    /// Where it stands.
    type Status: Shown + Serialize;

    /// How it is called to people.
    fn name(&self) -> String;

    /// Asks where it stands.
    async fn poll(&self, client: &Client) -> Result<Self::Status, ClientError>;

    /// Ends it before the switch.
    async fn cancel(&self, client: &Client) -> Result<Self::Status, ClientError>;

    /// Whether the switch has begun, so that it can only go on.
    fn switches(status: &Self::Status) -> bool;

    /// What to say to somebody who leaves while it goes on.
    fn detached(&self, status: &Self::Status) -> String;
}

/// How following ended.
pub(crate) enum End<S> {
    /// It has ended; `cancelled` by us.
    Ended {
        /// The last status.
        status: S,
        /// Ctrl-C asked for that.
        cancelled: bool,
    },
    /// Ctrl-C, and it goes on.
    Left,
}

/// See the module.
pub(crate) struct Follow<F: Followed> {
    client: Client,
    what: F,
    status: F::Status,
    progress: Option<Progress>,
    polls: u32,
    cancelling: bool,
    /// How long the agent has not answered.
    away: Duration,
}

impl<F: Followed> Follow<F> {
    /// Follows `what`, which stands at `status`. With `json`, lines on standard output take the place of progress.
    pub(crate) fn new(client: Client, what: F, status: F::Status, json: bool) -> Self {
        let progress = (!json).then(|| Progress::new(what.name()));
        Self {
            client,
            what,
            status,
            progress,
            polls: 0,
            cancelling: false,
            away: Duration::ZERO,
        }
    }

    /// Until it has ended or Ctrl-C detaches from it.
    pub(crate) async fn run(mut self) -> anyhow::Result<End<F::Status>> {
        // One listener for all of it: a Ctrl-C during a poll must not be lost.
        let mut interrupts = signal(SignalKind::interrupt()).context("Ctrl-C cannot be watched")?;
        loop {
            self.show()?;
            if self.status.has_ended() {
                return Ok(End::Ended {
                    status: self.status,
                    cancelled: self.cancelling,
                });
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => self.poll().await?,
                _ = interrupts.recv() => {
                    if self.interrupt().await? {
                        return Ok(End::Left);
                    }
                }
            }
        }
    }

    async fn poll(&mut self) -> anyhow::Result<()> {
        match self.what.poll(&self.client).await {
            Ok(status) => {
                self.status = status;
                self.away = Duration::ZERO;
                Ok(())
            }
            // A restarted agent picks it up again, and so does this command.
            Err(ClientError::NotRunning { .. } | ClientError::Broken(_))
                if self.away < AGENT_AWAY_MAX =>
            {
                if self.away.is_zero() {
                    self.say("the agent does not answer; waiting for it to come back");
                }
                self.away += POLL;
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Ctrl-C: whether to leave at once.
    async fn interrupt(&mut self) -> anyhow::Result<bool> {
        if self.cancelling {
            self.say("not waiting for the cancellation any longer; `flimcd status` shows what became of it");
            return Ok(true);
        }
        if F::switches(&self.status) {
            self.say(&self.what.detached(&self.status));
            return Ok(true);
        }
        self.say("cancelling the migration (again: leave without waiting for that)");
        match self.what.cancel(&self.client).await {
            Ok(status) => {
                self.status = status;
                self.cancelling = true;
                Ok(false)
            }
            Err(ClientError::Refused(body)) if body.code == ApiCode::TooLate => {
                self.say(&self.what.detached(&self.status));
                Ok(true)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn show(&mut self) -> anyhow::Result<()> {
        match &mut self.progress {
            Some(progress) => progress.show(&self.status),
            None => {
                if self.polls.is_multiple_of(POLLS_PER_LINE) || self.status.has_ended() {
                    println!("{}", serde_json::to_string(&self.status)?);
                }
            }
        }
        self.polls = self.polls.wrapping_add(1);
        Ok(())
    }

    fn say(&self, text: &str) {
        match &self.progress {
            Some(progress) => progress.say(text),
            None => eprintln!("{text}"),
        }
    }
}
