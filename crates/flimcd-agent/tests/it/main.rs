//! Whole agents over loopback: real files, real NBD, real TLS, and real processes where one is killed.
#![expect(
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    reason = "test volumes are small; skipped tests say so"
)]

mod api;
mod check;
mod crash;
mod cuts;
mod disks;
mod guest;
mod heat;
mod library;
mod migrate;
mod mixed;
mod plan;
mod proxy;
mod refuse;
mod replica;
mod replicate;
mod site;

/// Not a test: the agent that the crash tests start as a process of its own and kill.
#[test]
fn agent_process() {
    let Some(path) = std::env::var_os(site::CHILD_CONFIG) else {
        return;
    };
    let config = flimcd_agent::Config::load(path.as_ref()).expect("the test wrote it");
    tracing_subscriber::fmt()
        .with_env_filter("info,flimcd_agent=debug,flimcd_migrate=debug")
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime
        .block_on(flimcd_agent::run(config))
        .expect("the agent starts");
}
