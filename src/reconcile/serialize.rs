//! Reports and errors as JSON, for logs and for status fields.

use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};

use super::{Durations, Error, Report};
use crate::diff::changes::Changes;
use crate::error::KernelError;
use crate::plan::{Finding, NodeError, PolicyError};
use crate::types::{Family, NodeName, PolicyId};

impl Serialize for Changes {
    /// The commands of the operations, in order.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.ops().map(ToString::to_string))
    }
}

impl Serialize for Finding {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        /// A finding, with its subject where there is one.
        #[derive(Default, Serialize)]
        struct Form<'a> {
            code: &'static str,
            message: String,
            #[serde(skip_serializing_if = "Option::is_none")]
            policy: Option<&'a PolicyId>,
            #[serde(skip_serializing_if = "Option::is_none")]
            node: Option<&'a NodeName>,
            #[serde(skip_serializing_if = "Option::is_none")]
            family: Option<Family>,
            #[serde(skip_serializing_if = "Option::is_none")]
            reason: Option<&'static str>,
            #[serde(skip_serializing_if = "Vec::is_empty")]
            errors: Vec<Told>,
        }

        /// An error of a policy or node.
        #[derive(Serialize)]
        struct Told {
            code: &'static str,
            message: String,
        }

        let mut form = Form { code: self.code(), message: self.to_string(), ..Form::default() };
        match self {
            Self::InvalidPolicy { policy, errors, .. } => {
                let told =
                    |error: &PolicyError| Told { code: error.code(), message: error.to_string() };
                form.policy = Some(policy);
                form.errors.extend(errors.iter().map(told));
            }
            Self::InvalidNode { node, errors } => {
                let told =
                    |error: &NodeError| Told { code: error.code(), message: error.to_string() };
                form.node = Some(node);
                form.errors.extend(errors.iter().map(told));
            }
            Self::Denied { policy, family, reason } | Self::Bypassed { policy, family, reason } => {
                form.policy = Some(policy);
                form.family = Some(*family);
                form.reason = Some(reason.code());
            }
            Self::Overlap { family, .. } | Self::FamilyUnavailable { family } => {
                form.family = Some(*family);
            }
            _ => {}
        }
        form.serialize(serializer)
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Report", 4)?;
        fields.serialize_field("settled", &self.settled)?;
        fields.serialize_field("findings", &self.findings)?;
        fields.serialize_field("changes", &self.changes)?;
        fields.serialize_field("durations", &self.durations)?;
        fields.end()
    }
}

impl Serialize for Durations {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Durations", 4)?;
        fields.serialize_field("total", &self.total.as_secs_f64())?;
        fields.serialize_field("observe", &self.observe.as_secs_f64())?;
        fields.serialize_field("apply", &self.apply.as_secs_f64())?;
        fields.serialize_field("connections", &self.connections.as_secs_f64())?;
        fields.end()
    }
}

impl Serialize for KernelError {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("KernelError", 4)?;
        fields.serialize_field("message", &self.to_string())?;
        fields.serialize_field("request", self.request())?;
        fields.serialize_field("errno", &self.errno())?;
        fields.serialize_field("remedy", &self.remedy())?;
        fields.end()
    }
}

impl Serialize for Error {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        /// An operation that the kernel refused.
        #[derive(Serialize)]
        struct Refused<'a> {
            operation: String,
            error: &'a KernelError,
        }

        let (kernel, apply) = match self {
            Self::Observe(error) => (Some(error), None),
            Self::Apply(error) => (None, Some(error)),
            Self::Plan(_) | Self::NothingWanted => (None, None),
        };
        let refused = apply.into_iter().flat_map(|error| &error.refused);
        let refused: Vec<_> =
            refused.map(|(op, error)| Refused { operation: op.to_string(), error }).collect();
        let mut fields = serializer.serialize_struct("Error", 6)?;
        fields.serialize_field("code", self.code())?;
        fields.serialize_field("message", &self.to_string())?;
        fields.serialize_field("kernel", &kernel)?;
        fields.serialize_field("applied", &apply.map(|error| error.applied))?;
        fields.serialize_field("skipped", &apply.map(|error| error.skipped))?;
        fields.serialize_field("refused", &refused)?;
        fields.end()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json, to_value};

    use crate::{
        Cluster, EgressIp, EgressPolicy, Error, KernelError, Node, NodeName, PolicyId, Reconciler,
        Sim,
    };

    fn reconciler() -> (Reconciler<Sim>, Cluster, EgressPolicy) {
        let name = NodeName::new("a").unwrap();
        let node = Node::new(
            name.clone(),
            vec![[192, 0, 2, 1].into()],
            vec!["172.31.0.1/16".parse().unwrap()],
        );
        let cluster = Cluster::new(name, vec![node], vec!["10.0.0.0/8".parse().unwrap()]);
        let source = vec!["10.0.0.1/32".parse().unwrap()];
        let eip = EgressIp::V4([198, 51, 100, 1].into());
        let policy = EgressPolicy::new(PolicyId::new("p").unwrap(), source, eip);
        (Reconciler::new(Sim::new()), cluster, policy)
    }

    #[test]
    fn report_has_findings_with_codes_and_commands() {
        let (mut egress, cluster, policy) = reconciler();
        let report = to_value(egress.reconcile(&cluster, [policy]).unwrap()).unwrap();
        assert_eq!(report["settled"], true);
        assert_eq!(
            report["findings"],
            json!([{
                "code": "policy_denied",
                "message": "policy p drops its IPv4 traffic: it has no gateway",
                "policy": "p", "family": "V4", "reason": "no_gateway",
            }])
        );
        let commands = report["changes"].as_array().unwrap();
        assert!(commands.iter().any(|one| one.as_str().unwrap().starts_with("nft ")), "{report}");
    }

    #[test]
    fn finding_about_errors_has_its_subject_and_each_error() {
        let (mut egress, mut cluster, mut policy) = reconciler();
        let gateway = NodeName::new("b").unwrap();
        cluster.nodes.push(Node::new(gateway.clone(), vec![[192, 0, 2, 2].into()], Vec::new()));
        policy.gateway = Some(gateway);
        policy.sources.clear();
        let report = to_value(egress.reconcile(&cluster, [policy]).unwrap()).unwrap();
        let none = "it has no tunnel address";
        let empty = "sources are empty: the policy selects nothing";
        let left_out = "gateway b is left out of the cluster's nodes";
        assert_eq!(
            report["findings"],
            json!([
                {
                    "code": "no_tunnel", "message": format!("node b is left out: {none}"),
                    "node": "b", "errors": [{"code": "no_tunnel", "message": none}],
                },
                {
                    "code": "no_sources",
                    "message": format!("policy p drops its traffic: {empty}; {left_out}"),
                    "policy": "p",
                    "errors": [
                        {"code": "no_sources", "message": empty},
                        {"code": "gateway_left_out", "message": left_out},
                    ],
                },
            ])
        );
    }

    #[test]
    fn error_has_code_and_refused_operations() {
        let (mut egress, cluster, policy) = reconciler();
        egress.datapath().refuse(0, 12);
        let error = egress.reconcile(&cluster, [&policy]).unwrap_err();
        let json = to_value(&error).unwrap();
        assert_eq!((&json["code"], &json["applied"]), (&json!("apply_refused"), &json!(0)));
        assert_eq!(json["refused"][0]["error"]["errno"], 12, "{json}");
        assert!(json["refused"][0]["operation"].is_string(), "{json}");

        let other = Cluster { node: NodeName::new("z").unwrap(), ..cluster };
        let unknown = egress.reconcile(&other, [&policy]).unwrap_err();
        assert_eq!(to_value(&unknown).unwrap()["code"], "unknown_node");

        let error = Error::Observe(KernelError::refused("ip link show", 1));
        let json = to_value(&error).unwrap();
        assert_eq!(
            (&json["code"], &json["kernel"]["errno"]),
            (&json!("observe_failed"), &json!(1))
        );
        assert_eq!(json["refused"], Value::Array(Vec::new()));
    }
}
