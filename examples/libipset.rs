//! ipsets written through libipset in a helper process, and read back over netlink.
//!
//! `cargo run --features ipset-sys --example libipset`; the example creates its own network
//! namespace.

use std::error::Error;
use std::io::{self, Write};

use egress_datapath::datapath::observe;
use egress_datapath::iptables::IptablesDatapath;
use egress_datapath::iptables::libipset::{self, Libipset};
use egress_datapath::state::{Ipset, IpsetContents};
use egress_datapath::testing::lab;
use egress_datapath::{Changes, Datapath, Family, State};

/// Argument that starts this program as the helper process of libipset.
const SERVE: &str = "serve";

fn main() -> Result<(), Box<dyn Error>> {
    if std::env::args().nth(1).as_deref() == Some(SERVE) {
        return Ok(libipset::serve()?);
    }
    lab::isolate()?;
    let libipset = Libipset::new(std::env::current_exe()?).with_argument(SERVE);
    let mut datapath = IptablesDatapath::open_with_libipset(libipset.clone())?;
    let mut out = io::stdout();

    let set = Ipset::Selected(Family::V4);
    let pods = IpsetContents::of(["10.244.1.10/32".parse()?, "10.244.2.0/24".parse()?]);
    let wanted = State { ipsets: [(set, pods)].into(), ..State::default() };
    let changes = Changes::between(&State::default(), &wanted);
    write!(out, "{changes}")?;
    datapath.apply(&changes)?;
    writeln!(out, "10.244.2.7 in {set}: {}", libipset.contains(set, "10.244.2.7".parse()?)?)?;
    writeln!(
        out,
        "the same set read over netlink: {}",
        observe(&mut IptablesDatapath::open()?)? == wanted
    )?;

    // A refused command ends the helper process, and is returned as an error.
    if let Err(error) = datapath.apply(&changes) {
        writeln!(out, "applied again: {error}")?;
    }
    datapath.apply(&Changes::between(&wanted, &State::default()))?;
    Ok(())
}
