//! The agents' use of the link: messages become bytes and messages again, connections break and are made anew.

use std::time::Duration;

use flimcd_core::MigrationId;
use flimcd_wire::{Body, Class, Content, Frame, FrameDecoder, Message, encode};

use crate::{
    net::Parcel,
    world::{Event, Site, World},
};

impl World {
    /// Hands a message to the link, as bytes.
    pub(crate) fn transmit(&mut self, from: Site, class: Class, message: Message) {
        self.trace(|| format!("{from} sends {}", brief(&message)));
        let encoded = encode(&Body::Frame(Frame {
            migration: MigrationId(1),
            class,
            message,
        }));
        let parcel = Parcel {
            head: encoded.head,
            payload: encoded.payload,
        };
        if self.net.send(from, class, parcel) {
            let generation = self.net.generation;
            self.at(self.now, Event::Depart { from, generation });
        }
    }

    pub(crate) fn depart(&mut self, from: Site, generation: u64) {
        if generation != self.net.generation || !self.net.connected {
            return;
        }
        if let Some(departure) = self.net.depart(from, self.now, &mut self.dice) {
            self.at(
                departure.arrival,
                Event::Arrive {
                    from,
                    lane: departure.lane,
                    generation,
                },
            );
            self.at(departure.free, Event::Depart { from, generation });
        }
        match from {
            Site::Source => self.source_transmits(),
            Site::Target => self.target_transmits(),
        }
    }

    pub(crate) fn arrive(&mut self, from: Site, lane: usize, generation: u64) {
        if generation != self.net.generation {
            return;
        }
        if let Some(until) = self.net.stalled_until(from, self.now) {
            return self.at(
                until,
                Event::Arrive {
                    from,
                    lane,
                    generation,
                },
            );
        }
        let Some(parcel) = self.net.arrive(from, lane, self.now) else {
            return;
        };
        let message = match decode(&parcel) {
            Ok(message) => message,
            Err(error) => return self.fail(error),
        };
        self.trace(|| format!("{} gets {}", from.other(), brief(&message)));
        match from {
            Site::Source => self.target_message(message),
            Site::Target => {
                self.source_input(|machine, now| machine.handle_message(now, message));
            }
        }
    }

    /// The agents try to connect after a while.
    pub(crate) fn connect_in(&mut self, wait: Duration) {
        if !self.connecting {
            self.connecting = true;
            self.at(self.now + wait, Event::Connect);
        }
    }

    pub(crate) fn connect(&mut self) {
        self.connecting = false;
        if self.net.connected || self.hosts.iter().any(|host| !host.up) {
            return;
        }
        let stalled = Site::BOTH
            .into_iter()
            .filter_map(|site| self.net.stalled_until(site, self.now))
            .max();
        if let Some(until) = stalled {
            return self.connect_in(until.since(self.now) + Duration::from_millis(5));
        }
        if self.net.up != [false; 2] {
            return self.connect_in(Duration::from_millis(30));
        }
        let up_at = Site::BOTH.map(|_| self.now + self.dice.micros(0, 30_000));
        self.net.connect(up_at);
        let generation = self.net.generation;
        for site in Site::BOTH {
            self.at(up_at[site.index()], Event::LinkUp { site, generation });
        }
    }

    pub(crate) fn link_up(&mut self, site: Site, generation: u64) {
        if generation != self.net.generation || !self.net.connected || !self.host(site).up {
            return;
        }
        self.trace(|| format!("link up at the {site}, connection {generation}"));
        self.net.up[site.index()] = true;
        match site {
            Site::Source => self.source_input(|machine, now| machine.handle_link_up(now)),
            Site::Target => self.target_input(|machine, now| machine.handle_link_up(now)),
        }
    }

    pub(crate) fn link_down(&mut self, site: Site, generation: u64) {
        if generation != self.net.generation || !self.net.up[site.index()] {
            return;
        }
        self.trace(|| format!("link down at the {site}"));
        self.net.up[site.index()] = false;
        match site {
            Site::Source => self.source_input(|machine, now| machine.handle_link_down(now)),
            Site::Target => self.target_input(|machine, now| machine.handle_link_down(now)),
        }
    }

    /// The connection breaks; the sites notice at different times.
    pub(crate) fn break_link(&mut self) {
        if !self.net.connected {
            return;
        }
        let down_at = Site::BOTH.map(|_| self.now + self.dice.micros(0, 200_000));
        let cut = down_at.map(|at| if self.dice.coin() { self.now } else { at });
        self.trace(|| "the link breaks".to_owned());
        self.net.disconnect(cut);
        let generation = self.net.generation;
        for site in Site::BOTH {
            self.at(down_at[site.index()], Event::LinkDown { site, generation });
        }
        let wait = down_at[0].max(down_at[1]).since(self.now) + self.dice.micros(1_000, 300_000);
        self.connect_in(wait);
    }
}

fn decode(parcel: &Parcel) -> Result<Message, String> {
    let mut decoder = FrameDecoder::new();
    decoder.buffer().extend_from_slice(&parcel.head);
    decoder.buffer().extend_from_slice(&parcel.payload);
    match decoder.poll() {
        Ok(Some(Body::Frame(frame))) => Ok(frame.message),
        other => Err(format!("a frame does not decode: {other:?}")),
    }
}

fn brief(message: &Message) -> String {
    match message {
        Message::Blocks(blocks) => {
            let ranges: Vec<_> = blocks.ranges().collect();
            let has = |content| blocks.entries.iter().any(|e| e.content == content);
            let how = match (has(Content::Same), has(Content::Copy)) {
                (false, false) => "",
                (true, false) => " the same",
                (false, true) => " copies",
                (true, true) => " the same and copies",
            };
            format!("Blocks {:?} {ranges:?}{how}", blocks.seq)
        }
        other => format!("{other:?}"),
    }
}
