//! Measures the WAN emulators: `cargo run --release -p flimcd-lab --example wan -- 8`. The argument
//! is the seconds of each run; the TUN router needs root. A second argument `relay` leaves it out.

use std::time::Duration;

use flimcd_lab::{
    bench::wan::{WanMeasurement, measure_relay, measure_tun},
    report::{Align, Table},
};

const LINKS: [&str; 2] = ["200mbit,40ms", "1gbit,20ms"];

#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "an example talks to people"
)]
fn main() {
    let seconds = std::env::args()
        .nth(1)
        .and_then(|text| text.parse().ok())
        .unwrap_or(8);
    let duration = Duration::from_secs(seconds);
    let is_relay_only = std::env::args().nth(2).is_some_and(|text| text == "relay");
    let columns = [
        ("front end", Align::Left),
        ("link", Align::Left),
        ("cc", Align::Left),
        ("Mbit/s", Align::Right),
        ("share", Align::Right),
        ("idle RTT ms", Align::Right),
        ("max", Align::Right),
        ("under bulk", Align::Right),
        ("CPU", Align::Right),
        ("late", Align::Right),
        ("queue drops", Align::Right),
        ("lost", Align::Right),
    ];
    let mut table = Table::new(columns);
    let mut add = |result: Result<WanMeasurement, _>| match result {
        Ok(run) => table.row(cells(&run)),
        Err(error) => eprintln!("SKIPPED: {error}"),
    };
    for link in LINKS {
        add(measure_relay(parse(link), duration));
        if is_relay_only {
            continue;
        }
        for loss in ["", ",loss=0.1%"] {
            for congestion_control in ["bbr", "cubic"] {
                let model = parse(&format!("{link}{loss}"));
                add(measure_tun(model, congestion_control, duration));
            }
        }
    }
    println!("{table}");
}

fn parse(link: &str) -> flimcd_lab::wan::LinkModel {
    link.parse().expect("the links above are well-formed")
}

fn cells(run: &WanMeasurement) -> Vec<String> {
    vec![
        run.front_end.clone(),
        run.link.clone(),
        run.congestion_control.clone(),
        format!("{:.1}", run.goodput_bits_per_sec / 1e6),
        format!("{:.1}%", run.goodput_share * 100.0),
        format!("{:.2}", run.idle_rtt_ms),
        format!("{:.2}", run.idle_rtt_ms_max),
        format!("{:.1}", run.loaded_rtt_ms),
        format!("{:.0}%", run.cpu_share * 100.0),
        run.late.to_string(),
        run.dropped_queue.to_string(),
        run.dropped_loss.to_string(),
    ]
}
