#![doc = include_str!("docs/crate.md")]
//!
//! This file holds the entry points only; each delegates to the module of its name.

mod attribute;
mod cron;
mod duration;
mod handler;
mod handlers;
mod key;
mod message;
mod name;
mod retry;
mod serde;
mod test;

use proc_macro::TokenStream;

#[doc = include_str!("docs/message.md")]
#[proc_macro_derive(Message, attributes(message, serde))]
pub fn derive_message(input: TokenStream) -> TokenStream {
    message::expand(input.into())
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}

#[doc = include_str!("docs/handler.md")]
#[proc_macro_attribute]
pub fn handler(options: TokenStream, item: TokenStream) -> TokenStream {
    handler::expand(options.into(), item.into()).into()
}

#[doc = include_str!("docs/cron.md")]
#[proc_macro_attribute]
pub fn cron(options: TokenStream, item: TokenStream) -> TokenStream {
    cron::expand(options.into(), item.into()).into()
}

#[doc = include_str!("docs/handlers.md")]
#[proc_macro]
pub fn handlers(paths: TokenStream) -> TokenStream {
    handlers::expand(paths.into())
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}

#[doc = include_str!("docs/test.md")]
#[proc_macro_attribute]
pub fn test(options: TokenStream, item: TokenStream) -> TokenStream {
    test::expand(options.into(), item.into()).into()
}
