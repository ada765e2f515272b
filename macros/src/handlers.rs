//! `handlers![]`: the definitions of the named handlers, in a `Vec`.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::ext::IdentExt;
use syn::parse::{ParseStream, Parser};
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::{Ident, Path, Token};

use crate::attribute;

/// The `Vec`, or the error at what is no path.
pub(crate) fn expand(input: TokenStream) -> syn::Result<TokenStream> {
    let (krate, paths) = read.parse2(input).map_err(|error| {
        let mend =
            "handlers![] takes #[handler] functions by name: handlers![reserve_stock, mail::send_receipt]";
        syn::Error::new(error.span(), mend)
    })?;
    if paths.is_empty() {
        let none = quote!(::std::vec::Vec::<::postbox_consumer::HandlerDefinition>::new());
        return Ok(attribute::in_crate("postbox_consumer", krate.as_ref(), none));
    }
    let definitions = paths
        .iter()
        .map(|path| quote_spanned!(path.span()=> <#path as ::postbox_consumer::DefineHandler>::define()));
    let all = quote!(::std::vec![#(#definitions),*]);
    Ok(attribute::in_crate("postbox_consumer", krate.as_ref(), all))
}

/// `crate = path;` first, if the crate has another path.
fn read(input: ParseStream<'_>) -> syn::Result<(Option<Path>, Punctuated<Path, Token![,]>)> {
    let krate = if input.peek(Token![crate]) && input.peek2(Token![=]) {
        let option = input.call(Ident::parse_any)?;
        let path = attribute::path(&option, "shop::reexports::postbox_consumer", input)?;
        input.parse::<Token![;]>()?;
        Some(path)
    } else {
        None
    };
    Ok((krate, Punctuated::parse_terminated(input)?))
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
