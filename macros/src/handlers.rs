//! `handlers![]`: the definitions of the named handlers, in a `Vec`.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::parse::Parser;
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::{Path, Token};

/// The `Vec`, or the error at what is no path.
pub(crate) fn expand(input: TokenStream) -> syn::Result<TokenStream> {
    let paths = Punctuated::<Path, Token![,]>::parse_terminated.parse2(input).map_err(|error| {
        let mend = "handlers![] takes #[handler] functions by name: handlers![reserve_stock, mail::send_receipt]";
        syn::Error::new(error.span(), mend)
    })?;
    if paths.is_empty() {
        return Ok(quote!(
            ::std::vec::Vec::<::postbox_consumer::HandlerDefinition>::new()
        ));
    }
    let definitions = paths
        .iter()
        .map(|path| quote_spanned!(path.span()=> <#path as ::postbox_consumer::DefineHandler>::define()));
    Ok(quote!(::std::vec![#(#definitions),*]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trailing_comma_and_an_empty_list_are_fine() {
        let define = |handler: TokenStream| quote!(<#handler as ::postbox_consumer::DefineHandler>::define());
        let (a, b) = (define(quote!(a)), define(quote!(path::b)));
        let expanded = expand(quote!(a, path::b,)).unwrap();
        assert_eq!(expanded.to_string(), quote!(::std::vec![#a, #b]).to_string());
        let empty = expand(TokenStream::new()).unwrap();
        assert_eq!(
            empty.to_string(),
            quote!(::std::vec::Vec::<::postbox_consumer::HandlerDefinition>::new()).to_string()
        );
    }
}
