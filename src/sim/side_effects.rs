//! Side effects of link changes: routes, neighbours and addresses that the kernel removes.

use std::net::IpAddr;

use crate::state::{Route, State, Vxlan};

/// Minimum MTU of IPv6 in bytes (RFC 8200).
const IPV6_MIN_MTU: u32 = 1280;

/// Whether IPv6 works on an interface (`ipv6_add_dev`).
pub(super) const fn has_ipv6(link: &Vxlan) -> bool {
    link.mtu >= IPV6_MIN_MTU
}

/// The properties that other objects depend on: the VXLAN device, and having an IPv4 address.
#[derive(Clone, Debug)]
pub(super) struct LinkSnapshot {
    link: Option<Vxlan>,
    ipv4: bool,
}

impl LinkSnapshot {
    pub(super) fn of(state: &State) -> Self {
        let ipv4 = state.addresses.iter().any(|net| net.addr().is_ipv4());
        Self { link: state.link.clone(), ipv4 }
    }
}

/// Applies the side effects of a change of the VXLAN device or of its last address.
///
/// `was` is the footing before the change. Removed objects do not return when the change is
/// reverted.
pub(super) fn follow(was: &LinkSnapshot, state: &mut State) {
    match (&was.link, state.link.clone()) {
        (Some(_), None) => {
            state.addresses.clear();
            state.fdb.clear();
            gone_with_device(state, |_| true);
        }
        (Some(old), Some(new)) => {
            if old.mac != new.mac {
                state.neighbours.clear();
            }
            if old.up && !new.up {
                gone_with_device(state, |_| true);
                // IPv6 addresses are removed (`addrconf_ifdown`), IPv4 addresses stay.
                state.addresses.retain(|net| net.addr().is_ipv4());
            }
            if has_ipv6(old) && !has_ipv6(&new) {
                // `addrconf_notify` on `NETDEV_CHANGEMTU`.
                gone_with_device(state, |address| address.is_ipv6());
                state.addresses.retain(|net| net.addr().is_ipv4());
            }
        }
        (None, _) => {}
    }
    if was.ipv4 && !LinkSnapshot::of(state).ipv4 {
        // IPv4 on the interface ends with its last address (`fib_inetaddr_event`).
        gone_with_device(state, |address| address.is_ipv4());
    }
}

/// Removes the routes and neighbours of an interface; they do not return when it is up again.
fn gone_with_device(state: &mut State, of: impl Fn(IpAddr) -> bool) {
    state.neighbours.retain(|address, _| !of(*address));
    state.routes.retain(|_, route| !matches!(route, Route::Via(via) if of(*via)));
}
