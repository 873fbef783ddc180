//! The index of a plan, by which the cost of planning a change depends on that change alone.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

use super::classes::Classes;
use super::egress_hook;
use super::egress_hook::hook;
use super::policies::{Handle, NormalizedPolicy, Policies};
use super::replies::{own_mark, receivers};
use super::reverse_path::reverse_table;
use super::skeleton::Used;
use super::table::{egress_ips, skeleton, ways_out};
use super::validate::{ValidatedCluster, tunnel_of};
use super::{
    Change, DenyReason, Finding, Gateways, PlanError, Role, Update, closing_table, gateway_of,
    iptables as xtables, numbered, reserve_given, roles, routing,
};
use crate::alloc::{MarkAllocator, TableAllocator};
use crate::cluster::{Backend, Cluster};
use crate::policy::{Policy, Unavailable};
use crate::state::{Data, Elements, Field, Key, Missing, State, Tag, Value};
use crate::types::{DeviceName, Family, Mark, NodeName, PolicyId, TableId};

/// The wanted policies, and the counts and classes that their plan is derived from.
#[derive(Debug)]
pub(crate) struct Index {
    pub(super) world: ValidatedCluster,
    pub(super) policies: Policies,
    pub(super) v4: Classes<u32>,
    pub(super) v6: Classes<u128>,
    /// Number of policies steered to each gateway node, by its index and counted once per family.
    pub(super) used: BTreeMap<usize, usize>,
    /// Number of policies whose gateway is this node, counted once per family.
    pub(super) own: usize,
    /// Number of policies for each egress IP and gateway node, by its index and counted once per
    /// family.
    pub(super) egress_ips: BTreeMap<(IpAddr, usize), usize>,
    pub(super) gateways: Gateways,
    /// Mark of connections whose initiator is on this node, with replies by the tunnel.
    pub(super) own_mark: Option<Mark>,
    /// True if no mark or table was left for some gateway.
    pub(super) short: bool,
    /// Table of the fallback rule.
    pub(super) closing: Option<TableId>,
    /// Table of the reverse path, with replies by the tunnel.
    pub(super) reverse: Option<TableId>,
    /// Number of tables, if none is left for the fallback rule.
    pub(super) no_table: Option<usize>,
}

/// A plan up to the point where marks and tables are needed.
#[derive(Debug)]
pub(crate) struct Draft {
    world: ValidatedCluster,
    policies: Policies,
    v4: Classes<u32>,
    v6: Classes<u128>,
    used: BTreeMap<usize, usize>,
    own: usize,
    egress_ips: BTreeMap<(IpAddr, usize), usize>,
    elements: Elements,
}

impl Draft {
    /// Checks the input, and assigns a class to every source.
    pub(crate) fn new<P: Policy>(
        cluster: &Cluster,
        policies: impl IntoIterator<Item = P>,
    ) -> Result<Self, PlanError> {
        let world = ValidatedCluster::new(cluster)?;
        xtables::check(&world)?;
        egress_hook::check(&world)?;
        let policies = Policies::new(policies, &world.nodes);
        let (mut used, mut own, mut addresses) = (BTreeMap::new(), 0, BTreeMap::new());
        for (_, kept) in policies.iter() {
            for (_, role) in roles(kept, &world) {
                match role {
                    Role::Client(place) => *used.entry(place).or_default() += 1,
                    Role::Gateway => own += 1,
                    Role::Denied(_) | Role::Invalid => {}
                }
            }
            for address in egress_ips(kept, &world) {
                *addresses.entry(address).or_default() += 1;
            }
        }
        let (v4, v6, elements) = classes(&policies);
        Ok(Self { world, policies, v4, v6, used, own, egress_ips: addresses, elements })
    }

    /// Returns the elements of the sets of sources and classes, which depend on no mark.
    pub(crate) const fn elements(&self) -> &Elements {
        &self.elements
    }

    /// Names nodes that may hold a mark or a table; those of the cluster are known anyway.
    pub(crate) fn with_former(mut self, nodes: &BTreeSet<NodeName>) -> Self {
        let listed: BTreeSet<_> = self.world.cluster.nodes.iter().map(|node| &node.name).collect();
        // The order in which ids are taken from idle nodes must not depend on earlier plans.
        self.world.former = nodes.iter().filter(|node| !listed.contains(node)).cloned().collect();
        self
    }

    /// Leaves out rules that test a field which rules cannot test in the kernel of this node.
    pub(crate) fn without(mut self, missing: &BTreeSet<Field>) -> Self {
        self.world.missing_fields.clone_from(missing);
        self
    }

    /// Completes the plan with marks and tables.
    pub(crate) fn number(
        self,
        marks: &mut dyn MarkAllocator,
        tables: &mut dyn TableAllocator,
    ) -> Result<(Index, State), PlanError> {
        let Self { world, policies, v4, v6, used, own, egress_ips, elements } = self;
        reserve_given(&world, marks)?;
        let receivers = receivers(&used, own > 0, &world);
        let mut gateways = numbered(&receivers, &used, &world, marks, tables)?;
        let own_mark = own_mark(&mut gateways, &used, &world, marks)?;
        let (closing, no_table) = closing_table(&world, &gateways, tables)?;
        let reverse = reverse_table(&world, &gateways, tables)?;
        let short = gateways.len() < receivers.len();
        let index = Index {
            world,
            policies,
            v4,
            v6,
            used,
            own,
            egress_ips,
            gateways,
            own_mark,
            short,
            closing,
            reverse,
            no_table,
        };
        let state = index.state(elements);
        Ok((index, state))
    }
}

/// Returns the classes of all policies, and the elements of their sets.
fn classes(policies: &Policies) -> (Classes<u32>, Classes<u128>, Elements) {
    let mut elements = Elements::default();
    let v4 = Classes::new(policies, &mut elements);
    let v6 = Classes::new(policies, &mut elements);
    elements.fill_sources(v4.sources(), v6.sources());
    (v4, v6, elements)
}

impl Index {
    /// Rebuilds everything that is derived from the policies.
    pub(super) fn renew(&mut self) -> State {
        self.policies.number();
        let elements;
        (self.v4, self.v6, elements) = classes(&self.policies);
        self.state(elements)
    }

    /// Returns the state, given the elements of sources and classes.
    fn state(&self, mut elements: Elements) -> State {
        let (mut state, fixed) = self.parts();
        if let Backend::Iptables(iptables) = self.world.cluster.backend {
            state.firewall = None;
            let (sets, tables) =
                xtables::xtables(&self.world, &self.policies, &self.gateways, iptables);
            state.ipsets = sets;
            state.xtables.insert(iptables.variant, tables);
            return state;
        }
        elements.extend(fixed);
        for (_, kept) in self.policies.iter() {
            elements.extend(ways_out(&self.world, kept, &self.gateways));
        }
        let local = self.egress_ips.keys().filter(|(_, gateway)| self.world.is_here(*gateway));
        elements.extend(local.map(|(address, _)| (Key::eip(*address), NOTHING)));
        if let Some(firewall) = &mut state.firewall {
            firewall.elements = elements;
        }
        state
    }

    /// Returns the state without elements of nf_tables sets.
    pub(crate) fn rest(&self) -> State {
        match self.world.cluster.backend {
            Backend::Iptables(_) => self.state(Elements::default()),
            Backend::Nftables => self.parts().0,
        }
    }

    /// Returns the state without elements, and the elements that belong to no single policy.
    pub(super) fn parts(&self) -> (State, BTreeMap<Key, Value>) {
        let fields = self.world.missing_fields.clone();
        let missing = Missing { fields, ..Missing::default() };
        let mut state = State { missing, ..State::default() };
        let tables = (self.closing, self.reverse);
        routing::routing(&self.world, &self.gateways, self.own_mark, tables, &mut state);
        let lengths: BTreeSet<_> = (self.v4.lengths().map(|length| (Family::V4, length)))
            .chain(self.v6.lengths().map(|length| (Family::V6, length)))
            .collect();
        let those = |v4: bool, v6: bool| {
            let has = [(Family::V4, v4), (Family::V6, v6)].into_iter().filter(|(_, has)| *has);
            has.map(|(family, _)| family).collect()
        };
        let used = Used {
            lengths,
            singles: those(self.v4.has_singles(), self.v6.has_singles()),
            ranges: those(self.v4.has_ranges(), self.v6.has_ranges()),
            translates: self.translates(),
        };
        let (firewall, fixed) = skeleton(&self.world, &self.gateways, self.own_mark, used);
        state.firewall = Some(firewall);
        state.claims = self.claims();
        state.hook = hook(&self.world, &self.gateways, self.own_mark);
        (state, fixed)
    }

    /// Returns the egress IPs that this node adds to interfaces of the host.
    pub(super) fn claims(&self) -> BTreeSet<(IpAddr, DeviceName)> {
        let cluster = &self.world.cluster;
        if cluster.claims.is_empty() {
            return BTreeSet::new();
        }
        let local = self.egress_ips.keys().filter(|(_, gateway)| self.world.is_here(*gateway));
        let claimed = local.filter_map(|(address, _)| {
            Some((*address, cluster.claim_of(*address)?.device.clone()))
        });
        claimed.collect()
    }

    /// Returns whether this node is the gateway of any policy.
    pub(super) fn translates(&self) -> bool {
        self.own > 0
    }

    /// Returns the changes from the wanted policies to a snapshot; `None` if most of it differs.
    pub(crate) fn differences<'p, P: Policy>(
        &self,
        policies: &'p [P],
    ) -> Option<Vec<Change<&'p P>>> {
        let mut seen = vec![false; self.policies.end()];
        let (mut changes, mut new) = (Vec::new(), BTreeSet::new());
        let (mut known, mut differing, mut twice) = (0, 0, BTreeMap::<_, Vec<_>>::new());
        for (place, policy) in (0..).zip(policies) {
            // A list that has not changed mostly comes in the same order as the first time.
            let same = self.policies.get(place).is_some_and(|kept| kept.id == *policy.id());
            let handle = if same { Some(place) } else { self.policies.find(policy.id()) };
            let slot = handle.and_then(|handle| seen.get_mut(usize::try_from(handle).ok()?));
            let again = match slot {
                Some(seen) => std::mem::replace(seen, true),
                None => !new.insert(policy.id()),
            };
            if again {
                twice.insert(policy.id(), Vec::new());
                continue;
            }
            known += usize::from(handle.is_some());
            let kept = handle.and_then(|handle| self.policies.get(handle));
            if !kept.is_some_and(|kept| kept.is(policy, &self.world)) {
                differing += policy.sources().len();
                changes.push(Change::One(Update::Upsert(policy)));
            }
        }
        if !twice.is_empty() {
            for policy in policies {
                if let Some(all) = twice.get_mut(policy.id()) {
                    all.push(policy);
                }
            }
            changes.retain(|change| !change.upserts().is_some_and(|id| twice.contains_key(id)));
            changes.extend(twice.into_values().map(Change::Several));
        }
        if known < self.policies.len() {
            let gone = (0..).zip(&seen).filter(|(_, seen)| !**seen);
            let gone = gone.filter_map(|(handle, _)| self.policies.get(handle));
            changes.extend(gone.map(|kept| Change::One(Update::Remove(kept.id.clone()))));
        }
        // Beyond this, single updates cost more than a new plan.
        let all = self.policies.iter().map(|(_, kept)| kept.sources.len()).sum::<usize>();
        (differing <= MANY || differing <= all / 4).then_some(changes)
    }

    /// Returns the cluster that the plan was made for.
    pub(crate) const fn cluster(&self) -> &Cluster {
        &self.world.cluster
    }

    /// Returns whether the plan was made for this cluster.
    pub(crate) fn is_of(&self, cluster: &Cluster) -> bool {
        self.world.cluster == *cluster
    }

    /// Returns the gateways that this node steers to.
    pub(crate) fn gateways(&self) -> BTreeMap<NodeName, (Mark, TableId)> {
        let gateways = self.gateways.iter();
        gateways.map(|(name, found)| (name.clone(), (found.mark, found.table))).collect()
    }

    /// Returns whether this node steers to a gateway.
    pub(crate) fn steers_to(&self, node: &NodeName) -> bool {
        self.gateways.contains_key(node)
    }

    /// Returns whether the caller gives the node its mark.
    pub(crate) fn gives_mark(&self, node: &NodeName) -> bool {
        self.world.given_mark(node).is_some()
    }

    /// Returns the nodes to which this node sends packets through the tunnel, by their index.
    pub(super) fn receivers(&self) -> BTreeSet<usize> {
        receivers(&self.used, self.translates(), &self.world)
    }

    /// Returns the finding about nodes for which no mark or table is left for their replies.
    pub(super) fn unreachable_replies(&self) -> Option<Finding> {
        if !self.short {
            return None;
        }
        let only_replies = |place: &usize| !self.used.contains_key(place);
        let receivers = self.receivers().into_iter().filter(only_replies);
        let named = receivers.filter_map(|place| self.world.node(place).map(|node| &node.name));
        let left = named.filter(|name| !self.gateways.contains_key(*name));
        let mut nodes: Vec<_> = left.cloned().collect();
        nodes.sort_unstable();
        (!nodes.is_empty()).then_some(Finding::TooManyNodes { nodes })
    }

    /// Returns the finding about a missing table of the reverse path.
    fn no_reverse_path(&self) -> Option<Finding> {
        let missing = self.own_mark.is_some() && self.reverse.is_none();
        missing.then_some(Finding::NoReversePathTable)
    }

    /// Returns the policies in the order of their ids, with the keys of their counters.
    pub(crate) fn counted(&self) -> Vec<(&PolicyId, Family, Tag)> {
        let all = self.policies.iter().flat_map(|(_, kept)| {
            roles(kept, &self.world).map(move |(family, _)| (&kept.id, family, kept.tag))
        });
        let mut all: Vec<_> = all.collect();
        all.sort_unstable();
        all
    }

    /// Returns errors of nodes and policies, and warnings, in an order that depends on nothing else.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        let left_out = self.world.nodes.left_out.iter();
        let mut findings: Vec<_> = left_out
            .map(|(node, errors)| Finding::InvalidNode {
                node: node.clone(),
                errors: errors.clone(),
            })
            .collect();
        // Of thousands of policies hardly one selects a node.
        let addresses = self.world.nodes.addresses.keys();
        let on_nodes: HashSet<_> =
            addresses.flat_map(|address| self.selecting_alone(*address)).copied().collect();
        let of_policies = self.policies.iter().filter_map(|(handle, kept)| {
            let may = !kept.sources.cover.is_empty() || on_nodes.contains(&handle);
            let found = may.then(|| self.sources_of_nodes(kept)).flatten();
            let found: Vec<_> = self.reasons(kept).chain(found).collect();
            (!found.is_empty()).then_some((handle, found))
        });
        let mut of_policies: Vec<_> = of_policies.collect();
        of_policies.sort_unstable_by(|(one, _), (other, _)| self.policies.order(*one, *other));
        findings.extend(of_policies.into_iter().flat_map(|(_, found)| found));
        findings.extend(self.no_table.map(|capacity| Finding::NoClosingTable { capacity }));
        findings.extend(self.unreachable_replies());
        findings.extend(self.no_reverse_path());
        let v4 = self.v4.overlaps().map(|pair| (Family::V4, pair));
        let v6 = self.v6.overlaps().map(|pair| (Family::V6, pair));
        findings.extend(self.overlaps(&v4.chain(v6).collect()));
        let uses = self.egress_ips.keys().zip(self.egress_ips.keys().skip(1));
        let twice = uses.filter(|((one, _), (next, _))| one == next).map(|((one, _), _)| *one);
        findings.extend(self.shared_egress_ips(twice));
        let missing = self.world.missing_fields.iter();
        findings.extend(missing.filter_map(|field| match field {
            Field::SocketWildcard if self.translates() => Some(Finding::SocketsUnavailable),
            Field::DestinationType if self.world.cluster.backend == Backend::Nftables => {
                Some(Finding::AddressTypesUnavailable)
            }
            _ => None,
        }));
        findings
    }

    /// Returns the findings about those of sorted egress IPs that several gateways use.
    pub(super) fn shared_egress_ips(
        &self,
        addresses: impl IntoIterator<Item = IpAddr>,
    ) -> Vec<Finding> {
        let mut last = None;
        let each = addresses.into_iter().filter(|address| last.replace(*address) != Some(*address));
        let found = each.filter_map(|address| {
            let gateways = self.egress_ips.range((address, 0)..=(address, usize::MAX));
            let gateways = gateways.filter_map(|((_, place), _)| self.world.node(*place));
            let mut gateways: Vec<_> = gateways.map(|node| node.name.clone()).collect();
            gateways.sort_unstable();
            (gateways.len() > 1).then_some(Finding::EgressIpOnGateways { address, gateways })
        });
        found.collect()
    }

    /// Returns the findings on a node whose network stack lacks families.
    pub(crate) fn findings_at(&self, missing: &BTreeSet<Family>) -> Vec<Finding> {
        let mut findings = self.findings();
        let used = missing.iter().filter(|family| tunnel_of(&self.world.here, **family).is_some());
        findings.extend(used.map(|family| Finding::FamilyUnavailable { family: *family }));
        findings
    }

    /// Returns the findings about pairs of policies: the first ones, and the number of the others.
    pub(super) fn overlaps(
        &self,
        pairs: &HashSet<(Family, (Handle, Handle))>,
    ) -> impl Iterator<Item = Finding> {
        // A policy may list destinations of the other family alone.
        let selects = |(family, (_, loser)): &(Family, (Handle, Handle))| {
            self.policies.get(*loser).is_some_and(|kept| kept.selects_any(*family))
        };
        let mut first: Vec<_> = pairs.iter().copied().filter(selects).collect();
        let more = first.len().saturating_sub(OVERLAPS);
        let order = |one: &(Family, (Handle, Handle)), other: &(Family, (Handle, Handle))| {
            let ((one, (a, b)), (other, (c, d))) = (*one, *other);
            let policies = self.policies.order(a, c).then_with(|| self.policies.order(b, d));
            one.cmp(&other).then(policies)
        };
        if more > 0 {
            first.select_nth_unstable_by(OVERLAPS, order);
            first.truncate(OVERLAPS);
        }
        first.sort_unstable_by(order);
        let id = |handle| self.policies.get(handle).map(|kept| kept.id.clone());
        let overlap = move |(family, (winner, loser))| {
            Some(Finding::Overlap { winner: id(winner)?, loser: id(loser)?, family })
        };
        let more = (more > 0).then_some(Finding::MoreOverlaps { count: more });
        first.into_iter().filter_map(overlap).chain(more)
    }

    /// Returns the policies that have this address as a source of its own, not in a prefix.
    fn selecting_alone(&self, address: IpAddr) -> &[Handle] {
        match address {
            IpAddr::V4(v4) => self.v4.selecting_alone(v4.to_bits()),
            IpAddr::V6(v6) => self.v6.selecting_alone(v6.to_bits()),
        }
    }

    /// Returns the findings about a policy, apart from those that other policies share.
    pub(super) fn findings_of(&self, kept: &NormalizedPolicy) -> impl Iterator<Item = Finding> {
        self.reasons(kept).chain(self.sources_of_nodes(kept))
    }

    /// Returns the finding about sources of a policy that are addresses of nodes.
    fn sources_of_nodes(&self, kept: &NormalizedPolicy) -> Option<Finding> {
        let sources = kept.sources.around(&self.world.nodes.addresses);
        (!sources.is_empty()).then(|| Finding::SourcesOfNodes { policy: kept.id.clone(), sources })
    }

    /// Returns the errors of a policy, and the reasons why it cannot be carried out.
    fn reasons(&self, kept: &NormalizedPolicy) -> impl Iterator<Item = Finding> {
        let errors = kept.all_errors();
        let invalid = (!errors.is_empty()).then(|| Finding::InvalidPolicy {
            policy: kept.id.clone(),
            unavailable: kept.unavailable,
            errors,
        });
        let denied = roles(kept, &self.world).filter_map(|(family, role)| {
            let reason = match role {
                Role::Denied(reason) => reason,
                Role::Client(_) if gateway_of(role, &self.world, &self.gateways).is_none() => {
                    DenyReason::TooManyGateways
                }
                _ => return None,
            };
            let policy = kept.id.clone();
            Some(match kept.unavailable {
                Unavailable::Drop => Finding::Denied { policy, family, reason },
                Unavailable::Bypass => Finding::Bypassed { policy, family, reason },
            })
        });
        invalid.into_iter().chain(denied)
    }
}

/// Number of overlaps that are listed: whoever creates policies decides how many there are.
const OVERLAPS: usize = 1_000;

/// Number of changed sources up to which updates are always cheaper than a new plan.
const MANY: usize = 1_000;

/// The value of an element without data.
pub(super) const NOTHING: Value = Value::plain(Data::None);
