//! API objects as far as the agent reads them.
//!
//! Own types in place of k8s-openapi's: a page of a thousand EndpointSlices is held while it is read, and managed fields, target
//! references and foreign annotations would make up most of it. Fields are kept as written (numbers out of range,
//! words nobody knows), so that one bad value is a remark on its object and not the end of a whole list; `convert` judges.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor},
};

/// A Service with this label is another proxy's, whatever its value (contract A1).
pub(super) const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// An EndpointSlice with this label belongs to a headless Service, whatever its value (contract A2).
pub(super) const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// The Service an EndpointSlice belongs to (contract A17).
pub(super) const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// The zone of a Node (contract A37).
pub(super) const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// When a change of pods or Service made the slice change (contract A28).
pub(super) const TRIGGER_TIME_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// On the Pod that stands in the API server for one that the kubelet reads from a file: the uid by which the kubelet knows that.
pub(super) const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

/// On a Node that the autoscaler is about to remove (contract A117).
pub(super) const LEAVING_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// Labels and annotations that are kept; every other one is skipped while reading.
const KEPT: [&str; 9] = [
    PROXY_NAME_LABEL,
    HEADLESS_LABEL,
    SERVICE_NAME_LABEL,
    ZONE_LABEL,
    TRIGGER_TIME_ANNOTATION,
    super::ALGORITHM_ANNOTATION,
    super::RESET_DELETED_ANNOTATION,
    super::SOCKET_LB_ANNOTATION,
    MIRROR_ANNOTATION,
];

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Metadata {
    #[serde(deserialize_with = "or_default")]
    pub(super) namespace: String,
    #[serde(deserialize_with = "or_default")]
    pub(super) name: String,
    #[serde(deserialize_with = "or_default")]
    pub(super) uid: String,
    #[serde(deserialize_with = "or_default")]
    pub(super) resource_version: String,
    pub(super) creation_timestamp: Option<String>,
    pub(super) deletion_timestamp: Option<String>,
    #[serde(deserialize_with = "kept")]
    pub(super) labels: BTreeMap<&'static str, String>,
    #[serde(deserialize_with = "kept")]
    pub(super) annotations: BTreeMap<&'static str, String>,
}

/// A number as written: what is none, or does not fit, is kept as text for the remark on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Number {
    Integer(i64),
    Other(String),
}

impl Number {
    /// A port number, and not 0.
    pub(super) fn port(&self) -> Option<crate::model::Port> {
        match self {
            Self::Integer(number) => u16::try_from(*number).ok().and_then(crate::model::Port::new),
            Self::Other(_) => None,
        }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(number) => write!(f, "{number}"),
            Self::Other(text) => write!(f, "{text:?}"),
        }
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AsWritten;
        impl Visitor<'_> for AsWritten {
            type Value = Number;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number")
            }

            fn visit_i64<E>(self, number: i64) -> Result<Number, E> {
                Ok(Number::Integer(number))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Number, E> {
                Ok(i64::try_from(number).map_or_else(|_| Number::Other(number.to_string()), Number::Integer))
            }

            fn visit_f64<E>(self, number: f64) -> Result<Number, E> {
                Ok(Number::Other(number.to_string()))
            }

            fn visit_str<E>(self, text: &str) -> Result<Number, E> {
                Ok(Number::Other(text.to_owned()))
            }
        }
        deserializer.deserialize_any(AsWritten)
    }
}

/// `null` reads as the default, as the API server has it.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Reads a map of strings, keeping [`KEPT`] keys alone.
fn kept<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<&'static str, String>, D::Error> {
    struct Key;
    impl<'de> DeserializeSeed<'de> for Key {
        type Value = Option<&'static str>;

        fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
            deserializer.deserialize_str(self)
        }
    }
    impl Visitor<'_> for Key {
        type Value = Option<&'static str>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string")
        }

        fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
            Ok(KEPT.into_iter().find(|key| *key == text))
        }
    }

    struct Map;
    impl<'de> Visitor<'de> for Map {
        type Value = BTreeMap<&'static str, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of strings")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(BTreeMap::new())
        }

        fn visit_none<E>(self) -> Result<Self::Value, E> {
            Ok(BTreeMap::new())
        }

        fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
            deserializer.deserialize_map(self)
        }

        fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some(key) = access.next_key_seed(Key)? {
                match key {
                    Some(key) => {
                        map.insert(key, access.next_value::<Option<String>>()?.unwrap_or_default());
                    }
                    None => {
                        access.next_value::<IgnoredAny>()?;
                    }
                }
            }
            Ok(map)
        }
    }
    deserializer.deserialize_option(Map)
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(default)]
pub(super) struct Service {
    #[serde(deserialize_with = "or_default")]
    pub(super) metadata: Metadata,
    #[serde(deserialize_with = "or_default")]
    pub(super) spec: ServiceSpec,
    #[serde(deserialize_with = "or_default")]
    pub(super) status: ServiceStatus,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ServiceSpec {
    pub(super) r#type: Option<String>,
    #[serde(rename = "clusterIP", deserialize_with = "or_default")]
    pub(super) cluster_ip: String,
    #[serde(rename = "clusterIPs", deserialize_with = "or_default")]
    pub(super) cluster_ips: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(super) ip_families: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(super) ports: Vec<ServicePort>,
    pub(super) internal_traffic_policy: Option<String>,
    pub(super) external_traffic_policy: Option<String>,
    #[serde(rename = "externalIPs", deserialize_with = "or_default")]
    pub(super) external_ips: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(super) load_balancer_source_ranges: Vec<String>,
    pub(super) session_affinity: Option<String>,
    pub(super) session_affinity_config: Option<SessionAffinityConfig>,
    pub(super) health_check_node_port: Option<Number>,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct SessionAffinityConfig {
    #[serde(rename = "clientIP")]
    pub(super) client_ip: Option<ClientIpConfig>,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ClientIpConfig {
    pub(super) timeout_seconds: Option<Number>,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ServicePort {
    #[serde(deserialize_with = "or_default")]
    pub(super) name: String,
    pub(super) protocol: Option<String>,
    pub(super) port: Option<Number>,
    pub(super) node_port: Option<Number>,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ServiceStatus {
    #[serde(deserialize_with = "or_default")]
    pub(super) load_balancer: LoadBalancerStatus,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(default)]
pub(super) struct LoadBalancerStatus {
    #[serde(deserialize_with = "or_default")]
    pub(super) ingress: Vec<LoadBalancerIngress>,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct LoadBalancerIngress {
    #[serde(deserialize_with = "or_default")]
    pub(super) ip: String,
    pub(super) ip_mode: Option<String>,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct EndpointSlice {
    #[serde(deserialize_with = "or_default")]
    pub(super) metadata: Metadata,
    #[serde(deserialize_with = "or_default")]
    pub(super) address_type: String,
    #[serde(deserialize_with = "or_default")]
    pub(super) endpoints: Vec<Endpoint>,
    #[serde(deserialize_with = "or_default")]
    pub(super) ports: Vec<EndpointPort>,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Endpoint {
    #[serde(deserialize_with = "or_default")]
    pub(super) addresses: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(super) conditions: Conditions,
    pub(super) node_name: Option<String>,
    pub(super) hints: Option<Hints>,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(default)]
pub(super) struct Conditions {
    pub(super) ready: Option<bool>,
    pub(super) serving: Option<bool>,
    pub(super) terminating: Option<bool>,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Hints {
    #[serde(deserialize_with = "or_default")]
    pub(super) for_zones: Vec<Hint>,
    #[serde(deserialize_with = "or_default")]
    pub(super) for_nodes: Vec<Hint>,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(default)]
pub(super) struct Hint {
    #[serde(deserialize_with = "or_default")]
    pub(super) name: String,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(default)]
pub(super) struct EndpointPort {
    pub(super) name: Option<String>,
    pub(super) protocol: Option<String>,
    pub(super) port: Option<Number>,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(default)]
pub(super) struct Node {
    #[serde(deserialize_with = "or_default")]
    pub(super) metadata: Metadata,
    #[serde(deserialize_with = "or_default")]
    pub(super) spec: NodeSpec,
    #[serde(deserialize_with = "or_default")]
    pub(super) status: NodeStatus,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(default)]
pub(super) struct NodeSpec {
    #[serde(rename = "podCIDR", deserialize_with = "or_default")]
    pub(super) pod_cidr: String,
    #[serde(rename = "podCIDRs", deserialize_with = "or_default")]
    pub(super) pod_cidrs: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(super) taints: Vec<Taint>,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(default)]
pub(super) struct Taint {
    #[serde(deserialize_with = "or_default")]
    pub(super) key: String,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(default)]
pub(super) struct NodeStatus {
    #[serde(deserialize_with = "or_default")]
    pub(super) addresses: Vec<NodeAddress>,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(default)]
pub(super) struct NodeAddress {
    #[serde(deserialize_with = "or_default")]
    pub(super) r#type: String,
    #[serde(deserialize_with = "or_default")]
    pub(super) address: String,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(default)]
pub(super) struct Pod {
    #[serde(deserialize_with = "or_default")]
    pub(super) metadata: Metadata,
    #[serde(deserialize_with = "or_default")]
    pub(super) spec: PodSpec,
    #[serde(deserialize_with = "or_default")]
    pub(super) status: PodStatus,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct PodSpec {
    #[serde(deserialize_with = "or_default")]
    pub(super) node_name: String,
    #[serde(deserialize_with = "or_default")]
    pub(super) host_network: bool,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(default)]
pub(super) struct PodStatus {
    #[serde(deserialize_with = "or_default")]
    pub(super) phase: String,
}

#[derive(Clone, Deserialize, Debug, Default)]
#[serde(default)]
pub(super) struct Namespace {
    #[serde(deserialize_with = "or_default")]
    pub(super) metadata: Metadata,
}
