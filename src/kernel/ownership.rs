//! Exclusive or shared ownership of the nf_tables table.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use super::netlink::socket::Socket;
use super::nft;
use crate::error::{KernelError, errno};
use crate::state::TableFamily;

/// Ownership of the datapath's nf_tables table: permission for other programs to change it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ownership {
    /// Every privileged program may change the table, `nft flush ruleset` included.
    ///
    /// For short-lived processes that run one after another, each with all policies of the node.
    #[default]
    Shared,
    /// Only this datapath may change the table, for as long as it lives; a second one is refused.
    ///
    /// The kernel enforces this from 6.9 on; on older kernels other datapaths are kept out, but
    /// other programs are not. [`KernelDatapath::protection`](crate::KernelDatapath::protection)
    /// tells which applies.
    Exclusive,
}

/// Protection of a datapath's nf_tables table against changes by other programs.
///
/// Stronger protection compares as greater: `protection() < Protection::Kernel` is a datapath whose
/// table other programs can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Protection {
    /// No protection: the datapath is [`Ownership::Shared`].
    None,
    /// Unique name in the network namespace, which keeps out other exclusive datapaths.
    ///
    /// The name is an abstract socket name, which any process may take first. This is the only
    /// protection on Linux before 5.12.
    Name,
    /// Lock; shared datapaths check it before they change anything.
    ///
    /// The lock is a table `egress_datapath_lock` that only its owner can change and that is
    /// removed with its owner (`NFT_TABLE_F_OWNER`). A shared datapath that is in the middle of its
    /// changes finishes them. Linux from 5.12 on.
    Lock,
    /// Lock, and table owner enforced by the kernel (`NFT_TABLE_F_PERSIST`).
    ///
    /// The table stays when its owner dies, and the next owner takes it over. Linux from 6.9 on.
    Kernel,
}

/// Objects that protect the table against other programs.
#[derive(Debug)]
pub(super) struct Hold {
    pub(super) protection: Protection,
    /// Flags for the creation of the table.
    pub(super) table_flags: u32,
    /// Name in the abstract socket namespace, which is part of the network namespace.
    ///
    /// The kernel frees the name with the process, however it ends.
    _name: Option<UnixListener>,
    /// Set if this kernel may have a lock to check; `None` until that is known.
    asks: Option<bool>,
}

const NAME: &str = "egress-datapath";

const PLAIN_TABLE: &str = "remove what a shared datapath made, then make it exclusive: the kernel \
                           gives a table that has no owner none later";

impl Hold {
    /// Takes ownership of this network namespace, and of the table if it exists.
    pub(super) fn take(ownership: Ownership, socket: &mut Socket) -> Result<Self, KernelError> {
        if ownership == Ownership::Shared {
            let protection = Protection::None;
            return Ok(Self { protection, table_flags: 0, _name: None, asks: None });
        }
        // Only a privileged process can take this lock. It is also for kernels with owners of our
        // own table, which is created later.
        let locked = nft::lock(socket).map_err(|error| match nft::locked_by(socket) {
            Ok(Some(holder)) => error.with_holder(holder),
            _ => error,
        })?;
        let name = if locked { None } else { Some(lock_name()?) };
        if !nft::has_owners(socket)? {
            let protection = if locked { Protection::Lock } else { Protection::Name };
            return Ok(Self { protection, table_flags: 0, _name: name, asks: Some(false) });
        }
        for family in TableFamily::BOTH {
            match nft::flags_and_owner(socket, family)? {
                None => {}
                Some((flags, _)) if flags & nft::LASTING == 0 => {
                    let error = KernelError::refused("own the nf_tables table", errno::EOPNOTSUPP);
                    return Err(error.with_remedy(PLAIN_TABLE));
                }
                Some((_, Some(owner))) => {
                    let error = KernelError::refused("own the nf_tables table", errno::EPERM);
                    return Err(error.with_holder(owner));
                }
                Some((_, None)) => nft::adopt(socket, family, nft::LASTING)?,
            }
        }
        let (protection, table_flags) = (Protection::Kernel, nft::LASTING);
        Ok(Self { protection, table_flags, _name: name, asks: Some(false) })
    }

    /// Refuses changes while another datapath holds the lock.
    ///
    /// On kernels where the table itself has an owner there is no lock to check: a change of one
    /// element must not wait for a reply that is known beforehand.
    pub(super) fn may_change(&mut self, socket: &mut Socket) -> Result<(), KernelError> {
        let asks = match self.asks {
            Some(asks) => asks,
            None => *self.asks.insert(match nft::has_owners(socket) {
                // A kernel without nf_tables has no lock table.
                Err(error) if nft::is_absent(&error) => false,
                has => !has?,
            }),
        };
        if !asks {
            return Ok(());
        }
        match nft::locked_by(socket)? {
            None => Ok(()),
            Some(holder) => {
                let error = KernelError::refused("change what is locked", errno::EPERM);
                Err(error.with_holder(holder))
            }
        }
    }
}

/// Takes the lock of kernels without table owners.
fn lock_name() -> Result<UnixListener, KernelError> {
    let address = SocketAddr::from_abstract_name(NAME);
    let name = address.and_then(|address| UnixListener::bind_addr(&address));
    name.map_err(|error| {
        let error = KernelError::io("lock the datapath of this network namespace", &error);
        error.with_remedy("`ss -xlp` shows the process that has the name @egress-datapath")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::{Datapath, Known};
    use crate::diff::changes::Changes;
    use crate::kernel::KernelDatapath;
    use crate::kernel::nft::tests::netns::{in_netns, nft};
    use crate::state::{Firewall, State};

    fn exclusive() -> Result<KernelDatapath, KernelError> {
        KernelDatapath::open_as(Ownership::Exclusive)
    }

    fn with_table() -> State {
        State { firewall: Some(Firewall::default()), ..State::default() }
    }

    /// Skips a test that needs enforcement by the kernel.
    fn needs_owners(datapath: &KernelDatapath) {
        let by_kernel = datapath.protection() == Protection::Kernel;
        harness::needs_kernel("owners of tables that stay (Linux 6.9)", by_kernel);
    }

    fn create(datapath: &mut KernelDatapath) {
        datapath.apply(&Changes::between(&State::default(), &with_table())).unwrap();
    }

    #[test]
    fn a_second_one_is_refused_and_told_who_has_it() {
        in_netns(|_| {
            let first = exclusive().unwrap();
            let error = exclusive().unwrap_err();
            assert_eq!(error.holder(), Some(std::process::id()));
            assert!(error.to_string().contains("process"), "{error}");
            KernelDatapath::open().unwrap();
            drop(first);
            exclusive().unwrap();
        });
    }

    #[test]
    fn who_shares_changes_nothing_while_another_has_the_lock() {
        in_netns(|socket| {
            let mut shared = KernelDatapath::open().unwrap();
            assert_eq!(shared.protection(), Protection::None);
            // Simulates a kernel whose tables do not persist without their owner.
            shared.hold.asks = Some(true);
            let locked = nft::lock(socket).unwrap();
            harness::needs_kernel("owners of tables (Linux 5.12)", locked);
            let change = Changes::between(&State::default(), &with_table());
            for _ in 0..2 {
                let error = shared.apply(&change).unwrap_err();
                assert_eq!((error.applied, error.skipped), (0, change.len() - 1));
                let (_, error) = error.refused.first().unwrap();
                assert!(error.is_denied() && error.remedy().is_some(), "{error}");
                assert_eq!(error.holder(), Some(std::process::id()));
                assert!(shared.read(Known::Nothing).unwrap().is_empty());
                shared.apply(&Changes::default()).unwrap();
                // No other program can take the lock away.
                assert!(nft::lock(&mut nft::open().unwrap()).is_err());
                nft(&["flush", "ruleset"], "").unwrap();
            }
            *socket = nft::open().unwrap();
            shared.apply(&change).unwrap();
            assert_eq!(shared.read(Known::Nothing).unwrap().firewall, with_table().firewall);
        });
    }

    #[test]
    fn the_table_outlives_its_owner_and_the_next_one_takes_it_over() {
        in_netns(|_| {
            for _ in 0..3 {
                let mut datapath = exclusive().unwrap();
                assert!(datapath.protection() >= Protection::Lock);
                if datapath.read(Known::Nothing).unwrap().firewall.is_none() {
                    create(&mut datapath);
                }
                let mut other = KernelDatapath::open().unwrap();
                let away = Changes::between(&with_table(), &State::default());
                let error = other.apply(&away).unwrap_err();
                let (_, error) = error.refused.first().unwrap();
                assert!(error.is_denied() && error.holder().is_some(), "{error}");
                drop(datapath);
                let left = KernelDatapath::open().unwrap().read(Known::Nothing).unwrap();
                assert_eq!(left.firewall, with_table().firewall);
            }
            let mut datapath = exclusive().unwrap();
            datapath.apply(&Changes::between(&with_table(), &State::default())).unwrap();
            assert!(datapath.read(Known::Nothing).unwrap().is_empty());
        });
    }

    #[test]
    fn nobody_else_can_flush_it() {
        in_netns(|_| {
            let mut datapath = exclusive().unwrap();
            needs_owners(&datapath);
            create(&mut datapath);
            nft(&["flush", "ruleset"], "").unwrap();
            let delete = ["delete", "table", "inet", "egress_datapath"];
            assert!(nft(&delete, "").unwrap_err().contains("Operation not permitted"));
            assert_eq!(datapath.read(Known::Nothing).unwrap().firewall, with_table().firewall);
        });
    }

    #[test]
    fn name_of_another_process_refused_only_where_it_is_the_lock() {
        in_netns(|_| {
            let theirs = lock_name().unwrap();
            let error = lock_name().unwrap_err();
            assert_eq!(error.errno(), Some(libc::EADDRINUSE));
            assert!(error.to_string().contains("`ss -xlp` shows the process"), "{error}");
            let datapath = exclusive().unwrap();
            assert!(datapath.protection() >= Protection::Lock);
            drop(theirs);
            lock_name().unwrap();
        });
    }

    #[test]
    fn a_table_that_was_shared_cannot_be_owned() {
        in_netns(|_| {
            needs_owners(&exclusive().unwrap());
            create(&mut KernelDatapath::open().unwrap());
            let error = exclusive().unwrap_err();
            assert_eq!(error.remedy(), Some(PLAIN_TABLE));
        });
    }
}
