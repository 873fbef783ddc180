//! The attribute `#[test]` of a harness that can ignore a test while it runs.
//!
//! Separate from the harness, because a crate of procedural macros exports nothing else.

use proc_macro::{TokenStream, TokenTree};

/// Registers a function without arguments as a test of the harness.
///
/// The built-in attribute of this name hands a test to a runner that decides when it is compiled
/// whether the test is ignored.
#[proc_macro_attribute]
pub fn test(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let mut tokens = item.clone().into_iter();
    let is_fn =
        |token: &TokenTree| matches!(token, TokenTree::Ident(word) if word.to_string() == "fn");
    let name = tokens.by_ref().find(is_fn).and_then(|_| tokens.next());
    let registered = match name {
        Some(TokenTree::Ident(name)) if arguments.is_empty() => format!(
            "const _: () = {{
                #[::harness::linkme::distributed_slice(::harness::TESTS)]
                #[linkme(crate = ::harness::linkme)]
                static TEST: ::harness::Test = ::harness::Test {{
                    name: ::core::concat!(::core::module_path!(), \"::{name}\"),
                    run: || ::harness::Outcome::result({name}()),
                }};
            }};"
        ),
        _ => "::core::compile_error!(\"#[test] takes no arguments and stands before a function\");"
            .to_owned(),
    };
    let mut all = item;
    all.extend(registered.parse::<TokenStream>().unwrap_or_default());
    all
}
