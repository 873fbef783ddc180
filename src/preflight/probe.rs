//! Reads the facts about a host that the preflight check judges.

mod devices;
#[cfg(test)]
mod mutated;
mod routing;
mod settings;
#[cfg(test)]
mod tests;
mod uses;

use std::collections::BTreeSet;

use super::KernelPart;
use super::facts::{Facts, Firewall};
use super::foreign::foreign;
use crate::error::{KernelError, errno};
use crate::kernel::nft;
use crate::kernel::rtnetlink::socket::RouteSocket;

/// Reads the facts, including the settings of `devices` and of every interface with an address.
///
/// Netlink and `/proc/sys/net` both show the network namespace of the calling thread.
pub(crate) fn facts(devices: &[&str]) -> Result<Facts, KernelError> {
    let mut socket = RouteSocket::open()?;
    let mut facts = Facts::default();
    let indexed = socket.all_devices()?;
    facts.addresses = socket.all_addresses(&indexed)?;
    facts.devices = indexed.into_iter().map(|(_, device)| device).collect();
    let ours = socket.link()?.map(|(device, _)| device);
    facts.lacks_ipv6 = socket.lacks_ipv6(ours.as_ref())?;
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
    facts.uses = sources.chain(uses::bound()).collect();
    match socket.has_vxlan() {
        Ok(true) => {}
        Ok(false) => facts.missing.push(KernelPart::Vxlan),
        Err(error) if error.is_denied() => facts.denied = true,
        Err(error) => return Err(error),
    }
    facts.firewall = firewall(&mut facts.missing, &mut facts.denied)?;
    let names = facts.addresses.iter().map(|address| address.device.as_str());
    let devices: BTreeSet<&str> = names.chain(devices.iter().copied()).collect();
    facts.settings = settings::settings(&devices);
    facts.version = settings::version();
    facts.legacy = settings::legacy_tables();
    Ok(facts)
}

/// Reads nf_tables objects of other programs, if nf_tables exists and may be read.
fn firewall(missing: &mut Vec<KernelPart>, denied: &mut bool) -> Result<Firewall, KernelError> {
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
    foreign(&mut socket)
}
