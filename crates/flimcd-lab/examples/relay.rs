//! A TCP relay to play with: `cargo run --release -p flimcd-lab --example relay --
//! 127.0.0.1:9000 127.0.0.1:9001 200mbit,40ms` listens on the first address and forwards to the
//! second over an emulated WAN. It prints what went over the link every second, until Ctrl-C.

use std::time::Duration;

use flimcd_lab::wan::{
    LinkModel, Side,
    relay::{Relay, RelayOptions, Route},
};

#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "an example talks to people"
)]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [listen, target, link] = args.as_slice() else {
        return Err("usage: relay LISTEN TARGET LINK (like 200mbit,40ms)".into());
    };
    let model: LinkModel = link.parse()?;
    let route = Route {
        listen: listen.parse()?,
        target: target.parse()?,
        from: Side::A,
    };
    let relay = Relay::start(&RelayOptions {
        model,
        routes: vec![route],
        seed: 1,
    })?;
    if let Some(what) = relay.cannot_model() {
        eprintln!("{what}");
    }
    println!("{} -> {target} over {model}", relay.addresses()[0]);
    let mut before = relay.counters();
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let now = relay.counters();
        let there = (now.a_to_b.bytes - before.a_to_b.bytes) * 8 / 1000;
        let back = (now.b_to_a.bytes - before.b_to_a.bytes) * 8 / 1000;
        println!(
            "{there} kbit/s there, {back} kbit/s back, {} connections",
            now.connections
        );
        before = now;
    }
}
