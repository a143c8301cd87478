//! Logs go to stderr, as text or JSON; colours only to a terminal that wants them (`NO_COLOR`). What is logged can change while the agent runs.

use std::{
    fmt,
    io::{self, IsTerminal},
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use serde::{Serialize, Serializer};
use serde_json::Value;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter,
    filter::{LevelFilter, ParseError},
    fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, format::Writer},
    registry::LookupSpan,
};

use super::args::LogFormat;

/// Puts another filter in place of the one in force.
pub(super) type Reload = Arc<dyn Fn(&str) -> anyhow::Result<()> + Send + Sync>;

pub(super) fn start(format: LogFormat, filter: &str) -> anyhow::Result<Reload> {
    let filter = parse(filter)?;
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let colours = format == LogFormat::Text && io::stderr().is_terminal() && !no_color;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(colours);
    let (started, reload): (_, Reload) = match format {
        LogFormat::Text => {
            let builder = builder.with_filter_reloading();
            let handle = builder.reload_handle();
            (builder.try_init(), Arc::new(move |filter| Ok(handle.reload(parse(filter)?)?)))
        }
        LogFormat::Json => {
            let builder = builder.event_format(Json).with_filter_reloading();
            let handle = builder.reload_handle();
            (builder.try_init(), Arc::new(move |filter| Ok(handle.reload(parse(filter)?)?)))
        }
    };
    started.map_err(anyhow::Error::from_boxed).context("starting the log")?;
    Ok(reload)
}

fn parse(filter: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).parse(filter)
}

/// A filter as it is given, if it is one: found out with all other values, before anything is started or ended for it.
pub(super) fn checked(filter: &str) -> Result<String, ParseError> {
    parse(filter).map(|_| filter.to_owned())
}

/// Lines with the keys that Kubernetes' components give theirs, so that what reads those reads these.
struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let Fields { message, log_target, others } = fields;
        let (level, verbosity) = level(*metadata.level());
        let mut line = Line(Vec::new());
        line.put("ts", milliseconds());
        line.put("level", level);
        line.put("logger", log_target.as_deref().unwrap_or_else(|| metadata.target()));
        if let (Some(file), Some(number), None) = (metadata.file(), metadata.line(), &log_target) {
            line.put("caller", format!("{}:{number}", short(file)));
        }
        line.put("msg", message);
        if let Some(verbosity) = verbosity {
            line.put("v", verbosity);
        }
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            let extensions = span.extensions();
            let fields = extensions.get::<FormattedFields<N>>().map(|fields| fields.fields.as_str());
            line.put(span.name(), fields.unwrap_or_default());
        }
        others.into_iter().for_each(|(name, value)| line.put(name, value));
        let text = serde_json::to_string(&line).map_err(|_| fmt::Error)?;
        writeln!(writer, "{text}")
    }
}

/// Kubernetes has no word for a warning, and a number for all that is no error: the one from which on `-v` shows it.
const fn level(level: Level) -> (&'static str, Option<u32>) {
    match level {
        Level::ERROR => ("error", None),
        Level::WARN => ("warn", Some(0)),
        Level::INFO => ("info", Some(0)),
        Level::DEBUG => ("debug", Some(4)),
        Level::TRACE => ("trace", Some(6)),
    }
}

/// Since 1970.
fn milliseconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1000.0
}

/// The file, and the directory that it is in.
fn short(file: &str) -> String {
    let path = Path::new(file);
    let mut parts: Vec<_> = path.iter().rev().take(2).map(|part| part.to_string_lossy()).collect();
    parts.reverse();
    parts.join("/")
}

/// Keys in the order in which they come; each once.
struct Line(Vec<(String, Value)>);

impl Line {
    fn put(&mut self, key: &str, value: impl Into<Value>) {
        let mut key = key.to_owned();
        while self.0.iter().any(|(known, _)| *known == key) {
            key.push('_');
        }
        self.0.push((key, value.into()));
    }
}

impl Serialize for Line {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    /// Whose line it is, of a library that knows another way to log, whose place is not known then.
    log_target: Option<String>,
    others: Vec<(&'static str, Value)>,
}

impl Fields {
    fn take(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            ("log.target", Value::String(text)) => self.log_target = Some(text),
            (name, _) if name.starts_with("log.") => {}
            ("error", value) => self.others.push(("err", value)),
            (name, value) => self.others.push((name.strip_prefix("r#").unwrap_or(name), value)),
        }
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.take(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.take(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.take(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.take(field, value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field, value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.take(field, format!("{value:?}").into());
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, sync::Mutex};

    use tracing::{debug, error, info, info_span, trace, warn};

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn lines(log: impl FnOnce()) -> Vec<Value> {
        let written = Written::default();
        let to = written.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(Level::TRACE)
            .with_ansi(false)
            .with_writer(move || to.clone())
            .event_format(Json)
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
    }

    #[test]
    fn json_has_the_keys_of_kubernetes_components() {
        let lines = lines(|| {
            info!(frontend = %"10.96.0.1:80/TCP", backends = 3, ready = true, took = 0.5, "programmed \"all\"");
            warn!(msg = "other", "a warning\nof two lines");
            error!(error = %io::Error::other("no such thing"), "failed");
            debug!("quiet");
            info_span!("sync", generation = 42).in_scope(|| trace!("quieter"));
        });
        let of = |line: usize, key: &str| lines[line].get(key).cloned().unwrap_or_default();
        let text = |line: usize, key: &str| of(line, key).as_str().unwrap_or_default().to_owned();
        for (line, level, v, message) in [
            (0, "info", Some(0), "programmed \"all\""),
            (1, "warn", Some(0), "a warning\nof two lines"),
            (2, "error", None, "failed"),
            (3, "debug", Some(4), "quiet"),
            (4, "trace", Some(6), "quieter"),
        ] {
            assert_eq!((text(line, "level").as_str(), of(line, "v").as_u64()), (level, v), "{:?}", lines[line]);
            assert_eq!(text(line, "msg"), message);
            assert_eq!(text(line, "logger"), module_path!());
            assert!(text(line, "caller").starts_with("run/logging.rs:"), "{:?}", lines[line]);
            // Milliseconds: after 2020, before 2286.
            assert!((1.6e12..1e13).contains(&of(line, "ts").as_f64().unwrap()), "{:?}", lines[line]);
        }
        assert_eq!((text(0, "frontend").as_str(), of(0, "backends")), ("10.96.0.1:80/TCP", 3.into()));
        assert_eq!((of(0, "ready"), of(0, "took")), (true.into(), 0.5.into()));
        // Nothing is lost, and no key is there twice.
        assert_eq!(text(1, "msg_"), "other");
        assert_eq!((text(2, "err").as_str(), of(2, "error")), ("no such thing", Value::Null));
        assert_eq!(text(4, "sync"), "generation=42");
    }

    #[test]
    fn a_filter_that_makes_no_sense_is_refused() {
        for good in ["info", "", "proxy_agent=debug,kube=warn"] {
            assert_eq!(checked(good).unwrap(), good);
        }
        assert!(checked("proxy_agent=loud").is_err());
    }
}
