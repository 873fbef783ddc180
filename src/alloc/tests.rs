use super::*;

mod marks;
mod tables;

fn node(n: impl fmt::Display) -> NodeName {
    NodeName::new(format!("node-{n}")).unwrap()
}
