//! Fingerprints and block encodings of flimcd
