//! Between a socket and its callers: carries the faults out.

use std::io;
use std::time::Instant;

use super::datagram::{aborted, netfilter_call, refused, routing_call, torn, without_end};
use crate::error::errno;
use crate::faults::{Call, Fault, Faults, Subsystem};

/// The faults of one socket.
#[derive(Debug)]
pub(in super::super) struct Tap {
    faults: Faults,
    call: fn(&[u8]) -> Call,
    made_up: Option<Vec<u8>>,
    damage: Option<Damage>,
}

/// What happens to the next datagram that is received.
#[derive(Debug)]
enum Damage {
    Lost,
    Torn,
    Cut,
}

impl Tap {
    pub(in super::super) const fn of_routing(faults: Faults) -> Self {
        Self { faults, call: routing_call, made_up: None, damage: None }
    }

    pub(in super::super) const fn of_netfilter(faults: Faults) -> Self {
        Self { faults, call: netfilter_call, made_up: None, damage: None }
    }

    /// Sends a datagram, or does with it what the plan says.
    pub(in super::super) fn send(
        &mut self,
        datagram: &[u8],
        port: u32,
        send: impl Fn(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        (self.made_up, self.damage) = (None, None);
        let call = (self.call)(datagram);
        let transaction = call.writes && call.subsystem == Subsystem::Firewall;
        let Some(fault) = self.faults.next(call) else {
            let begin = Instant::now();
            let done = send(datagram);
            self.faults.sent(call, begin.elapsed());
            return done;
        };
        match fault {
            Fault::Errno(errno) => return Err(io::Error::from_raw_os_error(errno)),
            Fault::Refuse(errno) => {
                let refused = if transaction { aborted } else { refused };
                self.made_up = Some(refused(datagram, errno, port));
                return Ok(());
            }
            Fault::AckWithoutCommit => return send(without_end(datagram)),
            Fault::LoseReply => self.damage = Some(Damage::Lost),
            Fault::TornDump => self.damage = Some(Damage::Torn),
            Fault::CutReply => self.damage = Some(Damage::Cut),
            Fault::ForeignWrite(write) => write(),
            Fault::KillBefore => kill(),
            Fault::KillAfter => {
                let _gone_anyway = send(datagram);
                kill();
            }
        }
        send(datagram)
    }

    /// An answer that is not the kernel's.
    pub(in super::super) fn made_up(&mut self) -> Option<Vec<u8>> {
        self.made_up.take()
    }

    /// Damages an answer of the kernel's.
    pub(in super::super) fn damage(&mut self, datagram: &mut Vec<u8>) -> io::Result<()> {
        match self.damage.take() {
            None => {}
            Some(Damage::Lost) => return Err(io::Error::from_raw_os_error(errno::ENOBUFS)),
            Some(Damage::Torn) => torn(datagram),
            Some(Damage::Cut) => datagram.truncate(datagram.len() / 2),
        }
        Ok(())
    }
}

pub(super) fn kill() {
    use rustix::process::{Signal, getpid, kill_process};
    let _never_returns = kill_process(getpid(), Signal::KILL);
}
