//! `conntrack`: a connection put into the kernel's table, or all of them out of it.

use std::io;
use std::net::IpAddr;

use super::netlink::{Body, NETFILTER, Netlink, flag, octets};
use super::words::{Words, unknown};

/// `NFNL_SUBSYS_CTNETLINK` and its `IPCTNL_MSG_CT_NEW` and `IPCTNL_MSG_CT_DELETE`.
const NEW: u16 = 1 << 8;
const DELETE: u16 = NEW | 2;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// `TCP_CONNTRACK_ESTABLISHED`.
const ESTABLISHED: u8 = 3;

pub(super) fn main(mut words: Words) -> io::Result<String> {
    let mut netlink = Netlink::open(NETFILTER)?;
    let verb = words.word()?;
    if verb == "-F" {
        for family in [2, 10] {
            netlink.request(DELETE, 0, &Body::default().raw(&[family, 0, 0, 0]))?;
        }
        return Ok(String::new());
    }
    if verb != "-I" {
        return Err(unknown(format_args!("conntrack {verb}")));
    }
    let unset = IpAddr::from([0; 4]);
    let (mut source, mut destination, mut protocol) = (unset, unset, UDP);
    let (mut ports, mut timeout, mut established) = ([0_u16; 2], 60, false);
    while let Some(word) = words.next() {
        match word.as_str() {
            "-s" => source = words.value()?,
            "-d" => destination = words.value()?,
            "-p" => protocol = if words.word()? == "tcp" { TCP } else { UDP },
            "--sport" => ports[0] = words.value()?,
            "--dport" => ports[1] = words.value()?,
            "-t" => timeout = words.number()?,
            "--state" => established = words.word()? == "ESTABLISHED",
            word => return Err(unknown(format_args!("conntrack {word}"))),
        }
    }
    let tuple = |from: IpAddr, to: IpAddr, [sport, dport]: [u16; 2]| {
        let first = if from.is_ipv4() { 1 } else { 3 };
        let addresses = Body::default().put(first, &octets(from)).put(first + 1, &octets(to));
        let ports = Body::default()
            .put(1, &[protocol])
            .put(2, &sport.to_be_bytes())
            .put(3, &dport.to_be_bytes());
        Body::default().nest(1, addresses).nest(2, ports)
    };
    let family = if source.is_ipv4() { 2 } else { 10 };
    let mut body = Body::default()
        .raw(&[family, 0, 0, 0])
        .nest(1, tuple(source, destination, ports))
        .nest(2, tuple(destination, source, [ports[1], ports[0]]))
        .be32(7, timeout);
    if established {
        let state = Body::default().put(1, &[ESTABLISHED]);
        body = body.nest(4, Body::default().nest(1, state));
    }
    netlink.request(NEW, flag::CREATE | flag::EXCL, &body)?;
    Ok(String::new())
}
