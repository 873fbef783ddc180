//! A kernel in memory: refuses what the kernel refuses.

use std::collections::btree_map::Entry;

use crate::changes::{Changes, Made, Step};
use crate::datapath::Datapath;
use crate::error::{ApplyError, KernelError, errno};
use crate::op::Op;
use crate::state::{
    ChainId, Data, Firewall, NftRule, Route, RuleAction, Set, State, Stmt, Verdict,
};
use crate::types::DeviceName;

/// A [`Datapath`] in memory that refuses what the kernel refuses.
///
/// What is added must not exist, what is deleted must, what is referred to cannot go, and an
/// nf_tables transaction is all or nothing. A device takes along what was on it.
///
/// ```
/// use egress_datapath::{Cluster, EgressIp, EgressPolicy, Node, NodeName, PolicyId};
/// use egress_datapath::{Reconciler, Sim};
///
/// let node = |name, underlay: &str, tunnel: &str| -> Result<Node, Box<dyn std::error::Error>> {
///     Ok(Node::new(NodeName::new(name)?, vec![underlay.parse()?], vec![tunnel.parse()?]))
/// };
/// let cluster = Cluster::new(
///     NodeName::new("a")?,
///     vec![node("a", "10.10.0.11", "172.31.0.11/16")?, node("b", "10.10.0.12", "172.31.0.12/16")?],
///     vec!["10.244.0.0/16".parse()?],
/// );
/// let policy = EgressPolicy {
///     gateway: Some(NodeName::new("b")?),
///     ..EgressPolicy::new(
///         PolicyId::new("default/p1")?,
///         vec!["10.244.1.10/32".parse()?],
///         EgressIp::V4("198.51.100.200".parse()?),
///     )
/// };
/// let mut egress = Reconciler::new(Sim::new());
/// assert!(egress.reconcile(&cluster, [&policy])?.changes.len() > 0);
/// assert!(egress.reconcile(&cluster, [&policy])?.changes.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Sim {
    state: State,
    /// How many operations to make before one is refused, and with which error number.
    refuse: Option<(usize, Errno)>,
}

impl Sim {
    /// A kernel that holds nothing of ours.
    pub fn new() -> Self {
        Self::default()
    }

    /// A kernel that holds this.
    pub const fn with_state(state: State) -> Self {
        Self { state, refuse: None }
    }

    /// What it holds.
    pub const fn state(&self) -> &State {
        &self.state
    }

    /// What it holds, to be changed behind the library's back.
    pub const fn state_mut(&mut self) -> &mut State {
        &mut self.state
    }

    /// Refuses one operation with an error number (positive), however good it is: the one that
    /// comes after this many others from now on.
    ///
    /// ```
    /// use egress_datapath::{Changes, Datapath, Sim, State};
    /// # let wanted = State { firewall: Some(Default::default()), ..State::default() };
    /// let mut kernel = Sim::new();
    /// kernel.refuse(0, 12);
    /// let changes = Changes::between(kernel.state(), &wanted);
    /// assert!(kernel.apply(&changes).is_err(), "out of memory");
    /// assert!(kernel.apply(&changes).is_ok(), "once is enough");
    /// ```
    pub const fn refuse(&mut self, after: usize, errno: i32) {
        self.refuse = Some((after, errno));
    }

    /// Makes an operation, or refuses it.
    fn op(&mut self, op: &Op) -> Result<(), Errno> {
        match &mut self.refuse {
            Some((0, errno)) => {
                let errno = *errno;
                self.refuse = None;
                return Err(errno);
            }
            Some((after, _)) => *after -= 1,
            None => {}
        }
        if op.is_xtables() {
            return crate::state::xtables::make(&mut self.state, op);
        }
        make(&mut self.state, op)
    }

    /// Makes a step; of a transaction all or nothing, of other requests those that are accepted.
    fn step(&mut self, step: &Step) -> Made {
        let transaction = step.ops.first().is_some_and(Op::is_nft);
        let before = transaction.then(|| self.state.clone());
        let mut refused = Vec::new();
        for op in &step.ops {
            if let Err(errno) = self.op(op) {
                refused.push((op.clone(), KernelError::refused(op, errno)));
            }
        }
        match before {
            Some(before) if !refused.is_empty() => {
                self.state = before;
                (0, refused)
            }
            _ => (step.ops.len() - refused.len(), refused),
        }
    }
}

impl Datapath for Sim {
    fn observe(&mut self) -> Result<State, KernelError> {
        Ok(self.state.clone())
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
        changes.make(|step| self.step(step))
    }
}

type Errno = i32;

fn make(state: &mut State, op: &Op) -> Result<(), Errno> {
    match op {
        Op::AddTable if state.firewall.is_some() => Err(errno::EEXIST),
        Op::AddTable => {
            state.firewall = Some(Firewall::default());
            Ok(())
        }
        Op::DeleteTable => state.firewall.take().map(drop).ok_or(errno::ENOENT),
        op if op.is_nft() => nft(state.firewall.as_mut().ok_or(errno::ENOENT)?, op),
        op => rtnetlink(state, op),
    }
}

fn rtnetlink(state: &mut State, op: &Op) -> Result<(), Errno> {
    let has = |device: &DeviceName| {
        state.link.as_ref().filter(|link| link.name == *device).ok_or(errno::ENODEV)
    };
    match op {
        Op::AddLink(link) => {
            if state.link.is_some() {
                return Err(errno::EEXIST);
            }
            state.link = Some(link.clone());
        }
        Op::SetLink(link) => {
            let old = has(&link.name)?.clone();
            if (old.vni, old.port) != (link.vni, link.port) {
                return Err(errno::EOPNOTSUPP);
            }
            if old.mac != link.mac {
                state.neighbours.clear();
            }
            if old.up && !link.up {
                gone_with_device(state);
            }
            state.link = Some(link.clone());
        }
        Op::DeleteLink(device) => {
            has(device)?;
            state.link = None;
            state.addresses.clear();
            state.fdb.clear();
            gone_with_device(state);
        }
        Op::AddAddress(device, net) => {
            has(device)?;
            if !state.addresses.insert(*net) {
                return Err(errno::EEXIST);
            }
        }
        Op::DeleteAddress(device, net) => {
            has(device)?;
            if !state.addresses.remove(net) {
                return Err(errno::EADDRNOTAVAIL);
            }
        }
        Op::PutFdb(device, mac, node) => {
            has(device)?;
            state.fdb.insert(*mac, *node);
        }
        Op::DeleteFdb(device, mac, node) => {
            has(device)?;
            match state.fdb.entry(*mac) {
                Entry::Occupied(entry) if entry.get() == node => entry.remove(),
                _ => return Err(errno::ENOENT),
            };
        }
        Op::PutNeighbour(device, address, mac) => {
            has(device)?;
            state.neighbours.insert(*address, *mac);
        }
        Op::DeleteNeighbour(device, address) => {
            has(device)?;
            state.neighbours.remove(address).ok_or(errno::ENOENT)?;
        }
        Op::PutRoute(device, key, route) => {
            if matches!(route, Route::Via(_)) && !has(device)?.up {
                return Err(errno::ENETDOWN);
            }
            state.routes.insert(*key, *route);
        }
        Op::DeleteRoute(_, key, route) => match state.routes.entry(*key) {
            Entry::Occupied(entry) if entry.get() == route => drop(entry.remove()),
            _ => return Err(errno::ESRCH),
        },
        Op::AddRule(rule) => {
            if matches!(rule.action, RuleAction::Goto(later) if later <= rule.priority) {
                return Err(errno::EINVAL);
            }
            if !state.rules.insert(*rule) {
                return Err(errno::EEXIST);
            }
        }
        Op::DeleteRule(rule) => {
            if !state.rules.remove(rule) {
                return Err(errno::ENOENT);
            }
        }
        _ => return Err(errno::EINVAL),
    }
    Ok(())
}

/// Routes and neighbours do not outlive the device, nor do they come back when it is up again.
fn gone_with_device(state: &mut State) {
    state.neighbours.clear();
    state.routes.retain(|_, route| !matches!(route, Route::Via(_)));
}

fn nft(firewall: &mut Firewall, op: &Op) -> Result<(), Errno> {
    match op {
        Op::AddSet(set) => firewall.sets.insert(*set).then_some(()).ok_or(errno::EEXIST),
        Op::DeleteSet(set) => {
            if firewall.chains.values().any(|(_, rules)| rules.iter().any(|rule| names(rule, *set)))
            {
                return Err(errno::EBUSY);
            }
            if !firewall.sets.remove(set) {
                return Err(errno::ENOENT);
            }
            firewall.elements.retain(|key, _| key.set() != *set);
            Ok(())
        }
        Op::AddChain(chain, base) => match firewall.chains.entry(*chain) {
            Entry::Occupied(_) => Err(errno::EEXIST),
            Entry::Vacant(entry) => {
                entry.insert((*base, Vec::new()));
                Ok(())
            }
        },
        Op::DeleteChain(chain) => {
            if goes_to(firewall, *chain) {
                return Err(errno::EBUSY);
            }
            firewall.chains.remove(chain).map(drop).ok_or(errno::ENOENT)
        }
        Op::SetRules(chain, rules) => {
            if !rules.iter().all(|rule| refers_well(firewall, rule)) {
                return Err(errno::ENOENT);
            }
            let (_, old) = firewall.chains.get_mut(chain).ok_or(errno::ENOENT)?;
            old.clone_from(rules);
            Ok(())
        }
        Op::AddElement(key, value) => {
            if !firewall.sets.contains(&key.set()) {
                return Err(errno::ENOENT);
            }
            if let Data::Verdict(Verdict::Goto(chain)) = value.data {
                if !firewall.chains.contains_key(&chain) {
                    return Err(errno::ENOENT);
                }
            }
            if firewall.elements.contains_key(key) || firewall.overlapping(key).is_some() {
                return Err(errno::EEXIST);
            }
            firewall.elements.insert(*key, value.clone());
            Ok(())
        }
        Op::DeleteElement(key, _) => firewall.elements.remove(key).map(drop).ok_or(errno::ENOENT),
        Op::DeleteStray(stray) => firewall.strays.remove(stray).then_some(()).ok_or(errno::ENOENT),
        _ => Err(errno::EINVAL),
    }
}

fn goes_to(firewall: &Firewall, chain: ChainId) -> bool {
    let by_rule = firewall.chains.values().any(|(_, rules)| {
        rules.iter().any(|NftRule(rule)| {
            rule.contains(&Stmt::Goto(chain)) || rule.contains(&Stmt::Jump(chain))
        })
    });
    let goto = Data::Verdict(Verdict::Goto(chain));
    by_rule || firewall.elements.values().any(|value| value.data == goto)
}

/// The set that a statement looks into.
fn set_of(statement: &Stmt) -> Option<Set> {
    match statement {
        Stmt::MarkIn { set, .. }
        | Stmt::SourceIn(set)
        | Stmt::SourceNotIn(set)
        | Stmt::DestinationIn(set)
        | Stmt::DestinationNotIn(set)
        | Stmt::TagBySource(set)
        | Stmt::TagByTag(set)
        | Stmt::TagIn(set)
        | Stmt::VerdictByTag(set) => Some(*set),
        Stmt::TagByDestination(family, length) => Some(Set::Destination(*family, *length)),
        Stmt::SnatByTag(family) => Some(Set::Snat(*family)),
        _ => None,
    }
}

fn names(rule: &NftRule, set: Set) -> bool {
    rule.0.iter().any(|statement| set_of(statement) == Some(set))
}

fn refers_well(firewall: &Firewall, rule: &NftRule) -> bool {
    rule.0.iter().all(|statement| match statement {
        Stmt::Goto(chain) | Stmt::Jump(chain) => firewall.chains.contains_key(chain),
        other => set_of(other).is_none_or(|set| firewall.sets.contains(&set)),
    })
}
