//! Command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use egress_datapath::NodeName;

use super::backend::Choice;

/// Programs the egress datapath of one node from a file.
#[derive(Debug, Parser)]
#[command(name = "agent", version, after_help = AFTER)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const AFTER: &str = "\
Exit status: 0 if all is done; 1 if the kernel refused a request; 2 if the command line or the file
is invalid, and nothing was changed; 3 from apply and takeover if the file was applied, but an error
in it closes a policy or leaves a node out; 3 from plan --exit-code if there are changes.

The file has the cluster (nodes, excluded prefixes, tunnel, marks, tables) and the policies, the same
on every node; the documentation of `Cluster` and `EgressPolicy` describes the fields.

Reading needs CAP_NET_ADMIN in the user namespace of the network namespace, as writing does; legacy
iptables also needs CAP_NET_RAW.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Applies the file to the kernel.
    Apply(Apply),
    /// Prints the changes that apply would make.
    Plan(Plan),
    /// Checks this host for conflicts (preflight).
    Doctor(Doctor),
    /// Prints the installed state.
    Show(Show),
    /// Traces a packet of a pod.
    Explain(Explain),
    /// Applies the file, then removes the state of spidernet's egressgateway; stop its agent first.
    Takeover(Of),
    /// Removes all objects of the datapath, after blocking late replies to ended connections.
    Remove(Remove),
}

/// The node and its file.
#[derive(Debug, Args)]
pub(crate) struct Of {
    /// Name of this node in the file.
    #[arg(long, value_name = "NAME", value_parser = node)]
    pub(crate) node: NodeName,
    /// Cluster and policies.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) cluster: PathBuf,
    /// nftables, iptables-legacy, iptables-nft or auto.
    #[arg(long, value_name = "NAME", default_value = "nftables", value_parser = Choice::named)]
    pub(crate) backend: Choice,
}

fn node(text: &str) -> Result<NodeName, egress_datapath::error::NameError> {
    NodeName::new(text)
}

#[derive(Debug, Args)]
pub(crate) struct Apply {
    #[command(flatten)]
    pub(crate) of: Of,
    /// Prints the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Plan {
    #[command(flatten)]
    pub(crate) of: Of,
    /// Prints a shell script.
    #[arg(long, conflicts_with = "json")]
    pub(crate) as_shell: bool,
    /// Prints the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Exits with status 3 if there are changes.
    #[arg(long)]
    pub(crate) exit_code: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    #[command(flatten)]
    pub(crate) of: Of,
    /// Prints the problems as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// Prints the state as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Explain {
    #[command(flatten)]
    pub(crate) of: Of,
    /// Address of the pod.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) from: String,
    /// Destination, after destination NAT; ICMP echo without a port.
    #[arg(long, value_name = "ADDRESS[:PORT/udp]")]
    pub(crate) to: String,
    /// Prints the traces as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Remove {
    /// Does not wait until late replies cannot come any more.
    #[arg(long)]
    pub(crate) now: bool,
}
