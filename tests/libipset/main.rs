//! Sets written over netlink and read through libipset, and the other way round.
//!
//! This program is both the test and the process that libipset runs in.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test says what it expects"
)]

#[macro_use]
extern crate harness;

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::process::ExitCode;

use egress_datapath::datapath::observe;
use egress_datapath::iptables::IptablesDatapath;
use egress_datapath::iptables::libipset::{self, Libipset};
use egress_datapath::state::{Ipset, IpsetContents, MarkBits, Member};
use egress_datapath::testing::lab;
use egress_datapath::{Changes, Datapath, Family, State};
use ipnet::IpNet;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;
type Sets = BTreeMap<Ipset, IpsetContents>;

const SERVE: &str = "serve";

fn main() -> ExitCode {
    match env::args().nth(1).as_deref() {
        Some(SERVE) => match libipset::serve() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let _unsaid = writeln!(io::stderr(), "{error}");
                ExitCode::FAILURE
            }
        },
        Some("idle") => ExitCode::SUCCESS,
        _ => harness::main(|| drop(lab::isolate())),
    }
}

fn libipset() -> Result<Libipset> {
    Ok(Libipset::new(env::current_exe()?).with_argument(SERVE))
}

/// The same through libipset, and over netlink.
fn both() -> Result<[IptablesDatapath; 2]> {
    Ok([IptablesDatapath::open_with_libipset(libipset()?)?, IptablesDatapath::open()?])
}

fn holding(ipsets: Sets) -> State {
    State { ipsets, ..State::default() }
}

fn net(text: &str) -> Result<IpNet> {
    Ok(text.parse()?)
}

fn marked(value: u32) -> Member {
    Member::Marked(MarkBits { mask: 0xffff_1100, value })
}

/// States that lead to every operation on the way from one to the next.
fn states() -> Result<Vec<Sets>> {
    let sources = Ipset::Sources(Family::V4, 0xdead_beef);
    let marks = Ipset::Marks(Family::V4);
    let six = Ipset::Destinations(Family::V6, 7);
    let few = [
        (sources, IpsetContents::of([net("10.244.1.10/32")?, net("0.0.0.0/0")?])),
        (
            marks,
            IpsetContents::new(
                true,
                [
                    (net("10.244.1.0/24")?, marked(0x2600_0100)),
                    (net("10.244.1.9/32")?, marked(0x2700_0000)),
                    (net("10.244.1.7/32")?, Member::Not),
                    (net("10.244.9.7/32")?, Member::In),
                ],
            ),
        ),
        (
            six,
            IpsetContents::new(
                false,
                [(net("2001:db8::/32")?, Member::In), (net("2001:db8::1/128")?, Member::Not)],
            ),
        ),
        (Ipset::Selected(Family::V6), IpsetContents::of([])),
    ];
    let other = [
        (sources, IpsetContents::of([net("10.244.1.11/32")?])),
        (
            marks,
            IpsetContents::new(
                true,
                [
                    (net("10.244.1.0/24")?, marked(0x2600_0200)),
                    (net("10.244.1.9/32")?, Member::Not),
                ],
            ),
        ),
        (Ipset::Selected(Family::V6), IpsetContents::of([net("::/0")?])),
    ];
    // More than a set has room for by default, so that it is swapped.
    let many = (0..70_000).map(|number| {
        IpNet::from(std::net::IpAddr::from(Ipv4Addr::from_bits(0x0a00_0000 + number)))
    });
    let large = [(sources, IpsetContents::of(many))];
    Ok(vec![few.into(), other.into(), large.into(), Sets::new()])
}

#[test]
fn both_ways_to_write_give_the_same_sets() -> Result {
    harness::given("network namespace", lab::isolate());
    let [mut through_libipset, mut over_netlink] = both()?;
    let states = states()?;
    for first_is_libipset in [true, false] {
        let mut before = State::default();
        for (number, sets) in states.iter().enumerate() {
            let wanted = holding(sets.clone());
            let changes = Changes::between(&before, &wanted);
            // Each goes on with what the other one has made.
            if (number % 2 == 0) == first_is_libipset {
                through_libipset.apply(&changes)?;
            } else {
                over_netlink.apply(&changes)?;
            }
            for found in [observe(&mut through_libipset)?, observe(&mut over_netlink)?] {
                if found.ipsets != wanted.ipsets {
                    let left = Changes::between(&found, &wanted);
                    return Err(format!("state {number} lacks\n{left}").into());
                }
            }
            before = wanted;
        }
    }
    Ok(())
}

#[test]
fn every_address_is_found_by_both() -> Result {
    harness::given("network namespace", lab::isolate());
    let [_, mut over_netlink] = both()?;
    let sets = states()?.swap_remove(0);
    over_netlink.apply(&Changes::between(&State::default(), &holding(sets)))?;
    let libipset = libipset()?;
    for (set, address, is_in) in [
        (Ipset::Sources(Family::V4, 0xdead_beef), "192.0.2.1", true),
        (Ipset::Marks(Family::V4), "10.244.1.77", true),
        (Ipset::Marks(Family::V4), "10.244.1.7", false),
        (Ipset::Marks(Family::V4), "10.244.2.7", false),
        (Ipset::Destinations(Family::V6, 7), "2001:db8::2", true),
        (Ipset::Destinations(Family::V6, 7), "2001:db8::1", false),
        (Ipset::Selected(Family::V6), "2001:db8::1", false),
    ] {
        if libipset.contains(set, address.parse()?)? != is_in {
            return Err(format!("{address} in {set} is not {is_in}").into());
        }
    }
    let error = libipset.contains(Ipset::Denied(Family::V4), "10.0.0.1".parse()?).err();
    let error = error.ok_or("a set that is not there has a member")?;
    if error.is_not_found() { Ok(()) } else { Err(error.into()) }
}

#[test]
fn a_refusal_is_an_error_with_its_words() -> Result {
    harness::given("network namespace", lab::isolate());
    let [mut through_libipset, mut over_netlink] = both()?;
    let set = Ipset::Selected(Family::V4);
    let wanted = holding([(set, IpsetContents::of([]))].into());
    let make = Changes::between(&State::default(), &wanted);
    through_libipset.apply(&make)?;
    let refused = through_libipset.apply(&make).err().ok_or("it was made twice")?;
    let [(_, error)] = refused.refused.as_slice() else { return Err(refused.into()) };
    let words = error.words().unwrap_or_default();
    if !words.contains("exists") || !error.is_exists() {
        return Err(format!("{error:?}").into());
    }
    if observe(&mut over_netlink)?.ipsets != wanted.ipsets {
        return Err("what was half made is still there".into());
    }
    // A member of the other family is refused by libipset itself, before the kernel.
    let six = IpsetContents::of([net("2001:db8::1/128")?]);
    let odd = Changes::between(&wanted, &holding([(set, six)].into()));
    let refused = through_libipset.apply(&odd).err().ok_or("it was taken")?;
    let text = refused.to_string();
    if text.contains("2001:db8::1") && text.contains("Syntax error") {
        Ok(())
    } else {
        Err(text.into())
    }
}

#[test]
fn what_is_refused_keeps_nothing_else_back() -> Result {
    harness::given("network namespace", lab::isolate());
    let [mut through_libipset, mut over_netlink] = both()?;
    let [one, two, three] =
        [Ipset::Denied(Family::V4), Ipset::Ignored(Family::V4), Ipset::Peers(Family::V4)];
    let of =
        |sets: &[Ipset]| holding(sets.iter().map(|set| (*set, IpsetContents::of([]))).collect());
    through_libipset.apply(&Changes::between(&State::default(), &of(&[one, three])))?;
    // It is thought that the second one is there.
    let all = Changes::between(&of(&[one, two, three]), &State::default());
    let refused = through_libipset.apply(&all).err().ok_or("nothing was refused")?;
    let found = observe(&mut over_netlink)?;
    if refused.refused.len() == 1 && found.is_empty() {
        return Ok(());
    }
    Err(format!("{refused}, left: {:?}", found.ipsets.keys()).into())
}

#[test]
fn a_program_that_does_not_serve_is_named() -> Result {
    harness::given("network namespace", lab::isolate());
    let idle = Libipset::new(env::current_exe()?).with_argument("idle");
    let error = idle.observe().err().ok_or("a program that does nothing was believed")?;
    if !error.to_string().contains("libipset::serve") {
        return Err(error.into());
    }
    let error = Libipset::new("/nowhere").observe().err().ok_or("no program was believed")?;
    if error.is_not_found() { Ok(()) } else { Err(error.into()) }
}
