//! Operations on ipsets and iptables as commands.

use std::fmt;

use ipnet::IpNet;

use super::{Op, PLAIN, quoted};
use crate::rules::iptables::words;
use crate::state::{Ipset, IpsetContents, Member, Variant, XtChain, XtEdit};
use crate::types::Family;

impl Op {
    /// Returns whether the operation uses `ipset` or `iptables`.
    pub(crate) const fn is_xtables(&self) -> bool {
        matches!(
            self,
            Self::AddIpset(..)
                | Self::PutIpset(..)
                | Self::DeleteIpset(_)
                | Self::PutMember(..)
                | Self::DeleteMember(..)
                | Self::AddXtChain(..)
                | Self::DeleteXtChain(..)
                | Self::EditXtChain(..)
        )
    }

    /// Returns the family of an iptables or ipset operation.
    pub(crate) const fn xtables_family(&self) -> Option<Family> {
        match self {
            Self::AddIpset(set, _)
            | Self::PutIpset(set, _)
            | Self::DeleteIpset(set)
            | Self::PutMember(set, ..)
            | Self::DeleteMember(set, _) => Some(set.family()),
            Self::AddXtChain(_, chain)
            | Self::DeleteXtChain(_, chain)
            | Self::EditXtChain(_, chain, _) => Some(chain.family),
            _ => None,
        }
    }

    /// Returns the variant and chain of an iptables operation, which determine its transaction.
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    pub(crate) const fn xt_chain(&self) -> Option<(Variant, XtChain)> {
        match self {
            Self::AddXtChain(variant, chain)
            | Self::DeleteXtChain(variant, chain)
            | Self::EditXtChain(variant, chain, _) => Some((*variant, *chain)),
            _ => None,
        }
    }
}

/// Writes the commands of an operation, one on each line.
pub(crate) fn command(f: &mut fmt::Formatter<'_>, op: &Op) -> fmt::Result {
    match op {
        Op::AddIpset(set, contents) => create(f, *set, contents),
        Op::PutIpset(set, contents) => {
            let new = Ipset::Temporary(set.family());
            create(f, new, contents)?;
            write!(f, "\nipset swap {new} {set} && ipset destroy {new}")
        }
        Op::DeleteIpset(set) => write!(f, "ipset destroy {set}"),
        Op::PutMember(set, net, member) => put_member(f, *set, *net, *member),
        Op::DeleteMember(set, net) => write!(f, "ipset del {set} {net}"),
        Op::AddXtChain(variant, chain) => {
            write!(f, "{} -N {}", iptables(*variant, *chain), chain.name)
        }
        Op::DeleteXtChain(variant, chain) => {
            let iptables = iptables(*variant, *chain);
            write!(f, "{iptables} -F {0} && {iptables} -X {0}", chain.name)
        }
        Op::EditXtChain(variant, chain, edits) => {
            for (number, edit) in edits.iter().enumerate() {
                if number > 0 {
                    f.write_str("\n")?;
                }
                f.write_str(&iptables(*variant, *chain))?;
                // A rule of another program may have any text as comment.
                let mut text = String::new();
                write_edit(&mut text, chain, edit)?;
                for word in words(&text) {
                    let plain = if word == "!" { "!" } else { PLAIN };
                    write!(f, " {}", quoted(&word, plain))?;
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

fn create(f: &mut fmt::Formatter<'_>, set: Ipset, contents: &IpsetContents) -> fmt::Result {
    let family = match set.family() {
        Family::V4 => "inet",
        Family::V6 => "inet6",
    };
    write!(f, "ipset create {set} hash:net family {family} maxelem {}", contents.capacity)?;
    f.write_str(if contents.with_marks { " skbinfo" } else { "" })?;
    for (net, member) in &contents.members {
        f.write_str("\n")?;
        put_member(f, set, *net, *member)?;
    }
    Ok(())
}

fn put_member(f: &mut fmt::Formatter<'_>, set: Ipset, net: IpNet, member: Member) -> fmt::Result {
    write!(f, "ipset add {set} {net}{member}")
}

fn iptables(variant: Variant, chain: XtChain) -> String {
    format!("{} -t {}", variant.command(chain.family), chain.table.name())
}

/// Writes an edit as a line for `iptables-restore`.
pub(crate) fn write_edit(f: &mut dyn fmt::Write, chain: &XtChain, edit: &XtEdit) -> fmt::Result {
    match edit {
        XtEdit::Append(rule) => write!(f, "-A {} {rule}", chain.name),
        XtEdit::Insert(place, rule) => write!(f, "-I {} {place} {rule}", chain.name),
        XtEdit::Delete(place) => write!(f, "-D {} {place}", chain.name),
        XtEdit::Remove(rule) => write!(f, "-D {} {rule}", chain.name),
    }
}
