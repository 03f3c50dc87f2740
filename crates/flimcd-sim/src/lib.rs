//! Seeded simulator of whole migrations with fault injection and checkers
