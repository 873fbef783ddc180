//! Network namespaces for tests.

use std::io::Write;
use std::process::{Command, Stdio};

use rustix::thread::UnshareFlags;

use crate::kernel::socket::Socket;

/// Runs a test in a network namespace of its own thread.
///
/// Without the privilege it says so on standard error and passes, unless
/// `EGRESS_REQUIRE_NETNS=1`.
pub(crate) fn in_netns(test: impl FnOnce(&mut Socket) + Send + 'static) {
    let run = move || {
        // Only the namespace changes, and only that of this thread, which ends with the test.
        #[allow(deprecated, reason = "its successor is unsafe for flags that are not used here")]
        let entered = rustix::thread::unshare(UnshareFlags::NEWNET);
        if let Err(error) = entered {
            let required = std::env::var("EGRESS_REQUIRE_NETNS").is_ok_and(|value| value == "1");
            assert!(!required, "no network namespace: {error}");
            // The test harness hides what goes through `eprintln!`.
            let notice = format!("SKIPPED, no network namespace: {error}\n");
            std::io::stderr().write_all(notice.as_bytes()).unwrap();
            return;
        }
        let mut socket = crate::kernel::nft::open().unwrap();
        test(&mut socket);
    };
    let thread = std::thread::spawn(run);
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Whether there is an `nft` to ask.
pub(crate) fn has_nft() -> bool {
    Command::new("nft").arg("--version").output().is_ok()
}

/// What `nft` prints; it runs in the namespace of the calling thread.
pub(crate) fn nft(arguments: &[&str], input: &str) -> Result<String, String> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}
