//! The `#[serde(…)]` options of an enum that also hold for its payloads.
//!
//! A payload is one variant's content, so what serde is told about fields counts, and what it is told about
//! the names of variants and the tag does not.

use syn::punctuated::Punctuated;
use syn::{Attribute, Ident, Meta, Token, Variant};

/// The options of these names, from all the `#[serde(…)]` attributes.
pub(crate) fn options(attributes: &[Attribute], names: &[&str]) -> syn::Result<Vec<Meta>> {
    let mut found = Vec::new();
    for attribute in attributes
        .iter()
        .filter(|attribute| attribute.path().is_ident("serde"))
    {
        let metas = attribute.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated)?;
        found.extend(
            metas
                .into_iter()
                .filter(|meta| names.iter().any(|name| meta.path().is_ident(name))),
        );
    }
    Ok(found)
}

/// The options for a struct that holds the content of one variant.
pub(crate) fn options_of_content(of_enum: &[Attribute], variant: &Variant) -> syn::Result<Vec<Meta>> {
    let mut found = options(of_enum, &["deny_unknown_fields"])?;
    let own = options(&variant.attrs, &["rename_all"])?;
    if own.is_empty() {
        found.extend(
            options(of_enum, &["rename_all_fields"])?
                .into_iter()
                .map(as_rename_all),
        );
    }
    found.extend(own);
    Ok(found)
}

/// What an enum calls `rename_all_fields` a struct calls `rename_all`.
fn as_rename_all(mut meta: Meta) -> Meta {
    let path = match &mut meta {
        Meta::Path(path) => path,
        Meta::List(list) => &mut list.path,
        Meta::NameValue(pair) => &mut pair.path,
    };
    if let Some(segment) = path.segments.last_mut() {
        segment.ident = Ident::new("rename_all", segment.ident.span());
    }
    meta
}

/// A codec for a whole variant has no place in the content; silently dropping it would change payloads.
pub(crate) fn refuse_on_variant(variant: &Variant) -> syn::Result<()> {
    match options(&variant.attrs, &["with", "serialize_with", "deserialize_with"])?.first() {
        Some(codec) => Err(syn::Error::new_spanned(
            codec,
            "put this on a field: a message's payload is the fields",
        )),
        None => Ok(()),
    }
}
