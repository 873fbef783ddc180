//! Faults by plan between the datapath and the kernel.

use std::time::Instant;

use super::{IptablesDatapath, KernelDatapath};
use crate::error::KernelError;
use crate::faults::{Call, Fault, Faults, Subsystem};

mod datagram;
mod tap;

pub(super) use tap::Tap;

impl KernelDatapath {
    /// Opens sockets in the network namespace of the calling thread, with faults.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open); opening is no call.
    pub fn open_with_faults(faults: &Faults) -> Result<Self, KernelError> {
        let mut opened = Self::open()?;
        opened.routing.socket().set_tap(Tap::of_routing(faults.clone()));
        opened.netfilter.set_tap(Tap::of_netfilter(faults.clone()));
        Ok(opened)
    }
}

impl IptablesDatapath {
    /// Opens sockets in the network namespace of the calling thread and looks for the tools, with
    /// faults.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open); opening is no call.
    pub fn open_with_faults(faults: &Faults) -> Result<Self, KernelError> {
        let mut opened = Self::open()?;
        opened.tap(faults);
        let kernel = opened.kernel();
        kernel.routing.socket().set_tap(Tap::of_routing(faults.clone()));
        kernel.netfilter.set_tap(Tap::of_netfilter(faults.clone()));
        Ok(opened)
    }
}

impl Faults {
    /// Runs a tool, or does with it what the plan says.
    pub(super) fn run<T>(
        &self,
        writes: bool,
        text: &str,
        run: impl FnOnce() -> Result<T, KernelError>,
    ) -> Result<T, KernelError> {
        let call = Call { subsystem: Subsystem::Iptables, writes };
        match self.next(call) {
            Some(Fault::Errno(errno) | Fault::Refuse(errno)) => {
                return Err(KernelError::refused(text, errno));
            }
            Some(Fault::ForeignWrite(write)) => write(),
            Some(Fault::KillBefore) => tap::kill(),
            Some(Fault::KillAfter) => {
                let _gone_anyway = run();
                tap::kill();
                return Err(KernelError::answer(text, "this process is dead"));
            }
            _ => {}
        }
        let begin = Instant::now();
        let ran = run();
        self.sent(call, begin.elapsed());
        ran
    }
}
