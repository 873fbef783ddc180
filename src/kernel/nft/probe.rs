//! Detects nf_tables features that the kernel lacks.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use super::expr::{Expr, ct, reg};
use super::generation::{generation, is_absent};
use super::stmt::load;
use super::table::has_owners;
use super::{batch, flowtable, kind};
use crate::error::{KernelError, errno};
use crate::kernel::netlink::exchange::acknowledgements;
use crate::kernel::netlink::message::{Writer, flag};
use crate::kernel::netlink::nfnetlink::{self, Request};
use crate::kernel::netlink::socket::Socket;
use crate::state::{Field, Missing, TableFamily};

/// Kernel feature that the datapath needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum KernelPart {
    /// nf_tables as a whole.
    #[error("nf_tables (CONFIG_NF_TABLES)")]
    NfTables,
    /// `inet` family of nf_tables: one table for IPv4 and IPv6.
    #[error("the inet family of nf_tables (CONFIG_NF_TABLES_INET)")]
    InetFamily,
    /// NAT chains.
    #[error("NAT chains of nf_tables (CONFIG_NFT_NAT)")]
    NatChain,
    /// Expressions that match on the conntrack entry.
    #[error("the ct expression of nf_tables (CONFIG_NFT_CT)")]
    Ct,
    /// NAT to a given address.
    #[error("the nat expression of nf_tables (CONFIG_NFT_NAT)")]
    Nat,
    /// Masquerade: source NAT to the address of the outgoing interface.
    #[error("the masq expression of nf_tables (CONFIG_NFT_MASQ)")]
    Masquerade,
    /// Counters in rules.
    #[error("the counter expression of nf_tables (CONFIG_NF_TABLES)")]
    Counter,
    /// Expressions that match on the socket that takes a packet.
    ///
    /// Without it [`Finding::SocketsUnavailable`](crate::Finding::SocketsUnavailable) is reported.
    #[error("the socket expression of nf_tables (CONFIG_NFT_SOCKET)")]
    Socket,
    /// Expressions that match on the type of an address.
    ///
    /// Without it [`Finding::AddressTypesUnavailable`](crate::Finding::AddressTypesUnavailable) is
    /// reported.
    #[error("the fib expression of nf_tables (CONFIG_NFT_FIB_INET)")]
    Fib,
    /// Egress hook of an interface, for [`Steering::EgressHook`](crate::Steering::EgressHook).
    #[error("the egress hook of nf_tables (CONFIG_NFT_NETDEV, CONFIG_NETFILTER_EGRESS)")]
    EgressHook,
    /// Table owner whose table persists without it (`NFT_TABLE_F_PERSIST`).
    ///
    /// Only [`Ownership::Exclusive`](crate::Ownership::Exclusive) needs it.
    #[error("owners of nf_tables tables that stay (NFT_TABLE_F_PERSIST)")]
    TableOwner,
    /// VXLAN devices.
    #[error("VXLAN (CONFIG_VXLAN)")]
    Vxlan,
    /// Policy routing: routing rules.
    #[error("policy routing (CONFIG_IP_MULTIPLE_TABLES)")]
    PolicyRouting,
    /// IPv6.
    #[error("IPv6 (CONFIG_IPV6)")]
    Ipv6,
}

impl KernelPart {
    /// Linux version that introduced the feature, if that is newer than nf_tables itself.
    ///
    /// A newer kernel may still have been built without it.
    pub const fn since(self) -> Option<(u8, u8)> {
        match self {
            Self::NatChain | Self::Nat | Self::Masquerade => Some((5, 2)),
            // The property of a socket that the rules test.
            Self::Socket => Some((5, 10)),
            Self::EgressHook => Some((5, 16)),
            Self::TableOwner => Some((6, 9)),
            Self::NfTables
            | Self::InetFamily
            | Self::Ct
            | Self::Counter
            | Self::Fib
            | Self::Vxlan
            | Self::PolicyRouting
            | Self::Ipv6 => None,
        }
    }

    /// Whether the crate can do everything without this feature.
    pub(crate) const fn can_be_done_without(self) -> bool {
        matches!(self, Self::TableOwner | Self::Socket | Self::Fib)
    }
}

/// Name of a table that is never created.
const SCRATCH: &str = "egress_datapath_probe";

const TEXT: &str = "try out what nf_tables has";

/// Missing features; the kernel loads the modules that it has.
///
/// The probing transaction has no end, so the kernel checks every message and then discards them
/// all.
pub(crate) fn missing(socket: &mut Socket) -> Result<Vec<KernelPart>, KernelError> {
    match generation(socket) {
        Err(error) if is_absent(&error) => Ok(vec![KernelPart::NfTables]),
        Err(error) => Err(error),
        Ok(_) => {
            let mut missing = try_out(socket, &parts())?;
            // Without the inet family nothing is known about the rest.
            if missing.contains(&KernelPart::InetFamily) {
                missing = vec![KernelPart::InetFamily];
            }
            if !missing.contains(&KernelPart::InetFamily) && !has_owners(socket)? {
                missing.push(KernelPart::TableOwner);
            }
            Ok(missing)
        }
    }
}

/// Features that the rules can do without, and that this kernel lacks.
///
/// The kernel loads the modules that it has. A kernel without nf_tables has no flowtables.
pub(crate) fn missing_of_rules(socket: &mut Socket) -> Result<Missing, KernelError> {
    #[derive(Clone, Copy, PartialEq)]
    enum Optional {
        Table,
        Flowtable,
        Field(Field),
    }
    let mut trials = vec![(Optional::Table, Trial::Table), (Optional::Flowtable, Trial::Flowtable)];
    let rule = |field| (Optional::Field(field), Trial::Rule(load(field, reg::R1)));
    trials.extend(Field::OPTIONAL.map(rule));
    let missing = match try_out(socket, &trials) {
        Ok(missing) if !missing.contains(&Optional::Table) => missing,
        Ok(_) => vec![Optional::Flowtable],
        Err(error) if is_absent(&error) => vec![Optional::Flowtable],
        Err(error) => return Err(error),
    };
    let field = |optional: &Optional| match optional {
        Optional::Field(field) => Some(*field),
        Optional::Table | Optional::Flowtable => None,
    };
    Ok(Missing {
        families: BTreeSet::new(),
        fields: missing.iter().filter_map(field).collect(),
        flowtables: missing.contains(&Optional::Flowtable),
    })
}

/// Returns true if there is a flowtable, in any table of the network namespace.
pub(crate) fn has_flowtable(socket: &mut Socket) -> Result<bool, KernelError> {
    let request = Request {
        text: "nft list flowtables",
        kind: kind::GETFLOWTABLE,
        flags: flag::DUMP,
        answer: kind::NEWFLOWTABLE,
    };
    let mut found = false;
    let take = |_, _: &[u8]| {
        found = true;
        Ok(())
    };
    // Family 0: the flowtables of all families.
    let header = |writer: &mut Writer| writer.nfgen(0, 0);
    match nfnetlink::ask(socket, &request, header, take) {
        Ok(_) => Ok(found),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Object in the probing transaction that needs a feature.
enum Trial {
    Table,
    Flowtable,
    NatChain,
    EgressChain,
    Rule(Expr),
}

fn parts() -> Vec<(KernelPart, Trial)> {
    let rule = |part, expr| (part, Trial::Rule(expr));
    vec![
        (KernelPart::InetFamily, Trial::Table),
        (KernelPart::NatChain, Trial::NatChain),
        rule(KernelPart::Ct, Expr::Ct { key: ct::STATE, dreg: reg::R1 }),
        rule(KernelPart::Masquerade, Expr::Masquerade),
        rule(KernelPart::Nat, Expr::Snat { family: 2, sreg: reg::R1 }),
        rule(KernelPart::Counter, Expr::Counter),
        rule(KernelPart::Socket, load(Field::SocketWildcard, reg::R1)),
        rule(KernelPart::Fib, load(Field::DestinationType, reg::R1)),
        (KernelPart::EgressHook, Trial::EgressChain),
    ]
}

fn try_out<P: Copy>(socket: &mut Socket, parts: &[(P, Trial)]) -> Result<Vec<P>, KernelError> {
    let mut writer = Writer::default();
    let message = writer.message(kind::BEGIN, flag::REQUEST, socket.next_sequence());
    writer.nfgen(0, batch::NF_TABLES);
    writer.end(message);
    let mut sequences = Vec::new();
    for (part, trial) in parts {
        let sequence = socket.next_sequence();
        sequences.push((sequence, *part));
        write(&mut writer, sequence, trial, &mut || socket.next_sequence());
    }
    let datagram = writer.finish();
    let datagram = datagram.ok_or_else(|| KernelError::answer(TEXT, "a name is too long"))?;
    let (mut missing, mut refused) = (Vec::new(), None);
    let outcome = acknowledgements(socket, &datagram, &mut |sequence, ack| {
        let part = sequences.iter().find(|(of, _)| *of == sequence);
        match (ack.errno, part) {
            // Acknowledgements of the helper messages; their errors follow from a missing feature.
            (0, _) | (errno::ENOENT | errno::EOPNOTSUPP, None) => {}
            // A feature that is present only in part counts as missing: it is probed as it will be
            // used.
            (
                errno::ENOENT | errno::EOPNOTSUPP | errno::EPROTONOSUPPORT | errno::EINVAL,
                Some((_, part)),
            ) => missing.push(*part),
            (code, _) => {
                refused = Some(KernelError::refused(TEXT, code).with_words(ack.words));
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    });
    let outcome = outcome.map_err(|error| KernelError::io(TEXT, &error))?;
    if let Some(refused) = refused {
        return Err(refused);
    }
    outcome.complete(TEXT)?;
    Ok(missing)
}

fn write(writer: &mut Writer, sequence: u32, trial: &Trial, next: &mut dyn FnMut() -> u32) {
    let family = match trial {
        Trial::EgressChain => TableFamily::Netdev,
        Trial::Table | Trial::Flowtable | Trial::NatChain | Trial::Rule(_) => TableFamily::Inet,
    };
    let begin = |writer: &mut Writer, kind, flags, sequence| {
        let message = writer.message(kind, flag::REQUEST | flags, sequence);
        writer.nfgen(batch::number(family), 0);
        writer.string(1, SCRATCH);
        message
    };
    let new = flag::CREATE | flag::EXCL;
    match trial {
        Trial::Table => {
            let message = begin(writer, kind::NEWTABLE, new, sequence);
            writer.end(message);
            // Chain for the rules: any expression may stand in a chain that is not reached.
            let message = begin(writer, kind::NEWCHAIN, new, next());
            writer.string(3, "rules");
            writer.end(message);
        }
        Trial::Flowtable => {
            let message = writer.message(kind::NEWFLOWTABLE, flag::REQUEST | new, sequence);
            writer.nfgen(batch::number(family), 0);
            flowtable::write_in(writer, SCRATCH);
            writer.end(message);
        }
        Trial::NatChain => {
            let message = begin(writer, kind::NEWCHAIN, new, sequence);
            writer.string(3, "nat");
            writer.string(7, "nat");
            writer.nest(4, |writer| {
                writer.be32(1, 4);
                writer.be32(2, 99);
            });
            writer.end(message);
        }
        Trial::EgressChain => {
            let message = begin(writer, kind::NEWTABLE, new, next());
            writer.end(message);
            let message = begin(writer, kind::NEWCHAIN, new, sequence);
            writer.string(3, "egress");
            writer.string(7, "filter");
            writer.nest(4, |writer| {
                writer.be32(1, 1);
                writer.be32(2, 0);
                // Every network namespace has this interface.
                writer.string(3, "lo");
            });
            writer.end(message);
        }
        Trial::Rule(expr) => {
            let message = begin(writer, kind::NEWRULE, flag::CREATE | flag::APPEND, sequence);
            writer.string(2, "rules");
            writer.nest(4, |writer| {
                if let Expr::Snat { sreg, .. } = expr {
                    // The kernel requires the register to be written before.
                    Expr::Load { dreg: *sreg, data: vec![0; 4] }.write(writer);
                }
                expr.write(writer);
            });
            writer.end(message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::nft::tests::netns::{in_netns, nft};

    #[test]
    fn a_kernel_that_has_everything_lacks_nothing_and_keeps_nothing() {
        in_netns(|socket| {
            let before = generation(socket).unwrap();
            let missing = missing(socket).unwrap();
            // Whether a kernel has the optional features depends on its version.
            assert!(missing.iter().all(|part| *part == KernelPart::TableOwner), "{missing:?}");
            assert_eq!(missing.is_empty(), has_owners(socket).unwrap());
            assert_eq!(generation(socket), Ok(before));
            harness::needs(&["nft"]);
            assert_eq!(nft(&["list", "ruleset"], ""), Ok(String::new()));
        });
    }

    #[test]
    fn an_unknown_expression_is_a_missing_part() {
        in_netns(|socket| {
            let mut parts = parts();
            // An expression that no kernel has.
            parts.insert(3, (KernelPart::Ct, Trial::Rule(Expr::Other(0))));
            parts.push((KernelPart::Nat, Trial::Rule(Expr::Other(0))));
            assert_eq!(try_out(socket, &parts), Ok(vec![KernelPart::Ct, KernelPart::Nat]));
        });
    }

    #[test]
    fn without_the_table_nothing_else_is_judged() {
        in_netns(|socket| {
            let parts: Vec<_> = parts().into_iter().skip(1).collect();
            let rest = try_out(socket, &parts).unwrap();
            assert!(rest.contains(&KernelPart::Ct) && !rest.contains(&KernelPart::InetFamily));
        });
    }
}
