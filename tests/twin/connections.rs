//! The connections that two worlds track.

use std::collections::BTreeSet;

use egress_datapath::Datapath;
use egress_datapath::datapath::{Among, Connection};

use crate::Result;

/// What only one of the two tracks, marks and translations included.
pub(crate) fn difference(sim: &mut impl Datapath, kernel: &mut impl Datapath) -> Result {
    let (mut in_sim, mut in_kernel) = (Vec::new(), Vec::new());
    sim.connections(Among::All, &mut |found| in_sim.push(found))?;
    kernel.connections(Among::All, &mut |found| in_kernel.push(found))?;
    between(in_sim, in_kernel)
}

fn between(sim: Vec<Connection>, kernel: Vec<Connection>) -> Result {
    let [sim, kernel] = [sim, kernel].map(|all| all.into_iter().map(comparable).collect());
    if sim == kernel {
        return Ok(());
    }
    let only = |one: &BTreeSet<Connection>, other: &BTreeSet<Connection>| {
        let lines = one.difference(other).map(|found| {
            let Connection { snat_address, snat_port, mark, .. } = found;
            format!("{found} as {snat_address} port {snat_port}, mark {mark:#x}")
        });
        lines.collect::<Vec<_>>().join("\n")
    };
    let (one, other) = (only(&sim, &kernel), only(&kernel, &sim));
    Err(format!("only the simulator tracks:\n{one}\nonly the kernel tracks:\n{other}").into())
}

/// A connection without what is the kernel's secret: its number, and which port comes in the place
/// of one that is taken.
fn comparable(found: Connection) -> Connection {
    let kept = found.snat_port == found.source_port;
    Connection { id: 0, snat_port: if kept { found.snat_port } else { 0 }, ..found }
}

#[test]
fn connections_differ_in_all_but_their_numbers() {
    let [source, peer] = ["10.244.1.10", "198.51.100.10"].map(|text| text.parse().unwrap());
    let one = Connection {
        protocol: 17,
        source,
        source_port: 1024,
        destination: peer,
        destination_port: 53,
        peer,
        reply_source_port: 53,
        snat_address: source,
        snat_port: 1024,
        mark: 0x2700_0000,
        zone: 0,
        reply_zone: 0,
        id: 7,
    };
    assert!(between(vec![one], vec![Connection { id: 8, ..one }]).is_ok());
    let marked = Connection { mark: 0x2600_0000, ..one };
    let worn = Connection { snat_address: peer, ..one };
    let moved = Connection { snat_port: 1025, ..one };
    for other in [vec![], vec![marked], vec![worn], vec![moved], vec![one, marked]] {
        let told = between(vec![one], other.clone()).unwrap_err().to_string();
        assert!(told.starts_with("only the simulator tracks:\n"), "{told}");
        assert_eq!(told.contains("mark 0x26000000"), other.contains(&marked), "{told}");
    }
}
