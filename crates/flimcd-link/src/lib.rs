//! Several TCP connections with mutual TLS as one link between two agents
