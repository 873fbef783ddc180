//! Network namespaces for tests, and `nft`.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::kernel::netlink::socket::Socket;
use crate::testing::lab::Netns;

/// Runs a test in a network namespace of its own.
pub(crate) fn in_netns(test: impl FnOnce(&mut Socket) + Send) {
    let netns = harness::given("network namespace", Netns::new());
    netns.run(|| test(&mut crate::kernel::nft::open().unwrap())).unwrap();
}

/// What `nft` prints, or says of its failure; it runs in the namespace of the calling thread.
///
/// A test that lists something, or adds rules that its stand-in does not know, needs the program.
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
