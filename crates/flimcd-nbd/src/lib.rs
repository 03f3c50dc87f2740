//! NBD server over flimcd volumes, and a small client
