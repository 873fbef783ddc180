//! Backend of a command, and its datapath.

use egress_datapath::KernelTables;
use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::datapath::observe;
use egress_datapath::iptables::{Iptables, IptablesDatapath};
use egress_datapath::state::Variant;
use egress_datapath::{Backend, Datapath, KernelDatapath, KernelError, MarkLayout, Reconciler};

/// Reconciler of any datapath.
pub(crate) type Egress = Reconciler<Box<dyn Datapath>>;

/// Value of the option `--backend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    Nftables,
    Iptables(Variant),
    /// nf_tables if the kernel has it, else the iptables variant that other programs use.
    Auto,
}

impl Choice {
    pub(crate) fn named(name: &str) -> Result<Self, &'static str> {
        Ok(match name {
            "nftables" => Self::Nftables,
            "iptables-legacy" => Self::Iptables(Variant::Legacy),
            "iptables-nft" => Self::Iptables(Variant::Nft),
            "auto" => Self::Auto,
            _ => return Err("expected nftables, iptables-legacy, iptables-nft or auto"),
        })
    }

    /// Returns the backend for this host.
    pub(crate) fn resolve(self) -> Result<Backend, KernelError> {
        let iptables = |variant| Backend::Iptables(Iptables::new(variant));
        match self {
            Self::Nftables => Ok(Backend::Nftables),
            Self::Iptables(variant) => Ok(iptables(variant)),
            Self::Auto => {
                match KernelDatapath::open().and_then(|mut kernel| observe(&mut kernel)) {
                    Ok(_) => Ok(Backend::Nftables),
                    Err(_) => IptablesDatapath::open()?.prevailing().map(iptables),
                }
            }
        }
    }
}

/// Opens a datapath that can program this backend, and remove the state of another one.
pub(crate) fn datapath(backend: Backend) -> Result<Box<dyn Datapath>, KernelError> {
    let iptables = matches!(backend, Backend::Iptables(_)) || IptablesDatapath::is_in_use()?;
    Ok(if iptables {
        Box::new(IptablesDatapath::open()?)
    } else {
        Box::new(KernelDatapath::open()?)
    })
}

/// Opens a reconciler for the network namespace of the agent.
pub(crate) fn reconciler(
    backend: Backend,
    marks: MarkLayout,
    tables: TableRange,
) -> Result<Egress, KernelError> {
    let tables = TablePool::with_probe(tables, KernelTables::open()?);
    Ok(Reconciler::with_allocators(datapath(backend)?, MarkPool::new(marks), tables))
}
