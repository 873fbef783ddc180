//! Tests of a simulated kernel that several programs use.

use std::collections::BTreeSet;

use super::*;
use crate::datapath::{Drift, observe};
use crate::error::errno;
use crate::event::{ChangeEvents, Component};
use crate::faults::{Call, Fault, Faults, Subsystem};

const READ: Call = Call { subsystem: Subsystem::Firewall, writes: false };

/// A converged simulated node: its kernel, the calls of its program, and the reconciler.
fn right() -> (SharedSim, Faults, Reconciler<SimDatapath>) {
    let (kernel, faults) = (SharedSim::default(), Faults::new());
    let mut egress = Reconciler::new(kernel.open().with_faults(&faults));
    let _report = egress.reconcile(&cluster("a"), [policy("b")]).unwrap();
    (kernel, faults, egress)
}

fn changed(parts: &[Component]) -> ChangeEvents {
    ChangeEvents { changed: parts.iter().copied().collect(), ..ChangeEvents::default() }
}

#[cfg(unix)]
fn is_readable(watch: &SimWatch) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(watch, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() == 1
}

#[test]
#[cfg(unix)]
fn a_watch_is_readable_when_somebody_else_wrote() {
    let kernel = SharedSim::default();
    let mut egress = Reconciler::new(kernel.open());
    let mut watch = egress.datapath().watch().unwrap();
    let _report = egress.reconcile(&cluster("a"), [policy("b")]).unwrap();
    assert!(!is_readable(&watch), "it wrote that itself");

    kernel.edit(|_| {});
    assert!(!is_readable(&watch), "nothing has changed");
    kernel.edit(|state| state.rules.clear());
    kernel.edit(|state| state.link = None);
    assert!(is_readable(&watch));
    let all = [
        Component::Link,
        Component::Address,
        Component::Fdb,
        Component::Neighbour,
        Component::Route,
        Component::Rule,
    ];
    assert_eq!(watch.drain().unwrap(), changed(&all));
    assert!(!is_readable(&watch));
    let whole = egress.repair().unwrap().changes;
    assert!(!whole.is_empty());
    assert!(!is_readable(&watch) && watch.drain().unwrap().is_empty(), "nor is a repair events");

    let mut other = Reconciler::new(kernel.open());
    let _report = other.reconcile(&cluster("a"), [policy("c")]).unwrap();
    assert!(is_readable(&watch));
    assert!(watch.drain().unwrap().changed.contains(&Component::Firewall));

    kernel.lock().lose_events();
    assert!(is_readable(&watch) && watch.drain().unwrap().lost);
    kernel.lock().state_mut().rules.clear();
    assert!(is_readable(&watch) && watch.drain().unwrap().lost);

    let busy = egress.datapath().watch().unwrap_err();
    assert_eq!(busy.errno(), Some(errno::EBUSY));
    assert!(kernel.open().watch().is_ok(), "it is another datapath's");
    drop(watch);
    assert!(egress.datapath().watch().is_ok());
}

#[test]
fn nothing_is_read_that_nobody_can_have_changed() {
    let (kernel, faults, mut egress) = right();
    let since = |begun: usize| faults.calls().split_off(begun);
    let begun = faults.calls().len();
    assert!(egress.repair().unwrap().changes.is_empty());
    assert_eq!(since(begun), [READ], "the generation");

    kernel.edit(|state| state.rules.clear());
    let begun = faults.calls().len();
    assert!(!egress.repair().unwrap().changes.is_empty());
    let firewall = since(begun).iter().filter(|call| call.subsystem == Subsystem::Firewall).count();
    assert_eq!(firewall, 2, "the generation and the hook; a million elements may be in the table");

    kernel.edit(|state| state.firewall = None);
    assert!(!egress.repair().unwrap().changes.is_empty());
    kernel.lock().lose_events();
    let begun = faults.calls().len();
    assert!(egress.repair().unwrap().changes.is_empty());
    assert!(since(begun).len() > 6, "everything");
    assert!(egress.audit().unwrap().changes.is_empty());
}

#[test]
fn a_write_right_before_the_generation_is_told_is_heard() {
    let (kernel, faults, mut egress) = right();
    let call = faults.calls().len();
    let other = kernel.clone();
    let write = move || other.edit(|state| state.firewall = None);
    let faults = faults.at_call(call, Fault::ForeignWrite(Box::new(write)));
    assert!(!egress.repair().unwrap().changes.is_empty());
    assert_eq!(faults.pending(), 0);
    assert!(kernel.state().firewall.is_some());
}

#[test]
fn a_table_that_changes_while_it_is_read_is_read_again() {
    let (kernel, ..) = right();
    let before = kernel.lock().clone();
    let edits: [fn(&mut State); 3] = [
        |state| state.firewall = None,
        |state| state.firewall.iter_mut().for_each(|table| table.elements.retain(|_, _| false)),
        |state| state.firewall.iter_mut().for_each(|table| table.chains.clear()),
    ];
    let mut again = 0;
    for edit in edits {
        let usual = Faults::new();
        let mut first = SharedSim::new(before.clone()).open().with_faults(&usual);
        let _state = observe(&mut first).unwrap();
        for call in 0..usual.calls().len() {
            let kernel = SharedSim::new(before.clone());
            let other = kernel.clone();
            let write = Fault::ForeignWrite(Box::new(move || other.edit(edit)));
            let faults = Faults::new().at_call(call, write);
            let mut datapath = kernel.open().with_faults(&faults);
            let seen = observe(&mut datapath).unwrap();
            assert_eq!(faults.pending(), 0);
            assert_eq!(seen.firewall, kernel.state().firewall, "call {call}");
            assert_eq!(datapath.drift(), Drift::Unknown, "somebody has written since it began");
            again += usize::from(faults.calls().len() > usual.calls().len() + 1);
        }
    }
    assert!(again >= 9, "{again}");
}

#[test]
fn what_never_stays_as_it_is_is_an_error() {
    let (kernel, ..) = right();
    for first in [0, 6] {
        let torn =
            (first..40).fold(Faults::new(), |faults, read| faults.at_read(read, Fault::TornDump));
        let error = observe(&mut kernel.open().with_faults(&torn)).unwrap_err();
        let calls = torn.calls().len();
        assert!(error.to_string().contains("chang"), "{error}");
        assert!(calls < 40, "{calls}");
    }
}

#[test]
fn the_dead_do_nothing() {
    for fault in [Fault::KillBefore, Fault::KillAfter] {
        let (kernel, ..) = right();
        let faults = Faults::new().at_write(0, fault);
        let mut egress = Reconciler::new(kernel.open().with_faults(&faults));
        let died = egress.reconcile(&cluster("a"), [policy("c")]).unwrap_err();
        assert!(died.to_string().contains("killed"), "{died}");
        let then = kernel.state();
        let still = egress.reconcile(&cluster("a"), [policy("c")]).unwrap_err();
        assert!(matches!(still, crate::Error::Observe(_)), "{still}");
        assert!(egress.settle().is_err() && egress.remove().is_err());
        assert_eq!((kernel.state() == then, faults.pending()), (true, 0));
        let mut next = Reconciler::new(kernel.open());
        assert!(!next.reconcile(&cluster("a"), [policy("c")]).unwrap().changes.is_empty());
    }
}

#[test]
fn an_answer_that_was_lost_belongs_to_what_was_done() {
    for (fault, done) in [
        (Fault::LoseReply, true),
        (Fault::CutReply, true),
        (Fault::AckWithoutCommit, false),
        (Fault::Refuse(12), false),
        (Fault::Errno(12), false),
    ] {
        let faults = Faults::new().at_write(0, fault);
        let kernel = SharedSim::default();
        let wanted = State { firewall: Some(Firewall::default()), ..State::default() };
        let changes = Changes::between(&State::default(), &wanted);
        let mut datapath = kernel.open().with_faults(&faults);
        assert!(datapath.apply(&changes).is_err());
        assert_eq!((kernel.state() == wanted, faults.pending()), (done, 0));
        assert_eq!(datapath.drift(), Drift::Unknown);
    }
}

#[test]
fn a_copy_is_another_kernel() {
    let (kernel, _, mut egress) = right();
    let mut watch = egress.datapath().watch().unwrap();
    let copy = SharedSim::new(kernel.lock().clone());
    copy.edit(|state| *state = State::default());
    let _report = egress.repair().unwrap();
    assert_eq!(watch.drain().unwrap().changed, BTreeSet::new());
    assert!(!kernel.state().is_empty());
}
