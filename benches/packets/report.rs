//! The figures of a run, and what they are to each other.

use std::fmt;

use egress_datapath::Replies;
use egress_datapath::state::Variant as Tables;

use crate::variant::{Cost, Kind, Variant};

/// Nanoseconds of a packet of everything that was measured.
pub(crate) struct Report(Vec<(Kind, Cost)>);

/// A ratio of two variants and what it should be at most: infinite where none of them is ours.
struct Target {
    what: &'static str,
    of: Kind,
    to: Kind,
    most: f64,
}

const fn ours(policies: u32, selected: bool) -> Kind {
    Kind::Ours { policies, gateways: 1, selected, caching: false }
}

const fn cached(policies: u32, selected: bool) -> Kind {
    Kind::Ours { policies, gateways: 1, selected, caching: true }
}

const fn among(gateways: u32, selected: bool) -> Kind {
    Kind::Ours { policies: 100, gateways, selected, caching: false }
}

const fn hook(gateways: u32, selected: bool) -> Kind {
    Kind::Hook { gateways, selected }
}

const fn seed(policies: u32, selected: bool) -> Kind {
    Kind::Seed { policies, selected }
}

const fn flat(variant: Tables, selected: bool) -> Kind {
    Kind::Iptables { policies: 1_000, variant, selected }
}

const fn gateway(policies: u32) -> Kind {
    Kind::Gateway { policies }
}

const fn established(replies: Replies, back: bool) -> Kind {
    Kind::Established { replies, back }
}

const fn ratio(what: &'static str, of: Kind, to: Kind) -> Target {
    Target { what, of, to, most: f64::INFINITY }
}

const TARGETS: [Target; 29] = [
    Target {
        what: "10 000 policies to 1, steered",
        of: ours(10_000, true),
        to: ours(1, true),
        most: 1.1,
    },
    Target {
        what: "10 000 policies to 1, unselected",
        of: ours(10_000, false),
        to: ours(1, false),
        most: 1.1,
    },
    Target { what: "steered to the static route", of: ours(1, true), to: Kind::Bound, most: 1.3 },
    Target {
        what: "the least that steers by a mark to the static route",
        of: Kind::Least,
        to: Kind::Bound,
        most: f64::INFINITY,
    },
    Target {
        what: "10 000 policies steered to the static route",
        of: ours(10_000, true),
        to: Kind::Bound,
        most: 1.3,
    },
    Target {
        what: "unselected to conntrack alone",
        of: ours(1, false),
        to: Kind::Conntrack,
        most: 1.35,
    },
    Target {
        what: "10 000 policies unselected to conntrack alone",
        of: ours(10_000, false),
        to: Kind::Conntrack,
        most: 1.35,
    },
    Target {
        what: "10 000 policies to 1, steered, cached",
        of: cached(10_000, true),
        to: cached(1, true),
        most: 1.05,
    },
    Target {
        what: "steered, cached, to the static route",
        of: cached(1, true),
        to: Kind::Bound,
        most: 1.3,
    },
    Target {
        what: "10 000 policies steered, cached, to the static route",
        of: cached(10_000, true),
        to: Kind::Bound,
        most: 1.3,
    },
    Target {
        what: "unselected, cached, to conntrack alone",
        of: cached(1, false),
        to: Kind::Conntrack,
        most: 1.35,
    },
    Target {
        what: "10 000 policies cached to the origin's 1",
        of: cached(10_000, true),
        to: seed(1, true),
        most: 1.0,
    },
    Target {
        what: "10 000 policies cached to the origin's 1 000",
        of: cached(10_000, true),
        to: seed(1_000, true),
        most: 1.0 / 45.0,
    },
    Target {
        what: "10 000 policies to the origin's 1",
        of: ours(10_000, true),
        to: seed(1, true),
        most: 1.0,
    },
    Target {
        what: "10 000 policies to the origin's 1 000",
        of: ours(10_000, true),
        to: seed(1_000, true),
        most: 1.0 / 45.0,
    },
    Target {
        what: "100 gateways to 1, steered",
        of: among(100, true),
        to: among(1, true),
        most: 1.1,
    },
    Target {
        what: "100 gateways to 1, unselected",
        of: among(100, false),
        to: among(1, false),
        most: 1.1,
    },
    Target {
        what: "1 000 gateways to 1, egress hook, steered",
        of: hook(1_000, true),
        to: hook(1, true),
        most: 1.1,
    },
    Target {
        what: "1 000 gateways to 1, static routes",
        of: Kind::Spread { gateways: 1_000 },
        to: Kind::Spread { gateways: 1 },
        most: f64::INFINITY,
    },
    Target {
        what: "1 000 gateways to 1, egress hook, unselected",
        of: hook(1_000, false),
        to: hook(1, false),
        most: 1.1,
    },
    Target {
        what: "iptables-legacy, 1 000 policies, steered to the static route",
        of: flat(Tables::Legacy, true),
        to: Kind::Bound,
        most: 2.0,
    },
    Target {
        what: "iptables-legacy, 1 000 policies, unselected to no rules",
        of: flat(Tables::Legacy, false),
        to: Kind::Plain,
        most: 2.0,
    },
    Target {
        what: "iptables-nft, 1 000 policies, steered to the static route",
        of: flat(Tables::Nft, true),
        to: Kind::Bound,
        most: 2.0,
    },
    Target {
        what: "iptables-nft, 1 000 policies, unselected to no rules",
        of: flat(Tables::Nft, false),
        to: Kind::Plain,
        most: 2.0,
    },
    Target {
        what: "gateway, 10 000 policies to 10",
        of: gateway(10_000),
        to: gateway(10),
        most: 1.1,
    },
    Target {
        what: "gateway, packets, replies by the tunnel to direct",
        of: established(Replies::Tunnel, false),
        to: established(Replies::Direct, false),
        most: 1.35,
    },
    Target {
        what: "gateway, replies by the tunnel to direct",
        of: established(Replies::Tunnel, true),
        to: established(Replies::Direct, true),
        most: f64::INFINITY,
    },
    Target {
        what: "steered, replies by the tunnel to direct",
        of: Kind::Replies { selected: true },
        to: ours(1, true),
        most: f64::INFINITY,
    },
    Target {
        what: "unselected, replies by the tunnel to direct",
        of: Kind::Replies { selected: false },
        to: ours(1, false),
        most: 1.02,
    },
];

/// What a run in instructions is compared by with another one: the kernel's own parts first, so
/// that it is seen whether they or ours have moved.
const CHIEF: [Target; 19] = [
    ratio("conntrack alone to no rules", Kind::Conntrack, Kind::Plain),
    ratio("static route to conntrack alone", Kind::Bound, Kind::Conntrack),
    ratio("the least that steers by a mark to the static route", Kind::Least, Kind::Bound),
    ratio("steered, 1 policy, to the static route", ours(1, true), Kind::Bound),
    ratio("steered, 1 000 policies, to the static route", ours(1_000, true), Kind::Bound),
    ratio("steered, 1 policy, cached, to the static route", cached(1, true), Kind::Bound),
    ratio("steered, 1 000 policies, cached, to the static route", cached(1_000, true), Kind::Bound),
    ratio("unselected, 1 policy, to conntrack alone", ours(1, false), Kind::Conntrack),
    ratio("unselected, 1 000 policies, to conntrack alone", ours(1_000, false), Kind::Conntrack),
    ratio("unselected, 1 policy, cached, to conntrack alone", cached(1, false), Kind::Conntrack),
    ratio(
        "unselected, 1 000 policies, cached, to conntrack alone",
        cached(1_000, false),
        Kind::Conntrack,
    ),
    ratio("1 000 policies to 1, steered", ours(1_000, true), ours(1, true)),
    ratio("1 000 policies to 1, steered, cached", cached(1_000, true), cached(1, true)),
    ratio("gateway, 10 policies, to conntrack alone", gateway(10), Kind::Conntrack),
    ratio("gateway, 1 000 policies to 10", gateway(1_000), gateway(10)),
    ratio(
        "gateway, packets, replies by the tunnel to direct",
        established(Replies::Tunnel, false),
        established(Replies::Direct, false),
    ),
    ratio(
        "gateway, replies by the tunnel to direct",
        established(Replies::Tunnel, true),
        established(Replies::Direct, true),
    ),
    ratio(
        "steered, replies by the tunnel to direct",
        Kind::Replies { selected: true },
        ours(1, true),
    ),
    ratio(
        "unselected, replies by the tunnel to direct",
        Kind::Replies { selected: false },
        ours(1, false),
    ),
];

impl Report {
    /// The middle one of the routers of each kind.
    pub(crate) fn new(variants: &[Variant]) -> Self {
        let mut kinds: Vec<Kind> = Vec::new();
        for variant in variants {
            if !kinds.contains(&variant.kind) {
                kinds.push(variant.kind);
            }
        }
        let middle = |kind: Kind, of: fn(&Cost) -> f64| {
            let alike = variants.iter().filter(|variant| variant.kind == kind);
            let mut all: Vec<_> = alike.map(|variant| of(&variant.best)).collect();
            all.sort_unstable_by(f64::total_cmp);
            all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
        };
        let cost =
            |kind| Cost { warm: middle(kind, |cost| cost.warm), cold: middle(kind, |c| c.cold) };
        Self(kinds.into_iter().map(|kind| (kind, cost(kind))).collect())
    }

    /// Nanoseconds of a packet of a variant, if it was measured.
    pub(crate) fn of(&self, kind: Kind) -> Option<Cost> {
        self.0.iter().find(|(other, _)| *other == kind).map(|(_, cost)| *cost)
    }

    /// The same where the clock counts instructions: no caches there, and so no cold figure.
    pub(crate) fn instructions(&self) -> impl fmt::Display + '_ {
        Instructions(self)
    }

    /// All that was measured.
    pub(crate) fn all(&self) -> &[(Kind, Cost)] {
        &self.0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = self.of(Kind::Plain).map_or(f64::NAN, |cost| cost.warm);
        writeln!(f, "| what | ns/packet | × no rules | cold |\n|---|---:|---:|---:|")?;
        for (kind, Cost { warm, cold }) in &self.0 {
            writeln!(f, "| {kind} | {warm:.0} | {:.2} | {cold:.0} |", warm / plain)?;
        }
        writeln!(f, "\n| ratio | found | at most | cold |\n|---|---:|---:|---:|")?;
        for Target { what, of, to, most } in TARGETS {
            if let (Some(of), Some(to)) = (self.of(of), self.of(to)) {
                let (warm, cold) = (of.warm / to.warm, of.cold / to.cold);
                let missed = if warm > most { " missed" } else { "" };
                let most = if most.is_finite() { format!("{most:.3}") } else { "-".to_owned() };
                writeln!(f, "| {what} | {warm:.3}{missed} | {most} | {cold:.3} |")?;
            }
        }
        Ok(())
    }
}

/// What was measured as instructions, with the chief ratios before the others.
struct Instructions<'a>(&'a Report);

impl fmt::Display for Instructions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(report) = self;
        writeln!(f, "| what | instructions/packet |\n|---|---:|")?;
        for (kind, cost) in &report.0 {
            writeln!(f, "| {kind} | {:.0} |", cost.warm)?;
        }
        writeln!(f, "\n| ratio | found |\n|---|---:|")?;
        let again = |target: &&Target| {
            CHIEF.iter().any(|chief| (chief.of, chief.to) == (target.of, target.to))
        };
        let others = TARGETS.iter().filter(|target| !again(target));
        for Target { what, of, to, .. } in CHIEF.iter().chain(others) {
            if let (Some(of), Some(to)) = (report.of(*of), report.of(*to)) {
                writeln!(f, "| {what} | {:.3} |", of.warm / to.warm)?;
            }
        }
        Ok(())
    }
}
