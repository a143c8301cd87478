use std::process::ExitCode;

fn main() -> ExitCode {
    proxy_agent::cli::main()
}
