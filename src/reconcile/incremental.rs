//! Incremental updates: the cost depends on the change, not on the total.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::traced::{report_findings, span};
use super::{Ending, Error, Found, Reconciler, Report};
use crate::alloc::{MarkAllocator, TableAllocator};
use crate::cluster::Cluster;
use crate::connection::Connection;
use crate::datapath::Datapath;
use crate::diff::changes::Changes;
use crate::diff::op::Op;
use crate::plan::{Change, Finding, Part, Planned, Update};
use crate::policy::Policy;
use crate::state::{Elements, Firewall, Key, Set, State, Value};

/// Changes since connections were last checked for stale ones.
#[derive(Debug, Default)]
pub(crate) struct PendingConnections {
    /// Single-address sources whose packets may take another path; `None` if any source's may.
    sources: Option<BTreeSet<IpAddr>>,
    /// Elements before the changes.
    before: BTreeMap<Key, Option<Value>>,
}

impl<D: Datapath, M: MarkAllocator, T: TableAllocator> Reconciler<D, M, T> {
    /// Updates the wanted policies and the kernel; the cost depends on the updates, not the total.
    ///
    /// The result is that of a [`reconcile`](Self::reconcile) with all policies as they are then,
    /// with one exception: stale connections, whose translation is not the wanted one, are left to
    /// [`settle`](Self::settle) if the report says so. To find them the kernel walks all its
    /// conntrack entries, which may take longer than everything else. Until they are ended the
    /// guard rules of this node drop their packets. But call `settle` soon, above all on a gateway:
    /// packets that the far end still sends to these connections reach the pod's node, which blocks
    /// such replies for no longer than
    /// [`Connection::REPLY_BLOCK_TIME`](crate::datapath::Connection::REPLY_BLOCK_TIME). The cluster
    /// stays that of the last [`reconcile`](Self::reconcile).
    ///
    /// An update may leave a policy with an [error](crate::PolicyError), or without: then the policy
    /// is closed, or in force again.
    ///
    /// Sources that are prefixes depend on one another: where one is added or removed, everything
    /// is planned again, though from memory.
    ///
    /// ```
    /// # use egress_datapath::{Cluster, EgressIp, EgressPolicy, Node, NodeName, PolicyId};
    /// # use egress_datapath::{Reconciler, Sim, Update};
    /// # let node = |name, underlay: &str, tunnel: &str| -> Result<Node, Box<dyn std::error::Error>> {
    /// #     Ok(Node::new(NodeName::new(name)?, vec![underlay.parse()?], vec![tunnel.parse()?]))
    /// # };
    /// # let cluster = Cluster::new(
    /// #     NodeName::new("a")?,
    /// #     vec![node("a", "10.10.0.11", "172.31.0.11/16")?, node("b", "10.10.0.12", "172.31.0.12/16")?],
    /// #     vec!["10.244.0.0/16".parse()?],
    /// # );
    /// # let eip = EgressIp::V4("198.51.100.200".parse()?);
    /// # let id = PolicyId::new("default/p1")?;
    /// # let policy = EgressPolicy::new(id.clone(), vec!["10.244.1.10/32".parse()?], eip);
    /// # let mut egress = Reconciler::new(Sim::new());
    /// egress.reconcile(&cluster, [&policy])?;
    ///
    /// // A pod of the policy was started here.
    /// let sources = vec!["10.244.1.11/32".parse()?];
    /// let report = egress.update([Update::AddSources::<EgressPolicy> { policy: id, sources }])?;
    /// if !report.settled {
    ///     egress.settle()?; // now, or when there is time
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::NothingWanted`] before the first [`reconcile`](Self::reconcile), and
    /// [`Error::Plan`]: then nothing has changed. After other errors the changes are wanted, and
    /// the kernel may be between the two states, in an order in which that is safe: call
    /// [`repair`](Self::repair).
    pub fn update<P: Policy>(
        &mut self,
        updates: impl IntoIterator<Item = Update<P>>,
    ) -> Result<Report, Error> {
        span!("update");
        self.clock.start();
        let (changes, findings) = self.follow(updates.into_iter().map(Change::One))?;
        report_findings(&findings);
        let settled = self.settled && self.pending.is_none();
        Ok(self.finished(changes, findings, settled))
    }

    /// Ends the stale connections that [updates](Self::update) have left.
    ///
    /// A connection is stale if its translation is not the wanted one.
    /// [`reconcile`](Self::reconcile) and [`repair`](Self::repair) end stale connections, too.
    ///
    /// # Errors
    ///
    /// [`Error::Observe`] and [`Error::Apply`]; call again.
    pub fn settle(&mut self) -> Result<Report, Error> {
        span!("settle");
        if !self.settled {
            return self.repair();
        }
        self.clock.start();
        let changes = self.end_unsettled()?;
        Ok(self.finished(changes, Vec::new(), true))
    }

    /// Applies a snapshot as its difference to the last one; `None` if that is not possible.
    pub(crate) fn follow_snapshot<P: Policy>(
        &mut self,
        cluster: &Cluster,
        policies: &[P],
    ) -> Result<Option<Changes>, Error> {
        let Some(index) = self.index.as_ref().filter(|index| index.is_of(cluster)) else {
            return Ok(None);
        };
        let Some(differences) = index.differences(policies) else { return Ok(None) };
        let (changes, _) = self.follow(differences)?;
        Ok(Some(changes))
    }

    /// Plans changes of the wanted policies and applies them.
    ///
    /// The changes are wanted even if the state cannot be read.
    fn follow<P: Policy>(
        &mut self,
        differences: impl IntoIterator<Item = Change<P>>,
    ) -> Result<(Changes, Vec<Finding>), Error> {
        let Some(mut wanted) = self.wanted.take().filter(|_| self.index.is_some()) else {
            return Err(Error::NothingWanted);
        };
        let found = self.find(&wanted);
        if let Ok(found) = &found {
            self.follow_missing(&mut wanted, found);
        }
        let Some(mut index) = self.index.take() else { return Err(Error::NothingWanted) };
        let planned = index.update(differences, &mut self.marks, &mut self.tables);
        self.index = Some(index);
        let made = planned.map_err(Error::from).and_then(|(planned, findings)| {
            Ok((self.make_planned(planned, &mut wanted, found)?, findings))
        });
        self.wanted = Some(wanted);
        made
    }

    fn make_planned(
        &mut self,
        planned: Planned,
        wanted: &mut State,
        found: Result<Found, Error>,
    ) -> Result<Changes, Error> {
        let (moved, edited) = match &planned {
            Planned::Part(part) => (part.rest.is_some(), part.edited),
            Planned::Whole(_) => (true, true),
        };
        if moved || edited {
            self.findings = None;
        }
        let changes = match planned {
            Planned::Part(mut part) => {
                if let Some(rest) = &mut part.rest {
                    rest.leave_out(&wanted.missing);
                }
                self.make_part(part, wanted, found)?
            }
            Planned::Whole(mut state) => {
                state.leave_out(&wanted.missing);
                let observed = current(std::mem::replace(wanted, *state), found?);
                let changes = Changes::between(&observed, wanted);
                self.make(changes, &observed, wanted, Ending::Now)?
            }
        };
        if moved {
            self.release();
        }
        Ok(changes)
    }

    fn make_part(
        &mut self,
        part: Part,
        wanted: &mut State,
        found: Result<Found, Error>,
    ) -> Result<Changes, Error> {
        let was = part.rest.is_some().then(|| without_elements(wanted));
        let elements = change(wanted, part.elements, part.rest);
        let was = match found? {
            Found::Unchanged => was,
            Found::Rest(observed) => Some(*observed),
            // Changes by other programs are undone together with the update.
            whole @ Found::Whole(_) => return self.restore(wanted, whole),
        };
        if elements.is_empty() && was.is_none() {
            return Ok(Changes::default());
        }
        let is = was.is_some().then(|| without_elements(wanted));
        let before: BTreeMap<_, _> =
            elements.iter().map(|(key, was, _)| (*key, was.clone())).collect();
        let changes = Changes::of(was.as_ref().zip(is.as_ref()), elements);
        let decides = changes.ops().any(Op::is_nft);
        if decides {
            // If an egress IP is no longer local to this node, other policies that are denied for
            // now may have connections with it.
            let sources = part.sources.filter(|_| !changes.ops().any(takes_egress_ip));
            self.pending = Some(merged(self.pending.take(), sources, before));
        }
        self.apply_only(changes)
    }

    /// Ends the stale connections that were left for later.
    pub(crate) fn end_unsettled(&mut self) -> Result<Changes, Error> {
        let Some(wanted) = self.wanted.take() else { return Ok(Changes::default()) };
        let ended = self.end_left(&wanted);
        self.wanted = Some(wanted);
        ended
    }

    fn end_left(&mut self, wanted: &State) -> Result<Changes, Error> {
        let mut changes = Changes::default();
        let earlier = if self.in_sync { self.unsettled.take() } else { None };
        if let Some(earlier) = earlier {
            let made = self.make(Changes::default(), &earlier, wanted, Ending::Now);
            if made.is_err() {
                self.unsettled = Some(earlier);
            }
            changes = made?;
            self.release();
        }
        let Some(pending) = self.pending.take() else { return Ok(changes) };
        let in_sync = std::mem::take(&mut self.in_sync);
        match self.end(&pending, wanted) {
            Ok(ended) => changes.extend(ended),
            Err(error) => {
                self.pending = Some(pending);
                return Err(error);
            }
        }
        self.in_sync = in_sync;
        Ok(changes)
    }

    fn end(&mut self, pending: &PendingConnections, wanted: &State) -> Result<Changes, Error> {
        let sources = pending.sources.as_ref();
        let stale = self.stale_connections(sources, wanted, &pending.egress_ips())?;
        // The rules were the same before.
        let due_mark = |one: &Connection| one.due_mark(wanted, wanted);
        let changes = Changes::end(&stale, wanted.firewall.as_ref(), due_mark);
        if !changes.is_empty() {
            self.apply_changes(&changes)?;
        }
        Ok(changes)
    }
}

impl PendingConnections {
    /// Returns a state with the previous local egress IPs and nothing else.
    fn egress_ips(&self) -> State {
        let eips = self.before.iter().filter(|(key, _)| matches!(key.set(), Set::Eip(_)));
        let eips = eips.filter_map(|(key, value)| Some((*key, value.clone()?)));
        let firewall = Firewall { elements: eips.collect(), ..Firewall::default() };
        State { firewall: Some(firewall), ..State::default() }
    }
}

/// Returns the current state, given the state that the datapath was left in.
pub(super) fn current(before: State, found: Found) -> State {
    match found {
        Found::Unchanged => before,
        Found::Rest(rest) => {
            let State { firewall, ipsets, xtables, .. } = before;
            State { firewall, ipsets, xtables, ..*rest }
        }
        Found::Whole(state) => *state,
    }
}

fn merged(
    pending: Option<PendingConnections>,
    sources: Option<BTreeSet<IpAddr>>,
    before: BTreeMap<Key, Option<Value>>,
) -> PendingConnections {
    let Some(mut pending) = pending else { return PendingConnections { sources, before } };
    pending.sources = pending.sources.zip(sources).map(|(mut all, more)| {
        all.extend(more);
        all
    });
    for (key, value) in before {
        // The first value is the one by which connections were translated; an egress IP may have
        // been added and deleted since.
        let first = pending.before.entry(key).or_insert_with(|| value.clone());
        if matches!(key.set(), Set::Eip(_)) && first.is_none() {
            *first = value;
        }
    }
    pending
}

/// Returns whether the operation deletes an egress IP.
const fn takes_egress_ip(op: &Op) -> bool {
    matches!(op, Op::DeleteElement(key, _) if matches!(key.set(), Set::Eip(_)))
}

/// Changes a state, and returns the changed elements with their values before and after.
fn change(
    state: &mut State,
    elements: BTreeMap<Key, Option<Value>>,
    rest: Option<Box<State>>,
) -> Vec<(Key, Option<Value>, Option<Value>)> {
    if let Some(rest) = rest {
        let old = std::mem::replace(state, *rest);
        if let (Some(new), Some(old)) = (&mut state.firewall, old.firewall) {
            new.elements = old.elements;
        }
    }
    let Some(firewall) = &mut state.firewall else { return Vec::new() };
    let mut changed = Vec::new();
    for (key, is) in elements {
        let was = match &is {
            Some(value) => firewall.elements.insert(key, value.clone()),
            None => firewall.elements.remove(&key),
        };
        if was != is {
            changed.push((key, was, is));
        }
    }
    changed
}

/// Returns a copy of a state without elements.
pub(super) fn without_elements(state: &State) -> State {
    let firewall = state.firewall.as_ref().map(|firewall| Firewall {
        chains: firewall.chains.clone(),
        sets: firewall.sets.clone(),
        flowtable: firewall.flowtable,
        elements: Elements::default(),
        unlisted: BTreeSet::new(),
        strays: firewall.strays.clone(),
        dormant: firewall.dormant,
    });
    State { firewall, ..state.routing() }
}
