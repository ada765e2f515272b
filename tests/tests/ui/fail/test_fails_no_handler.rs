use postbox_testkit::Kit;

struct Order;

#[postbox_testkit::test]
async fn fails_what_is_no_handler(kit: Kit) {
    kit.fail_once(Order);
}

async fn not_in_a_test(kit: Kit) {
    kit.fail_once(Order);
}

fn main() {
    let _ = not_in_a_test;
}
