//! Which rows: by namespace, Service or VIP.

use std::net::IpAddr;

use clap::Args;

#[derive(Clone, Debug, Default, Args)]
pub struct Filter {
    /// Only Services of this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// Only this Service
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = service)]
    pub service: Option<String>,
    /// Only what is addressed to this VIP
    #[arg(long, value_name = "ADDRESS")]
    pub vip: Option<IpAddr>,
}

pub(super) fn service(text: &str) -> Result<String, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => Ok(text.into()),
        _ => Err("write it as NAMESPACE/NAME".into()),
    }
}

impl Filter {
    pub fn is_empty(&self) -> bool {
        let Self { namespace, service, vip } = self;
        namespace.is_none() && service.is_none() && vip.is_none()
    }

    /// `service` as the datapath names it: `namespace/name` or `namespace/name:port`. A row without a VIP passes no `--vip`.
    pub fn admits(&self, service: &str, vips: &[IpAddr]) -> bool {
        let Self { namespace, service: wanted, vip: wanted_vip } = self;
        let name = ServiceName::parse(service);
        namespace.as_deref().is_none_or(|namespace| name.namespace == namespace)
            && wanted.as_deref().is_none_or(|wanted| service == wanted || wanted == name.service())
            && wanted_vip.is_none_or(|wanted| vips.contains(&wanted))
    }
}

/// The parts of `namespace/name:port`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServiceName<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    /// Empty for an unnamed port.
    pub port: &'a str,
    whole: &'a str,
}

impl<'a> ServiceName<'a> {
    pub fn parse(whole: &'a str) -> Self {
        let (namespace, rest) = whole.split_once('/').unwrap_or(("", whole));
        let (name, port) = rest.split_once(':').unwrap_or((rest, ""));
        Self { namespace, name, port, whole }
    }

    fn service(&self) -> &'a str {
        self.whole.split_once(':').map_or(self.whole, |(service, _)| service)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_narrow() {
        let [other, vip]: [IpAddr; 2] = ["10.96.0.2", "10.96.0.1"].map(|text| text.parse().unwrap());
        let all = Filter::default();
        assert!(all.is_empty() && all.admits("default/web:http", &[]));
        let namespace = Filter { namespace: Some("default".into()), ..all.clone() };
        assert!(namespace.admits("default/web:http", &[]) && !namespace.admits("kube-system/dns:dns", &[]));
        let service = Filter { service: Some("default/web".into()), ..all.clone() };
        assert!(service.admits("default/web:http", &[]) && service.admits("default/web", &[]));
        assert!(!service.admits("default/web2:http", &[]));
        let one_port = Filter { service: Some("default/web:http".into()), ..all.clone() };
        assert!(one_port.admits("default/web:http", &[]) && !one_port.admits("default/web:https", &[]));
        let by_vip = Filter { vip: Some(vip), ..all };
        assert!(
            by_vip.admits("default/web", &[other, vip])
                && !by_vip.admits("default/web", &[])
                && !by_vip.admits("default/web", &[other])
        );
    }

    #[test]
    fn a_service_needs_a_namespace() {
        assert!(service("default/web").is_ok());
        for bad in ["web", "/web", "default/", "a/b/c"] {
            assert!(service(bad).is_err(), "{bad}");
        }
    }
}
