//! The table of what the target has, on its way to the source.

use flimcd_wire::{Message, SampleChunk, SeedId, SeedOffer};

use super::{SeedChoice, TargetAction, TargetMachine, TargetPhase};

/// A table that is being sent.
#[derive(Debug)]
pub(super) struct Sending {
    choice: SeedChoice,
    /// Numbers of parts, the next one last.
    left: Vec<u32>,
}

/// What the source has asked on this link, and what became of it.
#[derive(Debug, Default)]
pub(super) struct Seeding {
    /// Asked and not answered: the seed that it has.
    asked: Option<Option<SeedId>>,
    sending: Option<Sending>,
}

impl Seeding {
    /// What was asked on a link that is gone is not answered, and what was on its way is asked for again.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// The next part of the table.
    pub(super) fn next_part(&mut self) -> Option<Message> {
        loop {
            let sending = self.sending.as_mut()?;
            let Some(number) = sending.left.pop() else {
                self.sending = None;
                return None;
            };
            if let Some(part) = sending.choice.table.part(sending.choice.id, number) {
                return Some(Message::SeedPart(part));
            }
        }
    }
}

impl TargetMachine {
    pub(super) fn handle_ask(&mut self, sample: Vec<SampleChunk>, have: Option<SeedId>) {
        let chunks = self.config.size.chunks();
        if sample.iter().any(|sample| sample.chunk.0 >= chunks) {
            return self.protocol_error("a sample of chunks beyond the volume");
        }
        let is_wanted = matches!(
            self.phase,
            TargetPhase::Incoming | TargetPhase::Switching | TargetPhase::PostCopy
        );
        if is_wanted {
            self.seeding.asked = Some(have);
            self.actions.push_back(TargetAction::ChooseSeed { sample });
        } else {
            self.control.push_back(Message::SeedOffer(None));
        }
    }

    pub(super) fn answer_ask(&mut self, choice: Option<SeedChoice>) {
        let Some(have) = self.seeding.asked.take() else {
            return;
        };
        let Some(choice) = choice else {
            return self.control.push_back(Message::SeedOffer(None));
        };
        let mut left: Vec<u32> = choice.table.part_numbers().collect();
        left.reverse();
        self.control.push_back(Message::SeedOffer(Some(SeedOffer {
            id: choice.id,
            name: choice.name.clone(),
            in_place: choice.in_place,
            parts: u32::try_from(left.len()).unwrap_or(u32::MAX),
        })));
        let is_known = have == Some(choice.id);
        self.seeding.sending = (!is_known).then_some(Sending { choice, left });
    }
}
