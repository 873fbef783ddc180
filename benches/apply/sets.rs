//! A set of iptables with many members: ours, and the tool that everybody uses.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};

use egress_datapath::iptables::IptablesDatapath;
use egress_datapath::state::{Ipset, IpsetContents};
use egress_datapath::{Changes, Datapath, Family, State};
use ipnet::IpNet;

use super::tools::feed;
use super::{line, median, timed};

const MEMBERS: u32 = 100_000;
const ROUNDS: usize = 9;

pub(crate) fn sets() {
    println!("a set of {MEMBERS} members");
    let address = |number| IpAddr::from(Ipv4Addr::from_bits(0x0a00_0000 + number));
    let members = (0..MEMBERS).map(|number| IpNet::from(address(number)));
    let set = Ipset::Sources(Family::V4, 1);
    let wanted = State { ipsets: [(set, IpsetContents::of(members))].into(), ..State::default() };
    let make = Changes::between(&State::default(), &wanted);
    let destroy = Changes::between(&wanted, &State::default());

    let mut text = "create other hash:net hashsize 131072 maxelem 131072\n".to_owned();
    for number in 0..MEMBERS {
        writeln!(text, "add other {}", address(number)).unwrap();
    }
    let mut datapath = IptablesDatapath::open().unwrap();
    let (mut ours, mut tools) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (loading, done) = timed(|| datapath.apply(&make));
        done.unwrap();
        ours.push(loading);
        datapath.apply(&destroy).unwrap();
        tools.push(feed("ipset", &["restore"], &text));
        feed("ipset", &["destroy", "other"], "");
    }
    let (ours, tool) = (median(ours), median(tools));
    line("ours", ours, None);
    line("ipset restore", tool, None);
    let ratio = tool.as_secs_f64() / ours.as_secs_f64();
    println!("  {:<44} {ratio:>11.1} x, at least 5", "ipset restore to ours");
}
