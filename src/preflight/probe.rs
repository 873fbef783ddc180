//! Reads the facts about a host that the preflight check judges.

mod devices;
mod fast_paths;
#[cfg(test)]
mod mutated;
mod routing;
pub(crate) mod saved;
mod settings;
#[cfg(test)]
mod tests;
mod uses;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::KernelPart;
use super::facts::{Facts, Firewall};
use super::foreign::foreign;
use crate::error::{KernelError, errno};
use crate::iptables::{self, Variant, tool::Tools};
use crate::kernel::nft;
use crate::kernel::rtnetlink::socket::RouteSocket;
use crate::types::Family;

/// Reads the facts, including the settings of `devices` and of every interface with an address.
///
/// With `runs_tools`, tables of legacy iptables are no fact if all their rules are the datapath's.
///
/// Netlink and `/proc/sys/net` both show the network namespace of the calling thread.
pub(crate) fn facts(devices: &[&str], runs_tools: bool) -> Result<Facts, KernelError> {
    let mut socket = RouteSocket::open()?;
    let mut facts = Facts::default();
    let indexed = socket.all_devices()?;
    facts.addresses = socket.all_addresses(&indexed)?;
    facts.fast_paths = socket.fast_paths(&indexed)?;
    let names = indexed.iter().map(|(index, device)| (*index, device.name.clone())).collect();
    facts.devices = indexed.into_iter().map(|(_, device)| device).collect();
    let ours = socket.link()?.map(|(device, _)| device);
    facts.lacks_ipv6 = socket.lacks_ipv6(ours.as_ref())?;
    read_routing(&mut socket, &mut facts)?;
    facts.uses.extend(uses::bound());
    match socket.has_vxlan() {
        Ok(true) => {}
        Ok(false) => facts.missing.push(KernelPart::Vxlan),
        Err(error) if error.is_denied() => facts.denied = true,
        Err(error) => return Err(error),
    }
    facts.firewall = firewall(&names, &mut facts.missing, &mut facts.denied)?;
    let names = facts.addresses.iter().map(|address| address.device.as_str());
    let devices: BTreeSet<&str> = names.chain(devices.iter().copied()).collect();
    facts.settings = settings::settings(&devices);
    facts.version = settings::version();
    facts.legacy = settings::legacy_tables();
    if runs_tools && !facts.legacy.is_empty() && legacy_is_ours() {
        facts.legacy.clear();
    }
    facts.saved = saved::saved(Path::new("/"));
    Ok(facts)
}

/// Reads the facts about routing rules and tables alone.
pub(crate) fn routing() -> Result<Facts, KernelError> {
    let mut facts = Facts::default();
    read_routing(&mut RouteSocket::open()?, &mut facts)?;
    Ok(facts)
}

fn read_routing(socket: &mut RouteSocket, facts: &mut Facts) -> Result<(), KernelError> {
    match socket.foreign_rules() {
        Ok(rules) => facts.rules = rules,
        Err(error) if error.errno() == Some(errno::EOPNOTSUPP) => {
            facts.missing.push(KernelPart::PolicyRouting);
        }
        Err(error) => return Err(error),
    }
    let tables = socket.foreign_tables(&facts.rules)?;
    (facts.tables, facts.catch_all) = (tables.used, tables.catch_all);
    facts.intruders = tables.intruders;
    let sources = tables.sources.into_iter().map(|ip| (ip, "source of routes".to_owned()));
    facts.uses = sources.collect();
    Ok(())
}

/// Returns whether legacy iptables has no rules and no policies but the datapath's.
fn legacy_is_ours() -> bool {
    let Ok(tools) = Tools::find() else { return false };
    Family::BOTH.into_iter().all(|family| {
        let saved = tools.save(Variant::Legacy, family);
        saved.is_ok_and(|text| {
            let drops = |line: &str| line.starts_with(':') && line.contains(" DROP ");
            iptables::saved::foreign_rules(&text) == 0 && !text.lines().any(drops)
        })
    })
}

/// Reads nf_tables objects of other programs, if nf_tables exists and may be read.
fn firewall(
    names: &BTreeMap<u32, String>,
    missing: &mut Vec<KernelPart>,
    denied: &mut bool,
) -> Result<Firewall, KernelError> {
    let mut socket = match nft::open() {
        Err(error) if nft::is_absent(&error) => {
            missing.push(KernelPart::NfTables);
            return Ok(Firewall::default());
        }
        other => other?,
    };
    let lacking = match nft::missing(&mut socket) {
        Err(error) if error.is_denied() => {
            *denied = true;
            return Ok(Firewall::default());
        }
        other => other?,
    };
    missing.extend(&lacking);
    if lacking.contains(&KernelPart::NfTables) {
        return Ok(Firewall::default());
    }
    foreign(&mut socket, names)
}
