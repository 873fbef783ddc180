//! What every test here does: a lab, a reconciler on each node, probes.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt::Debug;
use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use egress_datapath::KernelTables;
use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::testing::lab::{
    EIP_B, Host, Lab, Netns, Pair, Proto, SERVER, probe, probe_patiently,
};
pub use egress_datapath::testing::lab::{dual, policy};
use egress_datapath::{
    Backend, Cluster, Count, Datapath, EgressPolicy, Family, KernelDatapath, MarkLayout, Ownership,
    Protection, Reconciler, Replies, Report, Steering,
};

use crate::backend::{backend, datapath, replies, steering, underlay};

pub type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// Declares that the test needs the programs of the backend that this run is about.
pub fn needs_backend() {
    if let Backend::Iptables(iptables) = backend() {
        harness::needs(&[iptables.variant.command(Family::V4), "ipset"]);
    }
}

/// A lab, which the test cannot do without.
pub fn lab() -> Lab {
    needs_backend();
    harness::given("network namespaces", Lab::new())
}

/// Whether the backend that this run is about cannot do what a test asks for.
pub fn is_beyond(limit: &str) -> bool {
    let is_iptables = backend() != Backend::Nftables;
    if is_iptables {
        harness::note!("limit of iptables: {limit}");
    }
    is_iptables
}

/// Ends a test that has nothing to ask of a backend which cannot do that.
pub fn unless_beyond(limit: &str) {
    if is_beyond(limit) {
        harness::limit(format_args!("with iptables {limit}"));
    }
}

/// Ends a test about what only the kernel keeps other programs away from.
pub fn needs_owners(lab: &Lab) -> Result {
    let open = || KernelDatapath::open_as(Ownership::Exclusive);
    let protection = lab.node_c.netns.run(open)??.protection();
    harness::needs_kernel(
        "owners of tables that stay (Linux 6.9)",
        protection == Protection::Kernel,
    );
    Ok(())
}

/// Ends a test about flowtables of another program where the kernel has none.
pub fn needs_flowtables(lab: &Lab) {
    unless_beyond("a flowtable of another program offloads the connections of pods");
    let table = "table inet probe { flowtable probe { hook ingress priority 0; }; }";
    harness::needs_other_kernel("flowtables", nft(&lab.node_a.netns, &["-c"], table).is_ok());
}

/// Runs a command line in a namespace and returns what it printed; words are split at blanks.
///
/// A test that reads what a program prints needs the program: its stand-in only changes things.
pub fn tool(netns: &Netns, line: &str) -> Result<String> {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap_or_default();
    let output = netns.run(|| Command::new(program).args(words).output())??;
    if output.status.success() {
        Ok(String::from_utf8(output.stdout)?)
    } else {
        let said = String::from_utf8_lossy(&output.stderr);
        Err(format!("{line}: {said}").into())
    }
}

/// Feeds rules to `nft` in a namespace; with `--check` they are only read.
pub fn nft(netns: &Netns, options: &[&str], rules: &str) -> Result {
    feed(netns, "nft", &[options, &["-f", "-"]].concat(), rules)
}

/// Runs a program in a namespace with this text as its standard input.
pub fn feed(netns: &Netns, program: &str, arguments: &[&str], input: &str) -> Result {
    let output = netns.run(|| {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        child.wait_with_output()
    })??;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr)).into())
}

/// A reconciler on each node.
pub struct Fleet {
    nodes: Vec<(Cluster, Reconciler<Box<dyn Datapath>>)>,
}

impl Fleet {
    pub fn open(lab: &Lab) -> Result<Self> {
        Self::with(lab, |_| {})
    }

    /// With clusters that are not quite the usual ones.
    pub fn with(lab: &Lab, change: impl Fn(&mut Cluster)) -> Result<Self> {
        let open = |host: &&Host| -> Result<_> {
            let mut cluster = underlay(lab.cluster(host)?);
            cluster.backend = backend();
            change(&mut cluster);
            if cluster.steering == Steering::Tables {
                cluster.steering = steering(&cluster.marks);
            }
            if cluster.replies == Replies::Direct {
                cluster.replies = replies(&cluster.marks, cluster.backend);
            }
            let datapath = datapath(&host.netns, cluster.backend)?;
            let tables = host.netns.run(KernelTables::open)??;
            let tables = TablePool::with_probe(TableRange::default(), tables);
            let marks = MarkPool::new(cluster.marks);
            Ok((cluster, Reconciler::with_allocators(datapath, marks, tables)))
        };
        let nodes = lab.nodes().iter().map(open).collect::<Result<_>>()?;
        Ok(Self { nodes })
    }

    /// Makes every node right, from the last to the first: gateways before their clients.
    pub fn apply(&mut self, policies: &[EgressPolicy]) -> Result<Vec<Report>> {
        let mut reports = Vec::new();
        for (cluster, reconciler) in self.nodes.iter_mut().rev() {
            let report = reconciler.reconcile(cluster, policies);
            reports.push(report.map_err(|error| format!("{}: {error}", cluster.node))?);
        }
        Ok(reports)
    }

    /// Has every node read everything and put right what differs.
    pub fn audit(&mut self) -> Result {
        for (cluster, reconciler) in &mut self.nodes {
            reconciler.audit().map_err(|error| format!("{}: {error}", cluster.node))?;
        }
        Ok(())
    }

    /// Makes one node right.
    pub fn apply_to(&mut self, name: &str, policies: &[EgressPolicy]) -> Result {
        for (cluster, reconciler) in &mut self.nodes {
            if cluster.node.as_str() == name {
                reconciler.reconcile(cluster, policies)?;
            }
        }
        Ok(())
    }

    /// Leaves only rules on every node, with nothing in their maps.
    pub fn drain(&mut self) -> Result {
        for (cluster, reconciler) in &mut self.nodes {
            reconciler.drain().map_err(|error| format!("{}: {error}", cluster.node))?;
        }
        Ok(())
    }

    /// Has every node put right what was done to it, after which nothing is left to do.
    pub fn mend(&mut self, policies: &[EgressPolicy], damage: &impl Debug) -> Result {
        self.apply(policies).map_err(|error| format!("after {damage:?}: {error}"))?;
        let again = self.apply(policies)?;
        let changes = again.iter().map(|report| report.changes.to_string()).collect::<String>();
        assert_eq!(changes, "", "after {damage:?}");
        Ok(())
    }

    /// The same, of damage through which pod A has got out with its egress IP or not at all.
    pub fn mend_unleaked(
        &mut self,
        lab: &Lab,
        policies: &[EgressPolicy],
        damage: &impl Debug,
    ) -> Result {
        let (seen, wearing) = (sources(lab), EIP_B.into_iter().collect());
        assert!(seen.is_subset(&wearing), "after {damage:?}: {seen:?}");
        self.mend(policies, damage)?;
        check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
        sources(lab);
        Ok(())
    }

    /// What a node has counted, by policy and family.
    pub fn counts(&mut self, name: &str) -> Result<BTreeMap<(String, Family), Count>> {
        let node = self.nodes.iter_mut().find(|(cluster, _)| cluster.node.as_str() == name);
        let (_, reconciler) = node.ok_or("no such node")?;
        let counts = reconciler.counters()?.into_iter();
        Ok(counts.map(|one| ((one.policy.to_string(), one.family), one.count)).collect())
    }

    /// What the rules of a node have dropped, by chain.
    pub fn drops(&mut self, name: &str) -> Result<BTreeMap<String, Count>> {
        let node = self.nodes.iter_mut().find(|(cluster, _)| cluster.node.as_str() == name);
        let (_, reconciler) = node.ok_or("no such node")?;
        Ok(reconciler.drops()?)
    }

    /// Configures every node otherwise, from its next reconciliation on.
    pub fn change(&mut self, change: impl Fn(&mut Cluster)) {
        self.nodes.iter_mut().for_each(|(cluster, _)| change(cluster));
    }

    /// Removes everything of ours from every node, the rules when no node needs them any more.
    pub fn remove(&mut self) -> Result {
        self.drain()?;
        for (cluster, reconciler) in &mut self.nodes {
            reconciler.remove().map_err(|error| format!("{}: {error}", cluster.node))?;
        }
        Ok(())
    }
}

/// A reconciler of a node's namespace.
pub fn open(host: &Host, marks: MarkLayout) -> Result<Reconciler<KernelDatapath>> {
    Ok(host.netns.run(|| Reconciler::open(marks, TableRange::default()))??)
}

/// Who asks, whom, and with which source the question must arrive, if at all.
pub struct Expect<'a> {
    pub from: &'a Netns,
    pub to: Pair,
    pub source: [Option<IpAddr>; 2],
}

pub fn expect(from: &Netns, to: Pair, source: Pair) -> Expect<'_> {
    let source = source.map(Some);
    Expect { from, to, source }
}

pub fn expect_nothing(from: &Netns, to: Pair) -> Expect<'_> {
    let source = [None; 2];
    Expect { from, to, source }
}

/// Asks by TCP and UDP over IPv4 and IPv6, all at once, and compares.
pub fn check(expectations: &[Expect<'_>]) {
    let wrong: Vec<String> = thread::scope(|scope| {
        let mut probes = Vec::new();
        for (number, expected) in expectations.iter().enumerate() {
            for (to, source) in expected.to.into_iter().zip(expected.source) {
                for proto in Proto::BOTH {
                    let asked = if source.is_some() { probe_patiently } else { probe };
                    let ask = move || match (asked(expected.from, proto, to), source) {
                        (Ok(seen), Some(wanted)) if seen == wanted => None,
                        (Err(_), None) => None,
                        (seen, wanted) => Some(format!(
                            "probe {number}, {proto} to {to}: wanted {wanted:?}, got {seen:?}"
                        )),
                    };
                    probes.push(scope.spawn(ask));
                }
            }
        }
        let ended = probes.into_iter().map(thread::ScopedJoinHandle::join);
        ended
            .filter_map(|probe| probe.unwrap_or_else(|_| Some("a probe panicked".to_owned())))
            .collect()
    });
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// All sources that have come to the server since the last call, of one address or another.
pub fn sources(lab: &Lab) -> BTreeSet<IpAddr> {
    lab.outside.take_seen().into_iter().map(|(source, _)| source).collect()
}

/// All that `nft`, `ip` and `bridge` can tell of a namespace, but for counters.
pub fn snapshot(netns: &Netns) -> Result<String> {
    [
        "nft -s list ruleset",
        "ip -4 rule",
        "ip -6 rule",
        "ip -4 -d route show table all",
        "ip -6 -d route show table all",
        "ip -d link",
        "ip -d addr",
        "ip -4 neigh",
        "ip -6 neigh",
        "bridge -d fdb",
    ]
    .into_iter()
    .map(|line| Ok(format!("# {line}\n{}", tool(netns, line)?)))
    .collect()
}

/// The same of a namespace whose devices have finished coming up, which nobody announces.
pub fn settled(netns: &Netns) -> Result<String> {
    let mut last = snapshot(netns)?;
    for _ in 0..50 {
        thread::sleep(Duration::from_millis(20));
        let now = snapshot(netns)?;
        if now == last {
            break;
        }
        last = now;
    }
    Ok(last)
}

/// The lines of a text that another one does not have, or not as often.
pub fn lost(before: &str, now: &str) -> String {
    let mut left: Vec<&str> = now.lines().collect();
    let mut lost = String::new();
    for line in before.lines() {
        match left.iter().position(|known| *known == line) {
            Some(index) => drop(left.remove(index)),
            None => lost.extend([line, "\n"]),
        }
    }
    lost
}

/// Panics with what is gone and what is new unless two texts are equal.
pub fn assert_same(before: &str, now: &str) {
    assert!(before == now, "gone:\n{}\nnew:\n{}", lost(before, now), lost(now, before));
}
