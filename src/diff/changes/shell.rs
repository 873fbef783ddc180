//! Changes as a script.

use std::fmt;

use super::Changes;
use crate::diff::op::Op;

impl Changes {
    /// The changes as a shell script that would make them, a command a line, under the name of
    /// each step.
    ///
    /// It stops at the first command that fails. It is for reading, and for a look at a single
    /// command: it makes in thousands of steps what the library makes in one.
    pub fn as_shell(&self) -> impl fmt::Display + '_ {
        Shell(self)
    }
}

struct Shell<'a>(&'a Changes);

impl fmt::Display for Shell<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("set -e\n")?;
        for step in self.0.steps() {
            writeln!(f, "\n# {:?}", step.phase)?;
            step.ops.iter().try_for_each(|op| command(f, op))?;
        }
        Ok(())
    }
}

fn command(f: &mut fmt::Formatter<'_>, op: &Op) -> fmt::Result {
    let text = op.to_string();
    if op.is_xtables() {
        // Its names have no character that means something to a shell.
        return writeln!(f, "{text}");
    }
    if op.is_nft() {
        let rest = |line: &str| line.strip_prefix("nft ").unwrap_or(line).replace('\'', r"'\''");
        return text.lines().try_for_each(|line| writeln!(f, "nft '{}'", rest(line)));
    }
    let words = text.split(' ').map(word);
    writeln!(f, "{}", words.collect::<Vec<_>>().join(" "))
}

/// A word as a shell reads it back: a device may have almost any name.
fn word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if word == "&&" || (!word.is_empty() && word.chars().all(plain)) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_mean_something_to_a_shell_are_quoted() {
        assert_eq!(word("egress.vxlan"), "egress.vxlan");
        assert_eq!(word("a;b"), "'a;b'");
        assert_eq!(word("$a'b"), r"'$a'\''b'");
    }
}
