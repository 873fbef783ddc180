//! Exclusive or shared ownership of the nf_tables table.

use std::fs;
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
    /// This is the only protection on Linux before 5.12.
    Name,
    /// Name and lock; shared datapaths check the lock before they change anything.
    ///
    /// The lock is a table `egress_datapath_lock` that only its owner can change and that is
    /// removed with its owner (`NFT_TABLE_F_OWNER`). A shared datapath that is in the middle of its
    /// changes finishes them. Linux from 5.12 on.
    Lock,
    /// Table owner enforced by the kernel (`NFT_TABLE_F_PERSIST`).
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
    /// Names in the abstract socket namespace, which is part of the network namespace.
    ///
    /// The kernel frees the names with the process, however it ends.
    _names: Option<[UnixListener; 2]>,
    /// Set if this kernel may have a lock to check; `None` until that is known.
    asks: Option<bool>,
}

const LOCK: &str = "egress-datapath";
const HOLDER: &str = "egress-datapath/held-by/";

const PLAIN_TABLE: &str = "remove what a shared datapath made, then make it exclusive: the kernel \
                           gives a table that has no owner none later";

impl Hold {
    /// Takes ownership of this network namespace, and of the table if it exists.
    pub(super) fn take(ownership: Ownership, socket: &mut Socket) -> Result<Self, KernelError> {
        if ownership == Ownership::Shared {
            let protection = Protection::None;
            return Ok(Self { protection, table_flags: 0, _names: None, asks: None });
        }
        let names = Some(lock()?);
        if !nft::has_owners(socket)? {
            let locked = nft::lock(socket).map_err(|error| match nft::locked_by(socket) {
                Ok(Some(owner)) => error.with_holder(owner),
                _ => error,
            })?;
            let protection = if locked { Protection::Lock } else { Protection::Name };
            return Ok(Self { protection, table_flags: 0, _names: names, asks: Some(false) });
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
        Ok(Self { protection, table_flags, _names: names, asks: Some(false) })
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
            Some(owner) => {
                let error = KernelError::refused("change what is locked", errno::EPERM);
                Err(error.with_holder(holder().unwrap_or(owner)))
            }
        }
    }
}

/// Takes the lock, and publishes the process id of its holder as a socket name.
fn lock() -> Result<[UnixListener; 2], KernelError> {
    let bind = |name: &str| {
        let address = SocketAddr::from_abstract_name(name)?;
        UnixListener::bind_addr(&address)
    };
    let text = "lock the datapath of this network namespace";
    let lock = bind(LOCK).map_err(|error| {
        let error = KernelError::io(text, &error);
        match holder() {
            Some(holder) => error.with_holder(holder),
            None => error,
        }
    })?;
    let name = format!("{HOLDER}{}", std::process::id());
    let holder = bind(&name).map_err(|error| KernelError::io(text, &error))?;
    Ok([lock, holder])
}

/// Returns the process that holds the lock of the calling thread's network namespace.
pub(super) fn holder() -> Option<u32> {
    holder_in(&fs::read("/proc/thread-self/net/unix").ok()?)
}

/// Returns the process that holds the lock, according to the kernel's list of sockets.
///
/// The result is a hint: any program may put any bytes into that list as the name of a socket.
fn holder_in(list: &[u8]) -> Option<u32> {
    // The kernel writes the NUL that begins an abstract name as `@`.
    let name = |line: &str| line.split_once(" @")?.1.strip_prefix(HOLDER)?.parse().ok();
    String::from_utf8_lossy(list).lines().find_map(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::Datapath;
    use crate::diff::changes::Changes;
    use crate::kernel::nft::tests::netns::{in_netns, nft};
    use crate::kernel::{KernelDatapath, mutate};
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
                assert_eq!(error.holder(), Some(socket.port()));
                assert!(shared.read(None).unwrap().is_empty());
                shared.apply(&Changes::default()).unwrap();
                // No other program can take the lock away.
                assert!(nft::lock(&mut nft::open().unwrap()).is_err());
                nft(&["flush", "ruleset"], "").unwrap();
            }
            *socket = nft::open().unwrap();
            shared.apply(&change).unwrap();
            assert_eq!(shared.read(None).unwrap().firewall, with_table().firewall);
        });
    }

    #[test]
    fn the_table_outlives_its_owner_and_the_next_one_takes_it_over() {
        in_netns(|_| {
            for _ in 0..3 {
                let mut datapath = exclusive().unwrap();
                assert!(datapath.protection() >= Protection::Lock);
                if datapath.read(None).unwrap().firewall.is_none() {
                    create(&mut datapath);
                }
                let mut other = KernelDatapath::open().unwrap();
                let away = Changes::between(&with_table(), &State::default());
                let error = other.apply(&away).unwrap_err();
                let (_, error) = error.refused.first().unwrap();
                assert!(error.is_denied() && error.holder().is_some(), "{error}");
                drop(datapath);
                let left = KernelDatapath::open().unwrap().read(None).unwrap();
                assert_eq!(left.firewall, with_table().firewall);
            }
            let mut datapath = exclusive().unwrap();
            datapath.apply(&Changes::between(&with_table(), &State::default())).unwrap();
            assert!(datapath.read(None).unwrap().is_empty());
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
            assert_eq!(datapath.read(None).unwrap().firewall, with_table().firewall);
        });
    }

    const UNIX: &str = "Num       RefCount Protocol Flags    Type St Inode Path\n\
        000000002a0955dc: 00000003 00000000 00000000 0001 03  1057\n\
        000000009f106f6f: 00000002 00000000 00010000 0001 01 77 @egress-datapath\n\
        000000009f106f70: 00000002 00000000 00010000 0001 01 78 @egress-datapath/held-by/4711\n";

    #[test]
    fn names_that_others_give_their_sockets_hide_nobody() {
        let list = |name: &[u8]| {
            let line = b"0000000090c9924f: 00000002 00000000 00000000 0001 01 79 ";
            [&line[..], name, b"\n", UNIX.as_bytes()].concat()
        };
        for name in [
            &b"@\xff\nab c"[..],
            b"@egress-datapath/held-by/",
            b"@egress-datapath/held-by/-7",
            b"/run/egress-datapath/held-by/7",
        ] {
            assert_eq!(holder_in(&list(name)), Some(4711), "{}", name.escape_ascii());
        }
        assert_eq!(holder_in(b""), None);
    }

    #[test]
    fn mutated_lists_of_sockets() {
        let corpus = [UNIX.as_bytes().to_vec(), fs::read("/proc/self/net/unix").unwrap()];
        mutate::bytes("lists of sockets", 1, &corpus, mutate::Random::damaged, |list| {
            holder_in(list).map(|_| size_of::<u32>())
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
