//! A guided tour for programs that embed the crate, and for operators.
//!
//! | chapter | contents |
//! |---|---|
//! | [`embedding`] | three steps in an empty project, address families, iptables, traits, tests |
//! | [`operation`] | the loop of a node agent, the cost of each call, ownership, errors |
//! | [`marks`] | firewall marks, tables and rule priorities beside Calico, Cilium and others |
//! | [`gateways`] | a gateway dies, drains or moves |
//! | [`upgrades`] | restart, upgrade, change of a setting, nodes that come and go, removal |
//! | [`troubleshooting`] | symptom, cause, command |
//! | [`monitoring`] | reports, events, counters, preflight problems, names of spans |
//! | [`json`] | JSON of input and output, with samples and the schema |
//! | [`errors`] | errors, findings and preflight problems: all codes, each with the next step |
//! | [`limits`] | sizes, cost of a packet, results of the tests, known limits |
//!
//! # Architecture
//!
#![doc = include_str!("guide/architecture.svg")]
//!
//! The planner computes the wanted [`State`](crate::State) of a node from the policies and the
//! cluster. The datapath observes the present state. The difference of the two states is a list of
//! changes in a safe order, which the datapath applies. A watch reports changes by other programs;
//! a repair restores the wanted state.
//!
//! # Path of a packet
//!
#![doc = include_str!("guide/packet.svg")]
//!
//! A request of a selected pod goes through the tunnel to the gateway, and leaves with the egress
//! IP. The reply arrives at the gateway, where connection tracking restores the destination, and
//! returns to the pod by the routes of the CNI plugin, outside the tunnel.
//!
//! # Words
//!
//! | word | meaning |
//! |---|---|
//! | selected | a packet whose source and destination a policy has, so that the policy decides about it |
//! | steered | sent through the tunnel to a gateway |
//! | dropped | discarded by a rule, a route or the kernel |
//! | closed | a policy that cannot be carried out, for all its traffic or that of a family: it is invalid, or the reason is a [`DenyReason`](crate::DenyReason). Its traffic is dropped, or bypasses it with [`Unavailable::Bypass`](crate::Unavailable::Bypass) |
//! | denied | a name only: [`Finding::Denied`](crate::Finding::Denied) is a valid policy that is closed and drops; `deny` in a [summary](crate::summary) is the drop of any closed policy; [`KernelError::is_denied`](crate::KernelError::is_denied) is about privileges |
//! | to fail closed | to drop a packet that cannot leave with its egress IP |
//! | fallback rule, fallback table | last of the crate's routing rules, and its table, for packets with the mark prefix that no gateway's rule takes; `closing` in names, as in [`Finding::NoClosingTable`](crate::Finding::NoClosingTable) |
//! | left out | a node that is invalid: neither gateway nor peer |
//! | refused | a call or an operation that was not carried out, with an error |
//! | excluded | a destination that no policy takes |
//! | stale | a connection whose translation is not the wanted one |
//! | set, map | of nf_tables: a set has keys, a map has a value for each key; both have elements. In the iptables backend a set is an ipset |

#[doc = include_str!("guide/embedding.md")]
pub mod embedding {}

#[doc = include_str!("guide/errors.md")]
pub mod errors {}

#[doc = include_str!("guide/gateways.md")]
pub mod gateways {}

#[doc = include_str!("guide/json.md")]
#[doc = "```json"]
#[doc = include_str!("guide/schema.json")]
#[doc = "```"]
pub mod json {}

#[doc = include_str!("guide/limits.md")]
pub mod limits {}

#[doc = include_str!("guide/marks.md")]
pub mod marks {}

#[doc = include_str!("guide/monitoring.md")]
pub mod monitoring {}

#[doc = include_str!("guide/operation.md")]
pub mod operation {}

#[doc = include_str!("guide/troubleshooting.md")]
pub mod troubleshooting {}

#[doc = include_str!("guide/upgrades.md")]
pub mod upgrades {}
