//! Probes, and the source addresses with which they must arrive.

use std::net::IpAddr;
use std::panic::resume_unwind;
use std::thread::{self, ScopedJoinHandle};

use super::super::lab::{Netns, Pair, Proto, probe, probe_patiently};
use super::{Astray, Failure};

/// A probe: its sender, its destination, and the source with which it must arrive, if at all.
#[derive(Clone, Copy)]
pub(super) struct Expect<'a> {
    pub(super) who: &'static str,
    pub(super) from: &'a Netns,
    pub(super) to: Pair,
    pub(super) source: [Option<IpAddr>; 2],
}

impl<'a> Expect<'a> {
    pub(super) const fn source(
        (who, from): (&'static str, &'a Netns),
        to: Pair,
        source: Pair,
    ) -> Self {
        let [v4, v6] = source;
        Self { who, from, to, source: [Some(v4), Some(v6)] }
    }

    pub(super) const fn nothing((who, from): (&'static str, &'a Netns), to: Pair) -> Self {
        Self { who, from, to, source: [None; 2] }
    }

    fn questions(self) -> impl Iterator<Item = (Proto, IpAddr, Option<IpAddr>)> {
        let of = |(to, source)| Proto::BOTH.map(|proto| (proto, to, source));
        self.to.into_iter().zip(self.source).flat_map(of)
    }
}

/// Sends all probes at once, by TCP and UDP over IPv4 and IPv6, and compares the sources.
pub(super) fn check(expectations: &[Expect<'_>]) -> Result<(), Failure> {
    let astray: Vec<Astray> = thread::scope(|scope| {
        let mut asked = Vec::new();
        for &expected in expectations {
            for (proto, to, source) in expected.questions() {
                let ask = move || {
                    let asked = if source.is_some() { probe_patiently } else { probe };
                    let seen = asked(expected.from, proto, to).ok();
                    let from = expected.who;
                    (seen != source).then_some(Astray { from, proto, to, expected: source, seen })
                };
                asked.push(scope.spawn(ask));
            }
        }
        let answers = asked.into_iter().map(ScopedJoinHandle::join);
        answers.filter_map(|answer| answer.unwrap_or_else(|error| resume_unwind(error))).collect()
    });
    if astray.is_empty() { Ok(()) } else { Err(Failure::Astray(astray)) }
}
