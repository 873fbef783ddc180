//! Reads where packets may leave an interface ahead of all nf_tables hooks.
//!
//! Programs that are attached by `bpf` links (TCX, netkit) are not listed over rtnetlink; a netkit
//! device is taken for one with programs.

use std::collections::{BTreeMap, BTreeSet};

use super::devices::Indexed;
use crate::error::KernelError;
use crate::kernel::netlink::exchange::in_one_piece;
use crate::kernel::netlink::message::{Attributes, Malformed, Message};
use crate::kernel::rtnetlink::socket::RouteSocket;
use crate::preflight::facts::DeviceKind;
use crate::preflight::terms::FastPath;

const NEWQDISC: u16 = 36;
const GETQDISC: u16 = 38;
const NEWTFILTER: u16 = 44;
const GETTFILTER: u16 = 46;

/// Filters of packets that arrive and that leave, of a `clsact` or `ingress` qdisc
/// (`TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)` and `…_EGRESS`).
const PARENTS: [u32; 2] = [0xffff_fff2, 0xffff_fff3];

/// `TCA_CLS_FLAGS_SKIP_SW`
const SKIP_SW: u32 = 1 << 1;

/// Header of messages about tc, `struct tcmsg`: its length, and the offset of the interface index.
const TCMSG: usize = 20;
const INDEX: usize = 4;

/// Ways by which packets leave an interface, found at a filter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) ways: BTreeSet<FastPath>,
    /// Interfaces that packets are redirected to, by index.
    pub(crate) redirects: BTreeSet<u32>,
}

impl RouteSocket {
    pub(crate) fn fast_paths(
        &mut self,
        devices: &[Indexed],
    ) -> Result<BTreeMap<FastPath, BTreeSet<String>>, KernelError> {
        let mut found: BTreeMap<FastPath, BTreeSet<String>> = BTreeMap::new();
        let mut add = |way, name: &str| found.entry(way).or_default().extend([name.to_owned()]);
        for (_, device) in devices {
            if device.xdp {
                add(FastPath::Xdp, &device.name);
            }
            if device.kind == DeviceKind::Netkit {
                add(FastPath::TrafficControl, &device.name);
            }
        }
        let with_qdisc = self.interfaces_with_qdisc()?;
        for (index, device) in devices.iter().filter(|(index, _)| with_qdisc.contains(index)) {
            let filters = self.filters(*index)?;
            filters.ways.iter().for_each(|way| add(*way, &device.name));
            let stays = |to: &u32| {
                devices.iter().any(|(index, d)| index == to && d.kind == DeviceKind::Ifb)
            };
            if !filters.redirects.iter().all(stays) {
                add(FastPath::Redirect, &device.name);
            }
        }
        Ok(found)
    }

    /// Indices of the interfaces with a `clsact` or `ingress` qdisc.
    fn interfaces_with_qdisc(&mut self) -> Result<BTreeSet<u32>, KernelError> {
        let mut found = BTreeSet::new();
        self.tc("tc qdisc show", (GETQDISC, NEWQDISC), 0, 0, &mut |message| {
            found.extend(qdisc(message)?);
            Ok(())
        })?;
        Ok(found)
    }

    fn filters(&mut self, index: u32) -> Result<Found, KernelError> {
        let mut found = Found::default();
        for parent in PARENTS {
            let kinds = (GETTFILTER, NEWTFILTER);
            self.tc("tc filter show", kinds, index, parent, &mut |message| {
                filter(message, &mut found)
            })?;
        }
        Ok(found)
    }

    /// Dumps objects of tc. An object that comes or goes meanwhile is read twice or not at all.
    fn tc(
        &mut self,
        what: &str,
        (get, new): (u16, u16),
        index: u32,
        parent: u32,
        take: &mut dyn FnMut(&Message<'_>) -> Result<(), Malformed>,
    ) -> Result<(), KernelError> {
        let header = [0, index, 0, parent, 0].map(u32::to_ne_bytes).concat();
        let listed = in_one_piece(|| {
            let mut each =
                |message: &Message<'_>| if message.kind == new { take(message) } else { Ok(()) };
            Ok(((), self.list(&what, get, &header, &mut each)?))
        });
        match listed {
            // A kernel without tc, or an interface that was deleted meanwhile.
            Err(error) if error.errno().is_some() && !error.is_denied() => Ok(()),
            listed => listed.map(drop),
        }
    }
}

/// Reads the index of the interface of a `clsact` or `ingress` qdisc.
pub(crate) fn qdisc(message: &Message<'_>) -> Result<Option<u32>, Malformed> {
    let Some(index) = message.payload().get(INDEX..INDEX + 4) else { return Ok(None) };
    for attribute in attributes(message) {
        let attribute = attribute?;
        if attribute.kind == 1 && (attribute.is("clsact") || attribute.is("ingress")) {
            return Ok(index.try_into().ok().map(u32::from_ne_bytes));
        }
    }
    Ok(None)
}

/// Reads what a filter does with packets.
pub(crate) fn filter(message: &Message<'_>, found: &mut Found) -> Result<(), Malformed> {
    let (mut kind, mut options) = ("", Attributes::new(&[]));
    for attribute in attributes(message) {
        let attribute = attribute?;
        match attribute.kind {
            1 => kind = attribute.text()?,
            2 => options = attribute.nested(),
            _ => {}
        }
    }
    // Types of the attributes with actions and with flags.
    let (action, flags) = match kind {
        "bpf" => (1, 9),
        "flower" => (3, 22),
        "matchall" => (2, 3),
        "u32" => (7, 11),
        "fw" => (4, u16::MAX),
        "basic" => (3, u16::MAX),
        _ => return Ok(()),
    };
    for option in options {
        let option = option?;
        if option.kind == action {
            for entry in option.nested() {
                act(entry?.nested(), found)?;
            }
        } else if option.kind == flags && option.u32()? & SKIP_SW != 0 {
            found.ways.insert(FastPath::Hardware);
        } else if kind == "bpf" {
            found.ways.insert(FastPath::TrafficControl);
        }
    }
    Ok(())
}

/// Reads an action of a filter.
fn act(action: Attributes<'_>, found: &mut Found) -> Result<(), Malformed> {
    let (mut kind, mut options) = ("", Attributes::new(&[]));
    for attribute in action {
        let attribute = attribute?;
        match attribute.kind {
            1 => kind = attribute.text()?,
            2 => options = attribute.nested(),
            _ => {}
        }
    }
    if kind == "bpf" {
        found.ways.insert(FastPath::TrafficControl);
    }
    for option in options {
        let option = option?;
        if kind == "mirred" && option.kind == 2 {
            // `struct tc_mirred`: five numbers, the action, and the index of the interface.
            let word = |at: usize| {
                let bytes = option.bytes().get(at..at + 4)?;
                bytes.try_into().ok().map(u32::from_ne_bytes)
            };
            // To another interface, as if it sent the packet or as if it received it.
            if let (Some(1 | 3), Some(index)) = (word(20), word(24)) {
                found.redirects.insert(index);
            }
        }
    }
    Ok(())
}

fn attributes<'a>(message: &Message<'a>) -> Attributes<'a> {
    Attributes::new(message.payload().get(TCMSG..).unwrap_or_default())
}
