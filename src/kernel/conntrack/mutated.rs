//! Mutated conntrack dumps.

use super::*;
use crate::kernel::mutate;
use crate::kernel::netlink::message::Messages;
use crate::kernel::netlink::nfnetlink::NETFILTER;

/// Conntrack entries as the kernel dumps them: with both tuples, a mark and a zone.
fn corpus() -> Vec<Vec<u8>> {
    let ends = [("10.244.1.10", "198.51.100.10"), ("fd44:1::10", "2001:db8:51::10")];
    let list = (GET, flag::DUMP | flag::ACK, vec![0; 4]);
    let mut found = crate::kernel::mutated::answers(NETFILTER, vec![list]);
    for (source, destination) in ends {
        for protocol in [1, 6, 17, 58, 132] {
            let mut writer = Writer::default();
            write(&mut writer, &Op::EndConnection(tests::sample(source, destination, protocol)), 1);
            let request = writer.finish().unwrap();
            let message = Messages::new(&request).next().unwrap().unwrap();
            let (_, body) = message.nfgen().unwrap();
            let tuple = Attributes::new(body).next().unwrap().unwrap();
            let mut writer = Writer::default();
            let message = writer.message(NEW, 2, 1);
            writer.nfgen(2, 0);
            writer.raw(body);
            writer.nest(TUPLE_ORIG, |writer| writer.raw(tuple.bytes()));
            writer.be32(MARK, 0x2700_0000);
            writer.end(message);
            found.push(writer.finish().unwrap());
        }
    }
    found
}

#[test]
fn mutated_connections() {
    mutate::messages("connections", 8, &corpus(), |input| {
        let mut list = Vec::new();
        for message in Messages::new(input) {
            let message = message.ok()?;
            if message.kind == NEW {
                let (_, body) = message.nfgen().ok()?;
                list.extend(read(Attributes::new(body)).ok()?);
            }
        }
        for connection in &list {
            let mut writer = Writer::default();
            write(&mut writer, &Op::EndConnection(*connection), 1);
            assert!(writer.finish().is_some_and(|request| request.len() < 256));
        }
        (!list.is_empty()).then(|| size_of_val(list.as_slice()))
    });
}
