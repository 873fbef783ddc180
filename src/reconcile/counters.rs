//! Reads the counters of policies and of dropped packets.

use std::collections::BTreeMap;

use super::{Error, Reconciler};
use crate::alloc::{MarkAllocator, TableAllocator};
use crate::count::{Count, PolicyCount};
use crate::datapath::Datapath;

impl<D: Datapath, M: MarkAllocator, T: TableAllocator> Reconciler<D, M, T> {
    /// Returns the packets and bytes that this node counted for each wanted policy.
    ///
    /// The result is in the order of the policy ids, with one entry for each family that a policy
    /// has sources of. It is empty without
    /// [`Cluster::policy_counters`](crate::Cluster::policy_counters), whose documentation says what
    /// is counted, and before the first [`reconcile`](Self::reconcile). A policy whose counter
    /// another program deleted has no entry until the counter is restored. Nothing is changed, and
    /// no counter is reset to zero.
    ///
    /// ```
    /// # use egress_datapath::explain::Packet;
    /// # use egress_datapath::{Cluster, Count, EgressIp, EgressPolicy, Node, NodeName, PolicyId};
    /// # use egress_datapath::{Reconciler, Sim};
    /// # let node = |name, underlay: &str, tunnel: &str| -> Result<Node, Box<dyn std::error::Error>> {
    /// #     Ok(Node::new(NodeName::new(name)?, vec![underlay.parse()?], vec![tunnel.parse()?]))
    /// # };
    /// # let mut cluster = Cluster::new(
    /// #     NodeName::new("a")?,
    /// #     vec![node("a", "10.10.0.11", "172.31.0.11/16")?, node("b", "10.10.0.12", "172.31.0.12/16")?],
    /// #     vec!["10.244.0.0/16".parse()?],
    /// # );
    /// # let eip = EgressIp::V4("198.51.100.200".parse()?);
    /// # let id = PolicyId::new("default/p1")?;
    /// # let policy = EgressPolicy::new(id.clone(), vec!["10.244.1.10/32".parse()?], eip);
    /// # let mut egress = Reconciler::new(Sim::new());
    /// cluster.policy_counters = true;
    /// egress.reconcile(&cluster, [&policy])?;
    /// # egress.datapath().send(Packet::udp("10.244.1.10".parse()?, 7, "192.0.2.1".parse()?, 53));
    ///
    /// for counted in egress.counters()? {
    ///     let Count { packets, bytes } = counted.count;
    ///     println!("{} {}: {packets} packets, {bytes} bytes", counted.policy, counted.family);
    /// #   assert_eq!((packets, bytes), (1, 28));
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Observe`].
    pub fn counters(&mut self) -> Result<Vec<PolicyCount>, Error> {
        let Some(index) = self.index.as_ref().filter(|index| index.cluster().policy_counters)
        else {
            return Ok(Vec::new());
        };
        let counts = self.datapath.counters().map_err(Error::Observe)?;
        let found = index.counted().into_iter().filter_map(|(policy, family, tag)| {
            let count = *counts.policies.get(&(family, tag))?;
            Some(PolicyCount { policy: policy.clone(), family, count })
        });
        Ok(found.collect())
    }

    /// Returns the packets that rules of this crate dropped on this node, by the name of the chain.
    ///
    /// `nft list chain inet egress_datapath NAME` prints the rules with a counter each. A counter
    /// starts at zero when the rules of its chain are replaced. Packets of closed policies are not
    /// among them, because an element of a map drops these: [`counters`](Self::counters) has them.
    /// The result is empty with iptables as backend.
    ///
    /// # Errors
    ///
    /// [`Error::Observe`].
    pub fn drops(&mut self) -> Result<BTreeMap<String, Count>, Error> {
        Ok(self.datapath.counters().map_err(Error::Observe)?.drops)
    }
}
