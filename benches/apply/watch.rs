//! Cost of a datapath and of its watch for the transactions of other programs.

use std::time::Duration;

use common::world::{cluster, policies};
use egress_datapath::datapath::observe;
use egress_datapath::testing::{Faults, Subsystem};
use egress_datapath::{Cluster, EgressPolicy, KernelDatapath, Reconciler};

use crate::{line, median};

const ROUNDS: usize = 7;

/// The kernel's time for 100 000 elements that another datapath writes.
fn written(cluster: &Cluster, policies: &[EgressPolicy]) -> Duration {
    let faults = Faults::new();
    let mut other = Reconciler::new(KernelDatapath::open().unwrap().with_faults(&faults));
    other.reconcile(cluster, policies).unwrap();
    let took = faults.sending_to(Subsystem::Firewall);
    other.remove().unwrap();
    took
}

pub(crate) fn watch() {
    let (cluster, policies) = (cluster(), policies(1_000, 100));
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        let [alone, read, watched] = &mut times;
        alone.push(written(&cluster, &policies));
        let mut kernel = KernelDatapath::open().unwrap();
        observe(&mut kernel).unwrap();
        read.push(written(&cluster, &policies));
        let _watch = kernel.watch().unwrap();
        watched.push(written(&cluster, &policies));
    }
    println!("100 000 elements of another program; ratios of {ROUNDS} rounds");
    let [alone, read, watched] = times;
    let ratios = |of: &[Duration]| -> Vec<String> {
        let pairs = of.iter().zip(&alone);
        pairs.map(|(it, alone)| format!("{:.2}", it.div_duration_f64(*alone))).collect()
    };
    println!("  read: {}; watched: {}", ratios(&read).join(" "), ratios(&watched).join(" "));
    let floor = Some(median(alone.clone()));
    line("without a datapath", median(alone.clone()), floor);
    line("with a datapath that has read", median(read), floor);
    line("with a watch", median(watched), floor);
}
