use postbox_consumer::handlers;

struct NoHandler;

fn main() {
    handlers![NoHandler];
    handlers![1];
}
