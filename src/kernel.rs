//! The kernel of a network namespace, over netlink.

mod address;
mod conntrack;
#[cfg(feature = "testing")]
pub(crate) mod faults;
mod fdb;
mod link;
mod link_change;
mod neighbour;
mod nft;
mod route;
mod route_answer;
mod route_socket;
mod rtnl;
#[cfg(test)]
mod rtnl_kernel_tests;
#[cfg(test)]
mod rtnl_wire_tests;
mod rule;
mod socket;
mod tables;
mod wire;

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::changes::{Changes, Step};
use crate::connection::Connection;
use crate::datapath::Datapath;
use crate::error::{ApplyError, KernelError};
use crate::op::Op;
use crate::state::State;
use crate::types::DeviceName;

use route_socket::RouteSocket;
use socket::Socket;
pub use tables::KernelTables;

/// The kernel of the network namespace that the opening thread was in.
///
/// Its sockets belong to that namespace for ever: enter the namespace, open, and move the value
/// wherever it is needed. Every call takes as long as the kernel takes and waits for nothing
/// else, microseconds for a change and milliseconds for a large table.
///
/// Reading links, routes and rules needs no privilege; everything else needs `CAP_NET_ADMIN` in
/// the user namespace that owns the network namespace.
#[derive(Debug)]
pub struct KernelDatapath {
    routing: RouteSocket,
    netfilter: Socket,
}

impl KernelDatapath {
    /// Opens sockets in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// The part of the kernel that is missing.
    pub fn open() -> Result<Self, KernelError> {
        Ok(Self { routing: RouteSocket::open()?, netfilter: nft::open()? })
    }

    /// The device that has an address, and its MTU in bytes; `None` if none has it.
    pub fn device_of(&mut self, address: IpAddr) -> Result<Option<(DeviceName, u32)>, KernelError> {
        self.routing.device_of(address)
    }

    /// The MTU of a device in bytes; `None` if there is no device of that name.
    pub fn mtu_of(&mut self, device: &DeviceName) -> Result<Option<u32>, KernelError> {
        let found = self.routing.device_named(&format_args!("ip link show {device}"), device)?;
        Ok(found.map(|device| device.mtu))
    }

    /// Makes a step: one transaction, or every request in turn.
    fn step(&mut self, step: &Step) -> (usize, Vec<(Op, KernelError)>) {
        if step.ops.first().is_some_and(Op::is_nft) {
            return match nft::commit(&mut self.netfilter, &step.ops) {
                Ok(()) => (step.ops.len(), Vec::new()),
                Err(refused) => {
                    let refused = refused.into_iter();
                    let op = |index: usize| step.ops.get(index).or(step.ops.first()).cloned();
                    (0, refused.filter_map(|(index, error)| Some((op(index)?, error))).collect())
                }
            };
        }
        let ended: Vec<_> = step.ops.iter().filter_map(Op::ended).collect();
        if !ended.is_empty() {
            let refused = conntrack::end(&mut self.netfilter, &ended).into_iter();
            let op = |connection: &Connection| Op::EndConnection(*connection);
            let refused: Vec<_> = refused
                .filter_map(|(index, error)| ended.get(index).map(|found| (op(found), error)))
                .collect();
            return (ended.len() - refused.len(), refused);
        }
        let refuse = |op: &Op| self.routing.make(op).err().map(|error| (op.clone(), error));
        let refused: Vec<_> = step.ops.iter().filter_map(refuse).collect();
        (step.ops.len() - refused.len(), refused)
    }
}

impl Datapath for KernelDatapath {
    fn observe(&mut self) -> Result<State, KernelError> {
        let mut state = State::default();
        self.routing.observe(&mut state)?;
        state.firewall = nft::observe(&mut self.netfilter)?;
        Ok(state)
    }

    fn stale_connections(
        &mut self,
        wanted: &State,
        before: &State,
    ) -> Result<BTreeSet<Connection>, KernelError> {
        if wanted.firewall.is_none() && before.firewall.is_none() {
            return Ok(BTreeSet::new());
        }
        let local = self.routing.local_addresses()?;
        let (wanted, before) = (wanted.firewall.as_ref(), before.firewall.as_ref());
        let connections = conntrack::connections(&mut self.netfilter)?.into_iter();
        // What ends on this node passes no hook that would translate it.
        let forwarded = connections.filter(|connection| !local.contains(&connection.peer));
        Ok(forwarded.filter(|connection| connection.is_stale(wanted, before)).collect())
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
        let mut applied = 0;
        for step in changes.steps() {
            let (made, refused) = self.step(step);
            applied += made;
            if !refused.is_empty() {
                let skipped = changes.len() - applied - refused.len();
                return Err(ApplyError { applied, refused, skipped });
            }
        }
        Ok(())
    }
}
