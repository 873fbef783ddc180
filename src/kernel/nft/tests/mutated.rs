//! Answers to a request as a whole, damaged; and what becomes of an acknowledgement.

use crate::kernel::mutate;
use crate::kernel::mutated::{answers, golden_acks, golden_table};
use crate::kernel::netlink::exchange::{Answer, Outcome};
use crate::kernel::netlink::message::{Ack, Message, Messages, Writer, flag};
use crate::kernel::netlink::nfnetlink::{NETFILTER, Request, body};
use crate::kernel::nft::{batch, kind, terms};

const SEQUENCE: u32 = 1;

fn corpus() -> Vec<Vec<u8>> {
    let request = |kind, flags, table: &str, name: &str| {
        let mut body = Writer::default();
        body.nfgen(batch::INET, 0);
        body.string(1, table);
        body.string(3, name);
        (kind, flags, body.finish().unwrap())
    };
    let ours = crate::state::NFT_TABLE;
    let mut found = answers(
        NETFILTER,
        vec![
            request(kind::GETRULE, flag::DUMP | flag::ACK, ours, ""),
            request(kind::GETCHAIN, flag::ACK, ours, "nowhere"),
            request(kind::GETTABLE, flag::ACK, "nobody", ""),
            request(kind::GETTABLE, flag::ACK, ours, ""),
            request(kind::DELTABLE, flag::ACK, ours, ""),
        ],
    );
    found.extend(golden_acks());
    found.extend(golden_table().into_iter().take(8));
    for message in &mut found {
        message[8..12].copy_from_slice(&SEQUENCE.to_ne_bytes());
    }
    found
}

#[test]
fn mutated_answers() {
    let request = Request { text: "list", kind: kind::GETRULE, flags: 0, answer: kind::NEWRULE };
    mutate::messages("nf_tables answers", 4, &corpus(), |input| {
        let mut bodies = 0;
        let mut add = |_, body: &[u8]| {
            bodies += body.len();
            Ok(())
        };
        let mut take = |message: &Message<'_>| body(message, &request, &mut add);
        let mut answer = Answer::new(SEQUENCE, 0, &mut take);
        let mut outcome = Outcome::default();
        outcome.read(input, &mut |message| answer.read(message));
        match answer.finish("list", outcome) {
            Ok(_) => Some(bodies),
            // A refusal is an answer, too.
            Err(error) => {
                error.errno()?;
                Some(error.words().map_or(0, str::len))
            }
        }
    });
}

#[test]
fn mutated_acks() {
    let mut next = {
        let mut last = 0;
        move || {
            last += 1;
            last
        }
    };
    let ops = super::sample::ops();
    let batch = batch::build(&ops, &terms::Terms::default(), &mut next).unwrap();
    mutate::messages("acknowledgements", 4, &corpus(), |input| {
        let mut size = None;
        for message in Messages::new(input) {
            let message = message.ok()?;
            let Ok(ack) = Ack::read(&message) else { continue };
            let origin = batch.origin(message.sequence, ack.offset);
            assert!(origin.is_none_or(|index| index < ops.len()));
            size = Some(size.unwrap_or(0) + ack.words.map_or(0, |words| words.len()));
        }
        size
    });
}
