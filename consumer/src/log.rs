//! The log of a topic as a process reads it, once for all its groups.

pub(crate) mod block;
pub(crate) mod interest;
pub(crate) mod readers;
pub(crate) mod seen;
pub(crate) mod topic_log;
