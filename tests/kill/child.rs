//! A process in a node's network that makes a change, and may die of it.

use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use egress_datapath::KernelTables;
use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::iptables::IptablesDatapath;
use egress_datapath::testing::lab::{Host, cluster};
use egress_datapath::testing::{Fault, Faults, Subsystem};
use egress_datapath::{
    Backend, Cluster, Datapath, Error, KernelDatapath, KernelError, Ownership, Reconciler, Report,
    Steering,
};

use crate::scenarios::{Wanted, scenarios};
use crate::{NODES, Result};

/// The signal that a process is killed with.
const KILL: i32 = 9;

/// How long somebody else may have the lock.
const PATIENCE: Duration = Duration::from_secs(60);

/// A moment at which a process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    Before(usize),
    After(usize),
}

/// What a process did that was not killed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    pub(crate) writes: usize,
    /// The first write that ended connections.
    pub(crate) end: Option<usize>,
    /// The changes of the first call and of the one after it.
    pub(crate) changes: [usize; 2],
}

type Node = Reconciler<Box<dyn Datapath>, MarkPool, TablePool>;

/// Opens a reconciler in the calling thread's network.
pub(crate) fn open(cluster: &Cluster, ownership: Ownership, faults: &Faults) -> Result<Node> {
    let datapath: Box<dyn Datapath> = match cluster.backend {
        Backend::Iptables(_) => Box::new(IptablesDatapath::open()?.with_faults(faults)),
        _ => Box::new(open_kernel(ownership)?.with_faults(faults)),
    };
    let tables = TablePool::with_probe(TableRange::default(), KernelTables::open()?);
    Ok(Reconciler::with_allocators(datapath, MarkPool::new(cluster.marks), tables))
}

/// Opens the kernel of the calling thread's network, also where a process that another thread
/// just forked holds the lock until it becomes another program.
pub(crate) fn open_kernel(
    ownership: Ownership,
) -> std::result::Result<KernelDatapath, KernelError> {
    let begin = Instant::now();
    loop {
        match KernelDatapath::open_as(ownership) {
            Err(error) if error.holder().is_some() && begin.elapsed() < PATIENCE => {
                thread::sleep(Duration::from_millis(1));
            }
            opened => return opened,
        }
    }
}

/// Makes a node hold what it should.
pub(crate) fn make(
    node: &mut Node,
    cluster: &Cluster,
    wanted: &Wanted,
) -> std::result::Result<Report, Error> {
    match wanted {
        Wanted::Policies(policies) => node.reconcile(cluster, policies),
        Wanted::Otherwise(policies) => {
            let steering = match (cluster.backend, cluster.steering) {
                (Backend::Nftables, Steering::Tables) => Steering::EgressHook,
                _ => Steering::Tables,
            };
            node.reconcile(&cluster.clone().with_steering(steering), policies)
        }
        Wanted::Nothing => node.remove(),
    }
}

/// The child: makes the change of a scenario twice.
pub(crate) fn main(arguments: &[String]) -> Result {
    let [scenario, node, moment, write] = arguments else {
        return Err("a child needs four arguments".into());
    };
    let (node, write): (usize, usize) = (node.parse()?, write.parse()?);
    let faults = match moment.as_str() {
        "before" => Faults::new().at_write(write, Fault::KillBefore),
        "after" => Faults::new().at_write(write, Fault::KillAfter),
        _ => Faults::new(),
    };
    let scenarios = scenarios()?;
    let scenario = scenarios.get(scenario.parse::<usize>()?).ok_or("no such scenario")?;
    let wanted = scenario.after.get(node).ok_or("no such node")?;
    let cluster = scenario.marks[1].of(cluster(NODES.get(node).ok_or("no such node")?)?);
    let mut reconciler = open(&cluster, scenario.ownership, &faults)?;
    let first = make(&mut reconciler, &cluster, wanted)?.changes.len();
    let calls = faults.calls();
    let mut writes = calls.iter().filter(|call| call.writes);
    let count = writes.clone().count();
    let end = writes.position(|call| call.subsystem == Subsystem::Connections);
    let second = make(&mut reconciler, &cluster, wanted)?.changes;
    let end = end.map_or_else(|| "-".to_owned(), |end| end.to_string());
    write!(io::stdout(), "{count} {end} {first} {}", second.len())?;
    Ok(())
}

/// Runs a child in a node's network; `None` if it was killed.
pub(crate) fn run(
    host: &Host,
    scenario: usize,
    node: usize,
    moment: Option<Moment>,
) -> Result<Option<Done>> {
    let (moment, write) = match moment {
        None => ("never", 0),
        Some(Moment::Before(write)) => ("before", write),
        Some(Moment::After(write)) => ("after", write),
    };
    let program = std::env::current_exe()?;
    // A process starts in the network of the thread that starts it.
    let output = host.netns.run(|| {
        Command::new(program)
            .arg("child")
            .args([scenario, node].map(|number| number.to_string()))
            .args([moment, &write.to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .output()
    })??;
    if output.status.signal() == Some(KILL) {
        return Ok(None);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("the process on {} failed: {said}", host.name).into());
    }
    let text = String::from_utf8(output.stdout)?;
    let mut words = text.split(' ');
    let mut word = || words.next().ok_or("the process said too little");
    Ok(Some(Done {
        writes: word()?.parse()?,
        end: word()?.parse().ok(),
        changes: [word()?.parse()?, word()?.parse()?],
    }))
}
