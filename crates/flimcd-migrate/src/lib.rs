//! The sans-IO source and target machines of a migration, and their policies
