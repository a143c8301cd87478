//! Running other programs: the environment they get, and errors that name them.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// The root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Where cargo puts what it builds.
pub fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// Settings of the user's that reach inner cargos; every other `CARGO*` variable was put there by the outer `cargo run` and
/// describes xtask itself.
const CARGO_SETTINGS: [&str; 9] = [
    "CARGO_HOME",
    "CARGO_TARGET_DIR",
    "CARGO_INCREMENTAL",
    "CARGO_BUILD_JOBS",
    "CARGO_NET_",
    "CARGO_HTTP_",
    "CARGO_REGISTRIES_",
    "CARGO_SOURCE_",
    "CARGO_TERM_",
];

/// A command at the root of the repository with the environment as it was before `cargo run` changed it.
///
/// What must not leak: `CARGO_PKG_*` and `CARGO_MANIFEST_DIR` of xtask (build scripts and tests would read them), the
/// library path of xtask's build. `RUSTUP_TOOLCHAIN` stays: it is what makes the inner cargo the same one.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    for (name, _) in env::vars_os() {
        let keep = name.to_str().is_some_and(|name| CARGO_SETTINGS.iter().any(|setting| name.starts_with(setting)));
        if name.as_encoded_bytes().starts_with(b"CARGO") && !keep {
            command.env_remove(&name);
        }
    }
    command.env_remove("LD_LIBRARY_PATH");
    command
}

/// Cargo itself: the one that runs us.
pub fn cargo() -> Command {
    command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The command as a person would type it.
pub fn display(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let mut text = program.to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

/// Runs a command with our output; a failure is an error that names it.
pub fn check(command: &mut Command) -> Result<()> {
    if !succeeds(command)? {
        bail!("`{}` failed", display(command));
    }
    Ok(())
}

/// Runs a command with our output; tells whether it succeeded.
pub fn succeeds(command: &mut Command) -> Result<bool> {
    let status = command.status().with_context(|| format!("cannot start `{}`", display(command)))?;
    Ok(status.success())
}

/// What a command prints, if it succeeds.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start `{}`", display(command)))?;
    if !output.status.success() {
        bail!("`{}` failed", display(command));
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{}` printed no text", display(command)))
}

/// The same, silently: `None` where it does not succeed for any reason.
pub fn ask(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Finds a program on PATH, and where administrators' programs live even if PATH leaves that out.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// Whether nobody is watching: what is left unchecked then is a failure.
pub fn is_ci() -> bool {
    env::var_os("CI").is_some_and(|ci| !ci.is_empty())
}

pub fn is_root() -> bool {
    // The owner of /proc/self is the effective user.
    std::fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

/// A command that runs as root: as it is if we are, through sudo otherwise.
pub fn as_root(program: impl AsRef<OsStr>, why: &str) -> Result<Command> {
    if is_root() {
        return Ok(command(program));
    }
    if find("sudo").is_none() {
        bail!("{why} needs root, and there is no sudo here: run this command as root");
    }
    let mut sudo = command("sudo");
    sudo.arg("-E").arg(program);
    Ok(sudo)
}
