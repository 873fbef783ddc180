//! Message types of subsystem 10 (`enum nf_tables_msg_types`) and of a batch.

pub(super) const BEGIN: u16 = 0x10;
pub(super) const END: u16 = 0x11;
pub(super) const NEWTABLE: u16 = 0xa00;
pub(super) const GETTABLE: u16 = 0xa01;
pub(super) const DELTABLE: u16 = 0xa02;
pub(crate) const NEWCHAIN: u16 = 0xa03;
pub(crate) const GETCHAIN: u16 = 0xa04;
pub(super) const DELCHAIN: u16 = 0xa05;
pub(crate) const NEWRULE: u16 = 0xa06;
pub(crate) const GETRULE: u16 = 0xa07;
pub(super) const DELRULE: u16 = 0xa08;
pub(super) const NEWSET: u16 = 0xa09;
pub(super) const GETSET: u16 = 0xa0a;
pub(super) const DELSET: u16 = 0xa0b;
pub(super) const NEWSETELEM: u16 = 0xa0c;
pub(super) const GETSETELEM: u16 = 0xa0d;
pub(super) const DELSETELEM: u16 = 0xa0e;
pub(super) const NEWGEN: u16 = 0xa0f;
pub(super) const GETGEN: u16 = 0xa10;
pub(crate) const NEWFLOWTABLE: u16 = 0xa16;
pub(crate) const GETFLOWTABLE: u16 = 0xa17;
pub(super) const DELFLOWTABLE: u16 = 0xa18;
