//! One machine: started, listened to, ended.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::{prctl::set_pdeathsig, signal::Signal};

use super::kernel::Kernel;
use crate::command::{self, command};

/// What the guest said next.
pub enum Heard {
    Line(String),
    /// Nothing for a while.
    Silence,
    /// It is over, and the machine is gone.
    End,
}

/// A machine that runs; ended when dropped.
pub struct Machine {
    child: Child,
    lines: mpsc::Receiver<String>,
}

/// Megabytes.
const MEMORY: u32 = 3072;

impl Machine {
    /// `console` gets what the kernel says, `errors` what programs say aside.
    pub fn start(kernel: &Kernel, initramfs: &Path, niceness: u8, console: &Path, errors: &Path) -> Result<Self> {
        use std::os::unix::process::CommandExt as _;

        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(4));
        let arguments = [
            // Emulation: a machine that is virtual itself often has a /dev/kvm that is of no use.
            "-accel tcg,thread=multi -cpu max -machine pc,usb=off -nodefaults -no-user-config -display none -no-reboot",
            &format!("-m {MEMORY} -smp {cpus}"),
        ];
        let options = [
            "console=ttyS0 loglevel=4 8250.nr_uarts=4 rdinit=/init",
            // Any panic ends the machine.
            "panic=-1 oops=panic",
            // An emulated clock drifts and is not to be doubted for it; and there is nobody here to be protected from.
            "tsc=reliable no_timer_check mitigations=off nokaslr",
        ];
        let file = |path: &Path| format!("file:{}", path.display());
        let mut qemu = command("nice");
        qemu.args(["-n", &niceness.to_string(), "qemu-system-x86_64"])
            .args(arguments.iter().flat_map(|words| words.split_whitespace()))
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", &options.join(" ")])
            .args(["-serial", &file(console), "-serial", "stdio", "-serial", &file(errors)])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        // SAFETY: between fork and exec the closure makes one system call.
        unsafe { qemu.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(Into::into)) };
        let mut child = qemu.spawn().with_context(|| format!("cannot start `{}`", command::display(&qemu)))?;
        let stdout = child.stdout.take().context("no pipe from the machine")?;
        let (sender, lines) = mpsc::sync_channel(1024);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, lines })
    }

    pub fn listen(&mut self) -> Heard {
        match self.lines.recv_timeout(Duration::from_millis(500)) {
            Ok(line) => Heard::Line(line),
            Err(mpsc::RecvTimeoutError::Timeout) => Heard::Silence,
            Err(mpsc::RecvTimeoutError::Disconnected) => Heard::End,
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // One that has ended already needs no ending; a moment for one that is about to.
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(300) {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

/// What a kernel said last.
pub fn last_words(console: &Path) -> String {
    let text = fs::read(console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines.get(lines.len().saturating_sub(15)..).unwrap_or_default().join("\n")
}
