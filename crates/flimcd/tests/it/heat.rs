//! `flimcd heat` over a real agent.

use flimcd_lab::load::DiskOp;

use crate::{
    by_hand::{ask, connect},
    util::Lab,
};

#[test]
fn what_is_hot_is_shown_as_numbers_and_as_a_picture() {
    let lab = Lab::new();
    let (agent, _target) = lab.pair();
    agent
        .run(&["volume", "create", "vm1", "--size", "1GiB"])
        .ok();
    let cold = agent.run(&["heat", "vm1"]).ok();
    assert!(cold.contains("the volume is cold"), "{cold}");

    let mut guest = connect(&agent, "vm1");
    for _ in 0..9 {
        ask(&mut guest, DiskOp::Read, 512 << 20, vec![0; 65536]).unwrap();
    }
    ask(&mut guest, DiskOp::Write, (1 << 30) - 4096, vec![7; 4096]).unwrap();
    let text = agent.run(&["heat", "vm1", "--top", "1"]).ok();
    assert!(!text.contains('\x1b'), "not into a file: {text}");
    let rows: Vec<_> = text.lines().filter(|line| line.contains(" w ")).collect();
    assert_eq!(rows.len(), 12, "{text}");
    assert!(rows[11].ends_with('@'), "{text}");
    // 804 cells at most are 781 of 21 chunks; in rows of 67 the middle of the disk is cell 55 of row 5.
    let reads: Vec<_> = text.lines().filter(|line| line.contains(" r ")).collect();
    let hot = |line: &&str| line.split(" r ").nth(1).and_then(|cells| cells.find('@'));
    let hot: Vec<_> = reads.iter().map(hot).collect();
    let mut expected = vec![None; 12];
    expected[5] = Some(55);
    assert_eq!(hot, expected, "{text}");
    assert!(text.contains("536870912"), "{text}");
    assert!(
        !text.contains("1073676288"),
        "one place was asked for: {text}"
    );

    let report = agent.json(&["heat", "vm1", "--json"]);
    let hottest = report["hottest"].as_array().unwrap();
    let offsets: Vec<_> = hottest
        .iter()
        .map(|hot| hot["offset"].as_u64().unwrap())
        .collect();
    assert_eq!(offsets, [512 << 20, (1 << 30) - 65536]);
    assert_eq!(report["reads"]["shares"][2]["bytes"], 65536);
    assert_eq!(report["writes"]["touched_bytes"], 65536);
    agent
        .run(&["heat", "nothing"])
        .fails_with(&["nothing", "flimcd volume list"]);
}
