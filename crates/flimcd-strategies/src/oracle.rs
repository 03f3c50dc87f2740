//! The offline oracle.
