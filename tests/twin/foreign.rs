//! Others write: what goes along with that, and what is told of it, is the same of both.

use std::collections::BTreeSet;
use std::io;

use egress_datapath::datapath::{Known, Observed, observe};
use egress_datapath::event::Component;
use egress_datapath::sim::{SharedSim, SimDatapath, SimWatch};
use egress_datapath::state::{Key, NftRule, Rule, State, Stmt};
use egress_datapath::testing::lab::Netns;
use egress_datapath::{Changes, Datapath, KernelDatapath, Watch};

use crate::checks::policies;
use crate::{Result, Twins, difference, lab, say, world};

/// What others type, and what that changes in a state; what goes along with it is the kernel's and
/// the simulator's own affair.
type Edit = (&'static str, fn(&mut State));

const EDITS: [Edit; 25] = [
    ("ip link set egress.vxlan down", |state| link(state).up = false),
    ("ip link set egress.vxlan mtu 1300", |state| link(state).mtu = 1300),
    ("ip link set egress.vxlan mtu 1200", |state| link(state).mtu = 1200),
    ("ip link set egress.vxlan address 66:00:00:00:00:99", |state| {
        link(state).mac = "66:00:00:00:00:99".parse().unwrap();
    }),
    ("ip link set egress.vxlan alias mine", |state| link(state).intact = false),
    ("sysctl -qw net/ipv4/conf/egress.vxlan/rp_filter=1", |state| link(state).rp_filter = 1),
    ("ip link del egress.vxlan", |state| state.link = None),
    ("ip addr flush dev egress.vxlan", |state| state.addresses.clear()),
    ("ip -4 addr flush dev egress.vxlan", |state| {
        state.addresses.retain(|net| net.addr().is_ipv6());
    }),
    ("ip -6 addr flush dev egress.vxlan", |state| {
        state.addresses.retain(|net| net.addr().is_ipv4());
    }),
    ("ip addr add 9.9.9.9/32 dev egress.vxlan", |state| {
        state.addresses.insert("9.9.9.9/32".parse().unwrap());
    }),
    ("bridge fdb flush dev egress.vxlan", |state| state.fdb.clear()),
    ("ip neigh flush dev egress.vxlan nud permanent", |state| state.neighbours.clear()),
    ("ip -4 route flush table all proto 69", |state| {
        state.routes.retain(|key, _| key.dst.addr().is_ipv6());
    }),
    ("ip -6 route flush table all proto 69", |state| {
        state.routes.retain(|key, _| key.dst.addr().is_ipv4());
    }),
    ("ip rule flush protocol 69; ip -6 rule flush protocol 69", |state| state.rules.clear()),
    // Of the three at that priority the one that was made first.
    ("ip rule del pref 101; ip -6 rule del pref 101", |state| {
        state.rules.retain(|rule| !rule.inverted);
    }),
    ("ip rule del pref 101 iif lo; ip -6 rule del pref 101 iif lo", |state| {
        let lo = |rule: &Rule| rule.input.as_ref().is_some_and(|it| it.as_str() == Rule::LOOPBACK);
        state.rules.retain(|rule| !lo(rule));
    }),
    ("nft delete table inet egress_datapath", |state| state.firewall = None),
    ("nft flush ruleset", |state| state.firewall = None),
    ("nft 'add table inet egress_datapath { flags dormant; }'", |state| {
        table(state).dormant = true;
    }),
    ("nft delete element inet egress_datapath source4 '{ 10.244.1.10 }'", |state| {
        table(state).elements.remove(&Key::source(lab::POD_A[0]));
    }),
    ("nft flush table inet egress_datapath", |state| {
        table(state).chains.values_mut().for_each(|(_, rules)| rules.clear());
    }),
    ("nft add rule inet egress_datapath prerouting counter", |state| {
        let (_, rules) =
            table(state).chains.get_mut(&egress_datapath::state::ChainId::Prerouting).unwrap();
        rules.push(NftRule(vec![Stmt::Counter]));
    }),
    ("nft add table inet other; nft delete table inet other", |_| {}),
];

fn link(state: &mut State) -> &mut egress_datapath::state::Vxlan {
    state.link.as_mut().unwrap()
}

fn table(state: &mut State) -> &mut egress_datapath::state::Firewall {
    state.firewall.as_mut().unwrap()
}

/// What one datapath hears and knows.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    changed: BTreeSet<Component>,
    lost: bool,
    read: Read,
}

const NOTHING: Told = Told { changed: BTreeSet::new(), lost: false, read: Read::Nothing };

/// The parts that a datapath reads again where a state is known.
#[derive(Debug, PartialEq, Eq)]
enum Read {
    Nothing,
    /// Everything except the nf_tables table of family `inet`.
    Rest,
    Everything,
}

fn read(datapath: &mut dyn Datapath, held: &State) -> Result<Read> {
    // Something that is not so: a table that is not read again still has it.
    let mut known = held.clone();
    known.firewall.iter_mut().for_each(|table| table.dormant = !table.dormant);
    Ok(match datapath.observe(Known::Installed(&known))? {
        Observed::Unchanged => Read::Nothing,
        Observed::Installed(state) if state.firewall == known.firewall => Read::Rest,
        Observed::Installed(_) => Read::Everything,
    })
}

/// One datapath to each, with its watch.
struct Both {
    sim: SharedSim,
    datapath: SimDatapath,
    sim_watch: SimWatch,
    kernel: KernelDatapath,
    watch: Watch,
    netns: [Netns; 2],
}

impl Both {
    fn new() -> io::Result<Self> {
        let Twins { sim, kernel, _netns: netns, .. } = Twins::new()?;
        let sim = SharedSim::new(sim);
        let datapath = sim.open();
        let sim_watch = datapath.watch().map_err(io::Error::other)?;
        let watch = kernel.watch().map_err(io::Error::other)?;
        Ok(Self { sim, datapath, sim_watch, kernel, watch, netns })
    }

    /// Makes both hold a state; what they write themselves is not told.
    fn hold(&mut self, wanted: &State) -> Result {
        for _ in 0..2 {
            let twins: [&mut dyn Datapath; 2] = [&mut self.datapath, &mut self.kernel];
            for twin in twins {
                let now = observe(twin)?;
                twin.apply(&Changes::between(&now, wanted))?;
            }
        }
        self.observe()
    }

    fn observe(&mut self) -> Result {
        difference(&observe(&mut self.datapath)?, &observe(&mut self.kernel)?)
    }

    fn told(&mut self, held: &State) -> Result<[Told; 2]> {
        let [in_sim, in_kernel] = [read(&mut self.datapath, held)?, read(&mut self.kernel, held)?];
        let events = [self.sim_watch.drain()?, self.watch.drain()?];
        let [sim, kernel] = events.map(|events| (events.changed, events.lost));
        Ok([
            Told { changed: sim.0, lost: sim.1, read: in_sim },
            Told { changed: kernel.0, lost: kernel.1, read: in_kernel },
        ])
    }
}

#[test]
fn what_others_write_has_the_same_effects_and_is_told() -> Result {
    let mut both = harness::given("network namespaces", Both::new());
    let usual = world::planned(&lab::cluster("node-a")?, &policies());
    for (script, edit) in EDITS {
        both.hold(&usual).map_err(|error| format!("{script}: {error}"))?;
        let [sim, _] = both.told(&usual)?;
        assert_eq!(sim, NOTHING, "what it wrote itself is no events");
        let done = both.netns[0].run(|| harness::shell(script).output())??;
        assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
        both.sim.edit(edit);
        let [sim, kernel] = both.told(&usual)?;
        assert_eq!(sim, kernel, "{script}");
        both.observe().map_err(|error| format!("{script}: {error}"))?;
    }
    say(&format!("{} edits by others on the simulator and the kernel, told the same", EDITS.len()));
    Ok(())
}
