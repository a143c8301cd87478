//! The text that Prometheus reads (exposition format 0.0.4), as the library writes it that kube-proxy has its metrics from.
//!
//! Not OpenMetrics: the family of a counter has no `_total` there, so that dashboards that ask for a metric's type or its help find
//! another name, and no gauge may end in it, as one of kube-proxy's does.

use std::fmt::{Display, Write as _};

use crate::status::Histogram;

pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Families in the order in which they are written; one without samples is left out.
#[derive(Default)]
pub(super) struct Exposition(String);

impl Exposition {
    pub(super) fn finish(self) -> String {
        self.0
    }

    pub(super) fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.counters(name, help, [([], value)]);
    }

    pub(super) fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.gauges(name, help, [([], value)]);
    }

    /// `name` ends in `_total`.
    pub(super) fn counters<'l, L: AsRef<[(&'l str, &'l str)]>, V: Display>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, V)>,
    ) {
        self.samples(name, "counter", help, samples);
    }

    pub(super) fn gauges<'l, L: AsRef<[(&'l str, &'l str)]>, V: Display>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, V)>,
    ) {
        self.samples(name, "gauge", help, samples);
    }

    fn samples<'l, L: AsRef<[(&'l str, &'l str)]>, V: Display>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, V)>,
    ) {
        for (number, (labels, value)) in samples.into_iter().enumerate() {
            if number == 0 {
                self.describe(name, kind, help);
            }
            self.sample(name, "", labels.as_ref(), None, value);
        }
    }

    pub(super) fn histograms<'l, 'h, L: AsRef<[(&'l str, &'l str)]>>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, &'h Histogram)>,
    ) {
        for (number, (labels, values)) in samples.into_iter().enumerate() {
            if number == 0 {
                self.describe(name, "histogram", help);
            }
            let labels = labels.as_ref();
            let mut below = 0;
            for (bound, count) in values.buckets() {
                below += count;
                let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_owned() };
                self.sample(name, "_bucket", labels, Some(&bound), below);
            }
            self.sample(name, "_sum", labels, None, values.sum());
            self.sample(name, "_count", labels, None, values.count());
        }
    }

    // Writing to a string cannot fail, here and below.
    fn describe(&mut self, name: &str, kind: &str, help: &str) {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, suffix: &str, labels: &[(&str, &str)], le: Option<&str>, value: impl Display) {
        let _ = write!(self.0, "{name}{suffix}");
        let labels = labels.iter().copied().chain(le.map(|le| ("le", le)));
        let mut before = '{';
        for (label, text) in labels {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{before}{label}=\"{text}\"");
            before = ',';
        }
        let end = if before == ',' { "} " } else { " " };
        let _ = writeln!(self.0, "{end}{value}");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn text_as_the_format_has_it() {
        let mut to = Exposition::default();
        to.counter("a_total", "One \\ line\nand another", 3);
        to.gauge("b", "Now", 0.25);
        to.gauges(
            "c_total",
            "By name",
            [([("name", "a\"b\\c\nd"), ("more", "")], 1.0), ([("name", "e"), ("more", "f")], 2e9)],
        );
        to.counters("nothing_total", "Never seen", [([("name", "a")], 1)].into_iter().take(0));
        static BOUNDS: [f64; 2] = [0.001, 16.0];
        let mut histogram = Histogram::new(&BOUNDS);
        for seconds in [1, 2, 60] {
            histogram.observe(Duration::from_secs(seconds));
        }
        to.histograms("d_seconds", "How long", [([("ip_family", "IPv4")], &histogram)]);
        let expected = r#"# HELP a_total One \\ line\nand another
# TYPE a_total counter
a_total 3
# HELP b Now
# TYPE b gauge
b 0.25
# HELP c_total By name
# TYPE c_total gauge
c_total{name="a\"b\\c\nd",more=""} 1
c_total{name="e",more="f"} 2000000000
# HELP d_seconds How long
# TYPE d_seconds histogram
d_seconds_bucket{ip_family="IPv4",le="0.001"} 0
d_seconds_bucket{ip_family="IPv4",le="16"} 2
d_seconds_bucket{ip_family="IPv4",le="+Inf"} 3
d_seconds_sum{ip_family="IPv4"} 63
d_seconds_count{ip_family="IPv4"} 3
"#;
        assert_eq!(to.finish(), expected);
    }
}
