//! The words of a command line.

use std::fmt::Display;
use std::io;
use std::net::IpAddr;
use std::str::FromStr;

/// A sentence about what a stand-in cannot do.
pub(super) fn unknown(what: impl Display) -> io::Error {
    io::Error::other(format!("this stand-in does not know {what}; install the program itself"))
}

/// The words that are left of a command.
#[derive(Clone, Debug)]
pub(super) struct Words(std::vec::IntoIter<String>);

impl Words {
    pub(super) fn new(words: Vec<String>) -> Self {
        Self(words.into_iter())
    }

    /// The next word, if there is one.
    pub(super) fn next(&mut self) -> Option<String> {
        self.0.next()
    }

    /// The next word, left where it is.
    pub(super) fn peek(&self) -> Option<&str> {
        self.0.as_slice().first().map(String::as_str)
    }

    /// Takes the next word if it is this one.
    pub(super) fn take(&mut self, word: &str) -> bool {
        let there = self.peek() == Some(word);
        if there {
            self.0.next();
        }
        there
    }

    /// A word that must be there.
    pub(super) fn word(&mut self) -> io::Result<String> {
        self.0.next().ok_or_else(|| io::Error::other("a word is missing"))
    }

    /// The same as a value.
    pub(super) fn value<T: FromStr>(&mut self) -> io::Result<T> {
        let word = self.word()?;
        word.parse().map_err(|_| unknown(format_args!("{word:?} as a value")))
    }

    /// A number, decimal or with `0x`.
    pub(super) fn number(&mut self) -> io::Result<u32> {
        number(&self.word()?)
    }

    pub(super) fn mac(&mut self) -> io::Result<Vec<u8>> {
        let word = self.word()?;
        let octets = word.split(':').map(|octet| u8::from_str_radix(octet, 16));
        octets.collect::<Result<_, _>>().map_err(|_| unknown(format_args!("the MAC {word}")))
    }
}

pub(super) fn number(word: &str) -> io::Result<u32> {
    let number = match word.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => word.parse(),
    };
    number.map_err(|_| unknown(format_args!("the number {word}")))
}

/// An address with a prefix length, which is that of a single address where none is written.
pub(super) fn net(word: &str) -> io::Result<(IpAddr, u8)> {
    let (address, length) = word.split_once('/').map_or((word, None), |(a, l)| (a, Some(l)));
    let address: IpAddr =
        address.parse().map_err(|_| unknown(format_args!("the address {word}")))?;
    let full = if address.is_ipv4() { 32 } else { 128 };
    let length = length.map_or(Ok(full), str::parse);
    Ok((address, length.map_err(|_| unknown(format_args!("the prefix {word}")))?))
}
