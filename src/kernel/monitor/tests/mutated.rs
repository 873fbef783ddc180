//! Mutated notifications.

use crate::event::{ChangeEvents, Process};
use crate::kernel::monitor::classify;
use crate::kernel::mutate;
use crate::kernel::mutated::notifications;
use crate::kernel::netlink::message::Messages;
use crate::kernel::rtnetlink::ahead::OurRules;
use crate::kernel::rtnetlink::wire_tests::golden;
use crate::state::{Rule, RuleAction};
use crate::types::{Family, Mark};

/// Interface indices that the VXLAN device may have.
const INDICES: [u32; 3] = [2, 3, 4];

fn events(what: &str, corpus: &[Vec<u8>]) {
    let rules = [Rule {
        family: Family::V4,
        priority: 32_767,
        mark: Mark::new(0x2600_0000),
        mask: 0xff00_0000,
        inverted: true,
        input: None,
        action: RuleAction::Goto(32_767),
    }];
    mutate::messages(what, 8, corpus, |input| {
        let (mut events, mut unsigned) = (ChangeEvents::default(), false);
        let first = OurRules::default();
        first.set(&rules);
        for index in INDICES {
            for message in Messages::new(input).flatten() {
                classify::read(&message, (index, &first), &mut unsigned, &mut events);
            }
        }
        let _sentence = events.to_string();
        let writers = events.writers.iter();
        let held = writers.map(|writer| size_of::<Process>() + writer.name.len()).sum();
        (!events.is_empty() || unsigned).then_some(held)
    });
}

#[test]
fn mutated_routing_events() {
    let mut corpus = notifications(0, 1..12);
    corpus.extend(notifications(0, 24..25));
    corpus.extend(golden());
    events("routing notifications", &corpus);
}

#[test]
fn mutated_firewall_events() {
    let mut corpus = notifications(12, 7..8);
    corpus.extend(crate::kernel::mutated::golden_table());
    events("nf_tables notifications", &corpus);
}
