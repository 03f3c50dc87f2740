//! placeholder
use crate::args::BenchArgs;
use std::process::ExitCode;
pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("{args:?}")
}
