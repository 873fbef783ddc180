//! Fault injection between the datapath and the kernel, according to a plan.

mod datagram;
mod tap;

use std::time::Instant;

use crate::error::KernelError;
use crate::faults::{Call, Fault, Faults, Subsystem};

pub(crate) use tap::Tap;

impl Faults {
    /// Runs a tool, with the fault that the plan has for this call.
    pub(crate) fn run<T>(
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
