//! The program in the pods of a test world; see `proxy_tests::pod`.

fn main() -> std::process::ExitCode {
    proxy_tests::pod::main()
}
