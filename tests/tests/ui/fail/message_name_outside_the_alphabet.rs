use postbox::Message;

#[derive(Message)]
#[message(topic = "my orders")]
struct Space;

#[derive(Message)]
#[message(topic = "")]
struct Empty;

#[derive(Message)]
#[message(topic = "orders", type = "order#placed")]
struct TypeOfStruct;

#[derive(Message)]
#[message(topic = "orders")]
enum TypeOfVariant {
    #[message(type = "größe")]
    Placed,
}

#[derive(Message)]
#[message(topic = "orders")]
struct Größe;

#[derive(Message)]
#[message(
    topic = "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789\
             0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789\
             01234567890123456789012345678901234567890123456789012345"
)]
struct Long;

fn main() {}
