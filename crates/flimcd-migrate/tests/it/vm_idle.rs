//! A guest that writes to none of its memory, and a hypervisor that stops it for that.

use std::time::Duration;

use flimcd_core::Time;
use flimcd_migrate::vm::{
    RamMode, Transfer, TransferState, VmSource, VmSourceAction, VmSourceConfig, VmSourceStart,
};
use flimcd_wire::{VmMessage, VmOpen, VmStage};

/// Takes all actions, each of which works.
fn act(source: &mut VmSource) -> Vec<VmSourceAction> {
    let mut taken = Vec::new();
    while let Some(action) = source.poll_action() {
        source.handle_done(Time::ZERO, &action);
        taken.push(action);
    }
    while source.poll_transmit().is_some() {}
    taken
}

fn listening(source: &mut VmSource, attempt: u32) -> Vec<VmSourceAction> {
    let postcopy = false;
    source.handle_message(Time::ZERO, VmMessage::Listening { attempt, postcopy });
    act(source)
}

#[test]
fn the_guest_runs_while_memory_goes_over_again() {
    let config = VmSourceConfig {
        open: VmOpen {
            name: "vm".parse().unwrap(),
            description: String::new(),
        },
        ram: RamMode::Precopy,
        downtime_max: Duration::from_millis(300),
        was_running: true,
    };
    let mut source = VmSource::new(config, VmSourceStart::Fresh);
    source.handle_link_up();
    source.handle_disks_ready(Time::ZERO, true);
    let (attempt, stage) = (0, VmStage::Idle);
    source.handle_message(Time::ZERO, VmMessage::Accept { attempt, stage });
    act(&mut source);
    let started = listening(&mut source, 1);
    assert!(matches!(
        started[..],
        [VmSourceAction::Start { attempt: 1, .. }]
    ));
    let look = |state, syncs, remaining_bytes| Transfer {
        state,
        syncs,
        remaining_bytes,
        rate_bytes_per_sec: 10_000_000,
    };
    source.handle_transfer(Time::ZERO, look(TransferState::PreSwitchover, 1, 0));
    assert_eq!(act(&mut source), [VmSourceAction::EndTransfer]);
    let started = listening(&mut source, 2);
    assert!(matches!(
        started[..],
        [VmSourceAction::Start { attempt: 2, .. }]
    ));
    // Before the first pass the hypervisor does not know yet what there is to send.
    for (syncs, left) in [(0, 0), (1, 500 << 20), (1, 20 << 20)] {
        source.handle_transfer(Time::ZERO, look(TransferState::Active, syncs, left));
        assert_eq!(act(&mut source), [], "{syncs}, {left}");
    }
    source.handle_transfer(Time::ZERO, look(TransferState::Active, 1, 1 << 20));
    assert_eq!(act(&mut source).first(), Some(&VmSourceAction::Stop));
}
