//! Tests of the rules: cases by hand here, random interleavings against a model of a disk in the files beside.

mod cases;
