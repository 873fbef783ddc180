//! Input of `iptables-restore`.

use std::fmt::Write;

use crate::diff::op::{Op, write_edit};
use crate::state::XtTable;

/// Script with changes to one table, as one transaction.
pub(crate) fn of(table: XtTable, ops: &[&Op]) -> String {
    let mut text = format!("*{}\n", table.name());
    for op in ops {
        // Writing into a `String` cannot fail.
        let _written = match op {
            Op::AddXtChain(_, chain) => writeln!(text, "-N {}", chain.name),
            Op::DeleteXtChain(_, chain) => writeln!(text, "-F {0}\n-X {0}", chain.name),
            Op::EditXtChain(_, chain, edits) => edits.iter().try_for_each(|edit| {
                write_edit(&mut text, chain, edit)?;
                text.write_char('\n')
            }),
            _ => Ok(()),
        };
    }
    text.push_str("COMMIT\n");
    text
}
