//! Fixed seeds, and rules broken on purpose.

mod broken;
mod seeds;
