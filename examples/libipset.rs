//! Sets written through libipset, in a process of their own, and read back over netlink.
//!
//! `cargo run --features ipset-sys --example libipset`, in a network namespace of its own.

use std::error::Error;
use std::io::{self, Write};

use egress_datapath::libipset::{self, Libipset};
use egress_datapath::state::{Ipset, IpsetContents};
use egress_datapath::testing::lab;
use egress_datapath::{Changes, Datapath, Family, IptablesDatapath, State, observe};

/// The argument that has this program be the process that libipset runs in.
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
        "read over netlink, the same: {}",
        observe(&mut IptablesDatapath::open()?)? == wanted
    )?;

    // A refusal ends libipset's process, and is an error here.
    if let Err(error) = datapath.apply(&changes) {
        writeln!(out, "once more: {error}")?;
    }
    datapath.apply(&Changes::between(&wanted, &State::default()))?;
    Ok(())
}
