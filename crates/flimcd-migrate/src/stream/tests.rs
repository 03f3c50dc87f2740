//! Two sides over a link that is cut at any moment: what goes in comes out, once and in order.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

/// A rule that is broken on purpose, to see that these tests would notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutation {
    /// After a link break the sender goes on with what it has not sent yet.
    GoOnWithoutSendingAgain,
    /// The receiver takes what it already has.
    TakeTwice,
    /// The receiver acknowledges what the hypervisor has not got.
    AckWhatIsQueued,
}

#[derive(Clone, Debug)]
enum Step {
    /// A hypervisor says this many bytes on a stream.
    Say { side: usize, stream: u8, len: usize },
    /// The opening side's hypervisor opens a connection.
    Open,
    /// So many messages of a side reach the other one, of the class.
    Arrive {
        from: usize,
        class: usize,
        count: usize,
    },
    /// The hypervisor of a side takes what is there, so many parts of it.
    Take { side: usize, count: usize },
    /// The link takes what is to be sent.
    Send { side: usize, count: usize },
    /// Time passes.
    Wait { ms: u64 },
    /// The link breaks; what it carries is lost.
    Cut,
    /// It comes back.
    Mend,
}

struct World {
    sides: [Streams; 2],
    /// What each side has sent and has not arrived: control, RAM.
    under_way: [[VecDeque<VmMessage>; 2]; 2],
    said: [Vec<Vec<u8>>; 2],
    heard: [Vec<Vec<u8>>; 2],
    ended: [[bool; 4]; 2],
    is_up: bool,
    now: Time,
    counter: u8,
    broken: Option<Mutation>,
}

impl World {
    fn new(broken: Option<Mutation>) -> Self {
        Self {
            sides: [Streams::opening(3), Streams::following(3)],
            under_way: Default::default(),
            said: [vec![Vec::new(); 4], vec![Vec::new(); 4]],
            heard: [vec![Vec::new(); 4], vec![Vec::new(); 4]],
            ended: [[false; 4]; 2],
            is_up: false,
            now: Time::ZERO,
            counter: 0,
            broken,
        }
    }

    fn apply(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Open => {
                if self.sides[0].count() < 3 {
                    self.sides[0].open().unwrap();
                }
            }
            Step::Say { side, stream, len } => self.say(side, stream, len),
            Step::Arrive { from, class, count } => {
                for _ in 0..count {
                    let Some(message) = self.under_way[from][class].pop_front() else {
                        break;
                    };
                    let answer = self.sides[1 - from].handle_message(message);
                    prop_assert_eq!(answer, Ok(()));
                }
            }
            Step::Take { side, count } => self.take(side, count)?,
            Step::Send { side, count } => self.send(side, count),
            Step::Wait { ms } => self.now = self.now + Duration::from_millis(ms),
            Step::Cut => {
                if std::mem::take(&mut self.is_up) {
                    self.under_way = Default::default();
                    self.sides.iter_mut().for_each(Streams::handle_link_down);
                }
            }
            Step::Mend => {
                if !std::mem::replace(&mut self.is_up, true) {
                    self.sides.iter_mut().for_each(Streams::handle_link_up);
                }
            }
        }
        for side in &mut self.sides {
            while side.poll_opened().is_some() {}
            for stream in &mut side.streams {
                stream.sender.broken = self.broken;
                stream.receiver.broken = self.broken;
            }
        }
        Ok(())
    }

    fn say(&mut self, side: usize, stream: u8, len: usize) {
        if stream >= self.sides[side].count() || !self.sides[side].stream(stream).wants_more() {
            return;
        }
        let part: Vec<u8> = (0..len.max(1))
            .map(|_| {
                self.counter = self.counter.wrapping_mul(5).wrapping_add(13);
                self.counter
            })
            .collect();
        self.said[side][usize::from(stream)].extend_from_slice(&part);
        self.sides[side].stream(stream).push(part.into());
    }

    fn take(&mut self, side: usize, count: usize) -> Result<(), TestCaseError> {
        for number in 0..self.sides[side].count() {
            for _ in 0..count {
                let stream = self.sides[side].stream(number);
                let heard = &mut self.heard[side][usize::from(number)];
                match stream.poll_delivery() {
                    Some(Delivery::Part(part)) => heard.extend_from_slice(&part),
                    Some(Delivery::End) => {
                        prop_assert!(!self.ended[side][usize::from(number)]);
                        self.ended[side][usize::from(number)] = true;
                    }
                    None => break,
                }
                stream.handle_delivered(self.now);
                let said = &self.said[1 - side][usize::from(number)];
                prop_assert!(said.starts_with(heard), "bytes differ, or come twice");
            }
            // The other side may forget only what has been taken here.
            let acked = self.sides[1 - side]
                .streams
                .get(usize::from(number))
                .map_or(0, |stream| stream.sender.acked_bytes());
            prop_assert!(acked <= self.heard[side][usize::from(number)].len() as u64);
        }
        Ok(())
    }

    fn send(&mut self, side: usize, count: usize) {
        for _ in 0..count {
            let Some((class, message)) = self.sides[side].poll_transmit(self.now, &|_| true) else {
                break;
            };
            assert!(self.is_up, "something was sent while the link is down");
            self.under_way[side][usize::from(class == Class::Ram)].push_back(message);
        }
    }

    /// Ends everything over a link that stays up.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        self.apply(&Step::Mend)?;
        for round in 0..200 {
            self.apply(&Step::Wait { ms: 20 })?;
            for side in 0..2 {
                let count = 1000;
                self.apply(&Step::Send { side, count })?;
                for class in 0..2 {
                    self.apply(&Step::Arrive {
                        from: side,
                        class,
                        count,
                    })?;
                }
                self.apply(&Step::Take { side, count })?;
                if round > 3 {
                    for number in 0..self.sides[side].count() {
                        self.sides[side].stream(number).push_end();
                    }
                }
            }
            if self.sides.iter().all(Streams::is_finished) {
                prop_assert!(self.heard[1] == self.said[0] && self.heard[0] == self.said[1]);
                for side in &self.sides {
                    let stats = side.stats();
                    prop_assert_eq!(stats.acked_bytes, stats.pushed_bytes);
                    prop_assert_eq!(side.streams[0].sender.wants_more(), false);
                }
                return Ok(());
            }
        }
        prop_assert!(self.sides[0].count() == 0, "it does not end");
        Ok(())
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => Just(Step::Open),
        8 => (0..2usize, 0..3u8, 1..40_000usize)
            .prop_map(|(side, stream, len)| Step::Say { side, stream, len }),
        8 => (0..2usize, 0..2usize, 1..8usize)
            .prop_map(|(from, class, count)| Step::Arrive { from, class, count }),
        4 => (0..2usize, 1..6usize).prop_map(|(side, count)| Step::Take { side, count }),
        8 => (0..2usize, 1..8usize).prop_map(|(side, count)| Step::Send { side, count }),
        3 => (1..30u64).prop_map(|ms| Step::Wait { ms }),
        2 => Just(Step::Cut),
        4 => Just(Step::Mend),
    ]
}

fn run(steps: &[Step], broken: Option<Mutation>) -> Result<(), TestCaseError> {
    let mut world = World::new(broken);
    world.apply(&Step::Mend)?;
    world.apply(&Step::Open)?;
    for step in steps {
        world.apply(step)?;
    }
    world.settle()
}

proptest! {
    #[test]
    fn what_goes_in_comes_out_however_the_link_breaks(
        steps in prop::collection::vec(step(), 1..200),
    ) {
        run(&steps, None)?;
    }
}

#[test]
fn a_broken_rule_is_found() {
    for mutation in [
        Mutation::GoOnWithoutSendingAgain,
        Mutation::TakeTwice,
        Mutation::AckWhatIsQueued,
    ] {
        let config = ProptestConfig {
            failure_persistence: None,
            max_shrink_iters: 0,
            ..ProptestConfig::with_cases(500)
        };
        let mut runner = proptest::test_runner::TestRunner::new(config);
        let steps = prop::collection::vec(step(), 1..200);
        let found = runner.run(&steps, |steps| run(&steps, Some(mutation)));
        assert!(found.is_err(), "{mutation:?} was not noticed");
    }
}

/// A following side with stream 0, which has delivered and acknowledged nothing.
fn follower() -> Streams {
    let mut streams = Streams::following(1);
    streams.handle_link_up();
    streams.handle_message(ack(0, 0)).unwrap();
    assert_eq!(streams.poll_opened(), Some(0));
    assert_eq!(streams.poll_opened(), None);
    streams
}

fn ack(stream: u8, next: u64) -> VmMessage {
    VmMessage::PartAck {
        attempt: 1,
        stream,
        next,
    }
}

fn part(stream: u8, seq: u64, len: usize) -> VmMessage {
    VmMessage::Part {
        attempt: 1,
        stream,
        seq,
        payload: vec![7; len].into(),
    }
}

fn end(seq: u64) -> VmMessage {
    VmMessage::End {
        attempt: 1,
        stream: 0,
        seq,
    }
}

#[test]
fn a_peer_that_breaks_the_rules_is_refused() {
    let check = |messages: Vec<VmMessage>, expected: StreamError| {
        let mut streams = follower();
        let (last, before) = messages.split_last().unwrap();
        for message in before {
            streams.handle_message(message.clone()).unwrap();
        }
        assert_eq!(streams.handle_message(last.clone()), Err(expected));
    };
    let (got, stream, next) = (5, 0, 1);
    check(
        vec![part(0, 0, 1), part(0, 5, 1)],
        StreamError::Gap {
            stream,
            got,
            expected: 1,
        },
    );
    check(
        vec![end(5)],
        StreamError::Gap {
            stream,
            got,
            expected: 0,
        },
    );
    check(
        vec![part(0, 0, 1), end(1), end(1), part(0, 5, 1)],
        StreamError::AfterEnd { stream, got },
    );
    check(vec![end(0), end(5)], StreamError::AfterEnd { stream, got });
    check(vec![ack(0, 1)], StreamError::Ack { stream, next });
    check(vec![part(2, 0, 1)], StreamError::Stream { stream: 2 });
    check(vec![part(1, 0, 1)], StreamError::Stream { stream: 1 });
    check(
        (1..=STREAMS_MAX).map(|stream| ack(stream, 0)).collect(),
        StreamError::Stream {
            stream: STREAMS_MAX,
        },
    );
    check(vec![part(0, 0, 0)], StreamError::Size { stream, bytes: 0 });
    check(vec![VmMessage::Running], StreamError::Message);
    let mut other = part(0, 0, 1);
    if let VmMessage::Part { attempt, .. } = &mut other {
        *attempt = 2;
    }
    check(
        vec![other],
        StreamError::Attempt {
            got: 2,
            expected: 1,
        },
    );
}

#[test]
fn the_window_bounds_what_a_receiver_holds_and_a_sender_keeps() {
    for len in [1, 100 * 1024] {
        let mut streams = follower();
        let refused = (0..).find(|&seq| streams.handle_message(part(0, seq, len)).is_err());
        let held = usize::try_from(refused.unwrap()).unwrap() * (len + PART_OVERHEAD_BYTES);
        assert!(held <= WINDOW_BYTES && held > WINDOW_BYTES / 2);

        let mut sender = Streams::opening(1);
        sender.handle_link_up();
        sender.open().unwrap();
        sender.handle_message(ack(0, 0)).unwrap();
        let mut pushed = 0;
        while sender.stream(0).wants_more() {
            sender.stream(0).push(vec![1; len].into());
            pushed += len + PART_OVERHEAD_BYTES;
            while sender.poll_transmit(Time::ZERO, &|_| true).is_some() {}
        }
        assert!(pushed <= WINDOW_BYTES && pushed > WINDOW_BYTES / 2);
    }
}

#[test]
fn little_waits_to_be_sent_and_acknowledgements_are_few() {
    let mut streams = Streams::opening(1);
    streams.open().unwrap();
    let mut unsent = 0;
    while streams.stream(0).wants_more() {
        streams.stream(0).push(vec![1; 1000].into());
        unsent += 1000;
    }
    assert!(unsent <= UNSENT_BYTES_MAX + 1000, "the link is down");
    assert_eq!(streams.poll_timeout(), None);

    let mut streams = follower();
    let now = Time::ZERO + Duration::from_secs(1);
    let acks = |streams: &mut Streams, now| {
        let acks: Vec<_> = std::iter::from_fn(|| streams.poll_transmit(now, &|_| true)).collect();
        acks.len()
    };
    assert_eq!(acks(&mut streams, now), 1, "the greeting");
    for seq in 0..100 {
        streams.handle_message(part(0, seq, 10_000)).unwrap();
        streams.stream(0).poll_delivery().unwrap();
        streams.stream(0).handle_delivered(now);
        assert_eq!(acks(&mut streams, now), usize::from(seq % 27 == 26));
    }
    let due = streams.poll_timeout().unwrap();
    assert_eq!(due, now + ACK_DELAY);
    assert_eq!(acks(&mut streams, due), 1);
    assert_eq!(streams.poll_timeout(), None);
}
