//! What stands for a string in an option, errors that classify themselves, and handlers that are called by a test.

#![deny(warnings)]

use postbox::Message;
use postbox_consumer::{
    Batch, BatchItem, DeadLetter, Delivery, HandlerDefinition, HandlerError, Tx, handler, handlers,
};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "payments", type = "payment.taken", key = id)]
pub struct PaymentTaken {
    id: u64,
}

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "payments", type = "payment.refunded", key = id)]
pub struct PaymentRefunded {
    id: u64,
}

const GROUP: &str = "psp";

#[handler(group = GROUP, topic = concat!("pay", "ments"), types = [super::handler_options::TAKEN, "payment.refunded"])]
async fn of_constants() {}

pub(crate) const TAKEN: &str = "payment.taken";

macro_rules! handlers_of {
    ($name:ident, $group:literal, $timeout:literal, $lanes:literal, $type:literal) => {
        #[handler(group = $group, timeout = $timeout, lanes = $lanes, topic = "payments", types = [$type], retry(backoff = "fixed(1s)"))]
        async fn $name() {}
    };
}

handlers_of!(made_by_a_macro, "made", "5s", 4, "payment.taken");

#[derive(Debug)]
pub enum PayError {
    NoSuchCard,
    Busy,
}

impl PayError {
    fn is_permanent(&self) -> bool {
        matches!(self, PayError::NoSuchCard)
    }
}

impl std::fmt::Display for PayError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

impl std::error::Error for PayError {}

#[handler(group = "charge", retry(dead_letter_on = PayError::is_permanent, max_attempts = 3))]
async fn charge(payment: PaymentTaken) -> Result<(), PayError> {
    match payment.id {
        0 => Err(PayError::NoSuchCard),
        1 => Err(PayError::Busy),
        _ => Ok(()),
    }
}

async fn check(payment: &PaymentTaken) -> Result<(), HandlerError> {
    match payment.id {
        0 => Err(HandlerError::dead_letter("no such payment")),
        _ => Ok(()),
    }
}

#[handler(group = "ledger")]
async fn note(payment: PaymentTaken) -> anyhow::Result<()> {
    check(&payment).await?;
    Ok(())
}

/// Of one topic, so it compiles.
#[handler(group = "both", types = ["payment.taken"])]
async fn two_of_one_topic(_taken: PaymentTaken, _refunded: PaymentRefunded) {}

#[handler(group = "index", batch = 10)]
async fn index(payments: Batch<PaymentTaken>, _tx: Tx) {
    assert!(!payments.is_empty());
}

/// By another name it is a batch all the same.
type Payments = Batch<PaymentTaken>;

#[handler(group = "aliased", batch = 10)]
async fn aliased(payments: Payments, _tx: Tx) {
    assert!(!payments.is_empty());
}

/// What is called like a batch, or like a transaction, and is none.
mod shop {
    use postbox_consumer::{Extract, HandlerError, Invocation};

    pub struct Batch<T>(pub std::marker::PhantomData<T>);

    impl<T: Send> Extract for Batch<T> {
        async fn extract(_: &mut Invocation) -> Result<Self, HandlerError> {
            Ok(Self(std::marker::PhantomData))
        }
    }
}

#[handler(group = "no_batch", topic = "t")]
async fn no_batch(_batch: shop::Batch<u8>) {}

/// Where the crates have other paths.
mod elsewhere {
    use postbox as pb;
    use postbox_consumer as pbc;
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize, pb::Message)]
    #[message(topic = "t", key = id, crate = "pb")]
    pub struct Thing {
        id: i64,
    }

    #[derive(Serialize, Deserialize, pb::Message)]
    #[message(topic = "t", crate = "pb")]
    #[allow(dead_code)]
    pub enum Things {
        Made { id: i64 },
        Lost,
    }

    #[pbc::handler(group = "g", crate = "pbc", retry(max_attempts = 3), order = "none")]
    pub async fn thing(_thing: Thing) {}

    #[pbc::cron("@daily", crate = "pbc")]
    pub async fn daily() {}

    pub fn all() -> Vec<pbc::HandlerDefinition> {
        pbc::handlers![crate = pbc; thing, daily]
    }
}

#[handler(group = "support", dead_letters_of = "inventory")]
async fn given_up(_payment: PaymentTaken, _letter: DeadLetter) {}

/// A test of a handler, as somebody else writes it.
#[allow(dead_code)]
async fn a_test(pool: sqlx::PgPool) -> Result<(), sqlx::Error> {
    let delivery = Delivery::for_test("payments");
    let payments: Batch<PaymentTaken> = [BatchItem::new(PaymentTaken { id: 1 }, delivery)]
        .into_iter()
        .collect();
    let (tx, transaction) = Tx::for_test(&pool).await?;
    index(payments, tx).await;
    transaction.commit().await
}

pub fn main() {
    let definitions: Vec<HandlerDefinition> = handlers![
        of_constants,
        made_by_a_macro,
        charge,
        note,
        two_of_one_topic,
        index,
        aliased,
        no_batch,
        given_up
    ];
    assert_eq!(definitions.len(), 9);
    assert_eq!(elsewhere::all().len(), 2);
}
