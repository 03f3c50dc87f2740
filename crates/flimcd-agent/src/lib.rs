//! The flimcd daemon: wires volumes, machines and links together
