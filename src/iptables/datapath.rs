//! Datapath of a network namespace with iptables and ipset in place of the nf_tables table.
//!
//! Sets are changed over netlink. Rules are changed by the host's own `iptables-restore`: only it
//! knows the binary form that the host's kernel and its other iptables users agree on, and it takes
//! their lock.

use std::collections::{BTreeMap, BTreeSet};

use super::ipset::Ipsets;
#[cfg(feature = "ipset-sys")]
use super::libipset::Libipset;
use crate::count::Counts;
use crate::datapath::{Among, Datapath, Known, Observed, OnConnection};
use crate::diff::changes::{ApplyError, Changes, Made, Step};
use crate::diff::op::Op;
use crate::error::{KernelError, errno};
use crate::kernel::KernelDatapath;
use crate::kernel::netlink::message::Writer;
use crate::kernel::netlink::nfnetlink;
use crate::kernel::netlink::nfnetlink::Request;
use crate::kernel::netlink::socket::Socket;
use crate::kernel::nft;
use crate::kernel::nft::Sizes;
use crate::state::{Field, Variant, Xtables};
use crate::types::{DeviceName, Family};

use super::tool::Tools;

/// Datapath of a network namespace with its rules in iptables.
///
/// The datapath covers everything that a [`KernelDatapath`] reads and changes, and its own objects
/// in ipset and in iptables, of both variants. So a reconciliation that wants another
/// [`Backend`](crate::Backend) than the one found makes the new state complete before it removes
/// the old one.
///
/// The datapath runs `iptables-save` and `iptables-restore`, milliseconds each, and waits up to
/// five seconds for the lock that all users of iptables share. These programs run in the network
/// namespace of the calling thread: call the datapath in the namespace where it was opened,
/// anything else is an error.
///
/// There is no notification when other programs change iptables or sets: call
/// [`Reconciler::repair`](crate::Reconciler::repair) periodically.
#[derive(Debug)]
pub struct IptablesDatapath {
    kernel: KernelDatapath,
    sets: Sets,
    tools: Tools,
    /// Absence of the iptables match for sockets; `None` until it is known.
    lacks_sockets: Option<bool>,
}

/// Access to ipset sets: netlink or libipset.
#[derive(Debug)]
enum Sets {
    Netlink(Ipsets),
    #[cfg(feature = "ipset-sys")]
    Libipset(Libipset),
}

impl IptablesDatapath {
    /// Opens sockets in the network namespace of the calling thread, and finds the iptables tools.
    ///
    /// # Errors
    ///
    /// A kernel feature is missing, or both variants of iptables are.
    pub fn open() -> Result<Self, KernelError> {
        let mut kernel = KernelDatapath::open()?;
        let sets = Sets::Netlink(Ipsets::probe(&mut kernel.netfilter)?);
        Ok(Self { kernel, sets, tools: Tools::find()?, lacks_sockets: None })
    }

    /// Opens the datapath with sets read and written through libipset, in separate processes.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open), and that the process cannot be started.
    #[cfg(feature = "ipset-sys")]
    pub fn open_with_libipset(libipset: Libipset) -> Result<Self, KernelError> {
        let _sets = libipset.observe()?;
        let kernel = KernelDatapath::open()?;
        let sets = Sets::Libipset(libipset);
        Ok(Self { kernel, sets, tools: Tools::find()?, lacks_sockets: None })
    }

    /// Returns true if this namespace has sets of the datapath.
    ///
    /// A reconciliation then needs this datapath, also one that wants nf_tables. The check asks
    /// only the kernel, and runs no program.
    ///
    /// # Errors
    ///
    /// A kernel feature is missing; a kernel without ipset is no error.
    pub fn is_in_use() -> Result<bool, KernelError> {
        let mut socket = nft::open()?;
        match Ipsets::probe(&mut socket) {
            Ok(ipsets) => Ok(!ipsets.names(&mut socket)?.is_empty()),
            Err(error) if error.is_denied() => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// Installed variants of iptables.
    pub fn variants(&self) -> impl Iterator<Item = Variant> + '_ {
        Variant::BOTH.into_iter().filter(|variant| self.tools.has(*variant))
    }

    /// Returns the iptables variant that other programs on this host use.
    ///
    /// The variant with more rules of other programs is chosen; at equal numbers, nft if it is
    /// installed.
    ///
    /// # Errors
    ///
    /// A tool failed.
    pub fn prevailing(&mut self) -> Result<Variant, KernelError> {
        self.check_namespace()?;
        let count = |variant: Variant| -> Result<usize, KernelError> {
            let mut count = 0;
            for family in Family::BOTH.into_iter().filter(|_| self.tools.has(variant)) {
                count += super::saved::foreign_rules(&self.tools.save(variant, family)?);
            }
            Ok(count)
        };
        let (legacy, nft) = (count(Variant::Legacy)?, count(Variant::Nft)?);
        let legacy_wins = legacy > nft || !self.tools.has(Variant::Nft);
        Ok(if legacy_wins { Variant::Legacy } else { Variant::Nft })
    }

    /// MTU of an interface in bytes; `None` if no interface has that name.
    pub fn mtu_of(&mut self, device: &DeviceName) -> Result<Option<u32>, KernelError> {
        self.kernel.mtu_of(device)
    }

    /// Part of the datapath that needs no tools.
    pub const fn kernel(&mut self) -> &mut KernelDatapath {
        &mut self.kernel
    }

    /// The same datapath, with faults from its next call or run of a tool on.
    #[cfg(feature = "testing")]
    #[must_use]
    pub fn with_faults(mut self, faults: &crate::faults::Faults) -> Self {
        self.tools.set_faults(faults.clone());
        self.kernel.tap(faults);
        self
    }

    /// Output of `iptables-save` for one variant and family.
    pub(crate) fn saved(&self, variant: Variant, family: Family) -> Result<String, KernelError> {
        self.check_namespace()?;
        self.tools.save(variant, family)
    }

    /// Applies a script to one table, completely or not at all.
    pub(crate) fn restored(
        &self,
        variant: Variant,
        family: Family,
        script: &str,
    ) -> Result<(), KernelError> {
        self.check_namespace()?;
        self.tools.restore(variant, family, script)
    }

    fn check_namespace(&self) -> Result<(), KernelError> {
        if self.kernel.routing.is_of_thread() {
            return Ok(());
        }
        let what = "the calling thread is in another network namespace than when it was opened, or \
                    /proc is not mounted";
        Err(KernelError::answer("run iptables", what))
    }

    /// Applies changes to sets; returns the number of those made, and the refused ones by index.
    fn make_sets(&mut self, ops: &[&Op]) -> (usize, Vec<(usize, KernelError)>) {
        match &self.sets {
            Sets::Netlink(ipsets) => ipsets.make_all(&mut self.kernel.netfilter, ops),
            #[cfg(feature = "ipset-sys")]
            Sets::Libipset(libipset) => match self.check_namespace() {
                Ok(()) => libipset.make_all(ops),
                Err(error) => (0, vec![(0, error)]),
            },
        }
    }

    /// Applies a step: nf_tables operations first, then sets and iptables tables in their order.
    fn step(&mut self, step: &Step, sizes: &Sizes) -> Made {
        let (xtables, others): (Vec<&Op>, Vec<&Op>) =
            step.ops.iter().partition(|op| op.is_xtables());
        let mut made = 0;
        if !others.is_empty() {
            let ops = others.into_iter().cloned().collect();
            let (done, refused) = self.kernel.step(&Step { phase: step.phase, ops }, sizes);
            made += done;
            if !refused.is_empty() {
                return (made, refused);
            }
        }
        // The two families do not depend on each other.
        let (mut rest, mut all) = (xtables.as_slice(), Vec::<(Op, KernelError)>::new());
        let mut blocked = BTreeSet::new();
        while let Some((first, _)) = rest.split_first() {
            let table = |op: &Op| {
                op.xt_chain().map(|(variant, chain)| (variant, chain.family, chain.table))
            };
            let here = table(first);
            let end = rest.iter().position(|op| table(op) != here).unwrap_or(rest.len());
            let (group, next) = rest.split_at(end);
            rest = next;
            let goes = group.iter().filter(|op| !blocked.contains(&op.xtables_family()));
            let group: Vec<&Op> = goes.copied().collect();
            if group.is_empty() {
                continue;
            }
            let (done, refused) = match here {
                Some((variant, family, table)) => {
                    let restored = self.check_namespace().and_then(|()| {
                        self.tools.restore(variant, family, &super::script::of(table, &group))
                    });
                    // `iptables-restore` makes all changes to a table or none.
                    match restored {
                        Ok(()) => (group.len(), Vec::new()),
                        Err(error) => {
                            blocked.insert(first.xtables_family());
                            all.push(((*first).clone(), error));
                            continue;
                        }
                    }
                }
                None => self.make_sets(&group),
            };
            made += done;
            for (index, error) in refused {
                let Some(op) = group.get(index) else { continue };
                blocked.insert(op.xtables_family());
                all.push(((*op).clone(), error));
            }
        }
        (made, all)
    }
}

/// Absence of an iptables match of this name and revision; the kernel loads the module if it can.
///
/// A kernel that cannot be asked, because it has no matches for nf_tables, is taken to have it.
fn lacks_match(socket: &mut Socket, name: &str, revision: u32) -> Result<bool, KernelError> {
    // `NFNL_MSG_COMPAT_GET` of `include/uapi/linux/netfilter/nf_tables_compat.h`.
    const COMPAT_GET: u16 = 11 << 8;
    let request = Request {
        text: "look for a match of iptables",
        kind: COMPAT_GET,
        flags: 0,
        answer: COMPAT_GET,
    };
    let write = |writer: &mut Writer| {
        writer.nfgen(AF_INET, 0);
        writer.string(1, name);
        writer.be32(2, revision);
        writer.be32(3, 0);
    };
    match nfnetlink::ask(socket, &request, write, |_, _| Ok(())) {
        Ok(_) => Ok(false),
        Err(error) => match error.errno() {
            Some(errno::ENOENT | errno::EPROTONOSUPPORT) => Ok(true),
            Some(errno::EINVAL | errno::EOPNOTSUPP) => Ok(false),
            _ => Err(error),
        },
    }
}

const AF_INET: u8 = 2;

impl Datapath for IptablesDatapath {
    fn observe(&mut self, known: Known<'_>) -> Result<Observed, KernelError> {
        self.check_namespace()?;
        let mut state = self.kernel.read(known)?;
        let lacks_sockets = match self.lacks_sockets {
            Some(known) => known,
            // The first revision with `--nowildcard`.
            None => {
                *self.lacks_sockets.insert(lacks_match(&mut self.kernel.netfilter, "socket", 2)?)
            }
        };
        // The wanted state may be that of either backend.
        state.missing.fields.extend(lacks_sockets.then_some(Field::SocketWildcard));
        state.ipsets = match &self.sets {
            Sets::Netlink(ipsets) => ipsets.observe(&mut self.kernel.netfilter)?,
            #[cfg(feature = "ipset-sys")]
            Sets::Libipset(libipset) => libipset.observe()?,
        };
        let mut found: BTreeMap<Variant, Xtables> = BTreeMap::new();
        for variant in self.variants().collect::<Vec<_>>() {
            let mut tables = Xtables::default();
            // `ip6tables-save` fails where the kernel has no IPv6.
            let present = |family: &Family| !state.missing.families.contains(family);
            for family in Family::BOTH.into_iter().filter(present) {
                super::saved::read(&self.tools.save(variant, family)?, family, &mut tables);
            }
            if tables != Xtables::default() {
                found.insert(variant, tables);
            }
        }
        state.xtables = found;
        Ok(state.into())
    }

    fn connections(
        &mut self,
        among: Among<'_>,
        each: &mut OnConnection<'_>,
    ) -> Result<(), KernelError> {
        self.kernel.connections(among, each)
    }

    fn counters(&mut self) -> Result<Counts, KernelError> {
        self.kernel.counters()
    }

    fn announce(&mut self) -> Result<(), KernelError> {
        self.kernel.announce()
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
        let sizes = Sizes::of(changes.ops());
        changes.make(|step| self.step(step, &sizes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alloc::{MarkPool, TablePool};
    use crate::cluster::{Cluster, Node};
    use crate::datapath::observe;
    use crate::kernel::rtnetlink::kernel_tests::in_namespace;
    use crate::plan::plan;
    use crate::policy::{EgressIp, EgressPolicy};
    use crate::state::State;
    use crate::types::{NodeName, PolicyId};

    /// The nf_tables table of a node with a policy of so many sources.
    fn table(sources: u32) -> State {
        let name = NodeName::new("a").unwrap();
        let tunnel = "172.31.0.1/16".parse().unwrap();
        let node = Node::new(name.clone(), vec![[192, 0, 2, 1].into()], vec![tunnel]);
        let cluster =
            Cluster::new(name.clone(), vec![node], vec!["10.244.0.0/16".parse().unwrap()]);
        let address = |number: u32| std::net::IpAddr::from((0x0af4_0000 + number).to_be_bytes());
        let sources = (1..=sources).map(|number| address(number).into()).collect();
        let eip = EgressIp::V4([198, 51, 100, 200].into());
        let policy =
            EgressPolicy::new(PolicyId::new("p").unwrap(), sources, eip).with_gateway(name);
        let (mut marks, mut tables) = (MarkPool::default(), TablePool::default());
        let plan = plan(&cluster, [policy], &mut marks, &mut tables).unwrap();
        State { firewall: plan.state.firewall, ..State::default() }
    }

    #[test]
    fn a_match_that_the_kernel_lacks_is_noticed() {
        harness::needs(&[Variant::Nft.command(Family::V4)]);
        in_namespace(|| {
            let mut socket = nft::open().unwrap();
            for (name, revision, lacks) in
                [("socket", 2, false), ("socket", 99, true), ("no_match", 0, true)]
            {
                assert_eq!(lacks_match(&mut socket, name, revision), Ok(lacks), "{name}");
            }
        });
    }

    #[test]
    fn sets_of_the_nf_tables_backend_grow() {
        harness::needs(&[Variant::Nft.command(Family::V4)]);
        in_namespace(|| {
            let (mut few, mut many) = (table(10), table(3_000));
            let mut kernel = KernelDatapath::open().unwrap();
            let missing = observe(&mut kernel).unwrap().missing;
            few.leave_out(&missing);
            many.leave_out(&missing);
            kernel.apply(&Changes::between(&State::default(), &few)).unwrap();
            let mut iptables = IptablesDatapath::open().unwrap();
            iptables.apply(&Changes::between(&few, &many)).unwrap();
            assert_eq!(observe(&mut kernel).unwrap(), many);
        });
    }
}
