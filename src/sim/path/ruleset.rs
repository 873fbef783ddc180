//! Chains of rules, of nf_tables and of iptables alike, and the results of their evaluation.

use std::net::IpAddr;

use super::Walk;
use super::skb::Skb;

/// Result of a hook for a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Accepted,
    Dropped,
    /// The packet continues, and the source translation of its connection is decided.
    Nat(Nat),
}

/// Source translation of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nat {
    To(IpAddr),
    Masquerade,
    /// The source is kept.
    Bound,
}

/// Next step after a rule.
pub(super) enum Next<Chain> {
    /// Evaluation continues with the next rule.
    Rule,
    Goto(Chain),
    Jump(Chain),
    /// Continues after the jump that led to the chain; without a jump, ends the base chain.
    Return,
    End(End),
}

/// The rules of a table, and their evaluation.
pub(super) trait Ruleset {
    type Chain: Copy;
    type Rule;

    /// The rules of a chain; `None` if there is no such chain.
    fn rules(&self, chain: Self::Chain) -> Option<Vec<&Self::Rule>>;

    /// Evaluates one rule for a packet.
    fn rule(
        &self,
        walk: &mut Walk<'_>,
        chain: Self::Chain,
        rule: &Self::Rule,
        skb: &mut Skb,
    ) -> Next<Self::Chain>;
}
