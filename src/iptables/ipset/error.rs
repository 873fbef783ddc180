//! Error numbers of the ipset subsystem, for which the C library has no text.

use crate::error::{KernelError, errno};

/// `IPSET_ERR_PRIVATE` and the numbers after it; set types have their own numbers from 4352 on.
const WORDS: [(i32, i32, &str); 16] = [
    (4097, errno::EINVAL, "a request that ipset does not understand"),
    (4098, errno::EOPNOTSUPP, "the kernel has no such type of set"),
    (4099, errno::ENOSPC, "there are as many sets as the kernel can have"),
    (4100, errno::EBUSY, "a rule looks into the set"),
    (4101, errno::EEXIST, "a set of the new name exists, or none to swap with"),
    (4102, errno::EINVAL, "the two sets are of different types or families"),
    (4103, errno::EEXIST, "the member is there already, or to delete not"),
    (4104, errno::EINVAL, "a set of this type holds no such prefix"),
    (4105, errno::EINVAL, "no such netmask"),
    (4106, errno::EINVAL, "no such address family"),
    (4107, errno::EINVAL, "the set was made without timeouts"),
    (4108, errno::EBUSY, "a rule looks into the set"),
    (4109, errno::EINVAL, "not an IPv4 address"),
    (4110, errno::EINVAL, "not an IPv6 address"),
    (4114, errno::EINVAL, "the set was made without marks"),
    (4352, errno::ENOSPC, "the set is full"),
];

const NO_IPSET: &str = "load ip_set and ip_set_hash_net or use a kernel with CONFIG_IP_SET";

/// Replaces an error number of ipset by a standard `errno` and adds its meaning as text.
pub(crate) fn explained(error: KernelError) -> KernelError {
    let Some(number) = error.errno() else { return error };
    match WORDS.iter().find(|(private, ..)| *private == number) {
        Some((_, errno, words)) => {
            let plain = KernelError::refused(error.request(), *errno);
            let words = format!("{words}, ipset error {number}");
            let plain = plain.with_words(Some(words));
            if number == 4098 { plain.with_remedy(NO_IPSET) } else { plain }
        }
        None if number == errno::EINVAL && error.words().is_none() => error.with_remedy(NO_IPSET),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_private_number_becomes_a_sentence() {
        for (number, errno, words) in WORDS {
            let error = explained(KernelError::refused("ipset add x 10.0.0.1", number));
            assert_eq!(error.errno(), Some(errno));
            assert!(error.to_string().contains(words), "{error}");
            assert!(!error.to_string().contains("Unknown error"), "{error}");
        }
    }
}
