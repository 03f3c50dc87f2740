//! placeholder
use crate::args::SimArgs;
use std::process::ExitCode;
pub(crate) fn run(args: &SimArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("{args:?}")
}
