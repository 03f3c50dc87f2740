//! Messages between two flimcd agents, their codec and version negotiation
