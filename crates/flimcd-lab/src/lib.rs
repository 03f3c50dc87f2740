//! WAN emulator, checked loads, trace readers and benchmarks for flimcd
