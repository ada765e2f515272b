//! `derive(Message)`: one message type for a struct, one for each variant of an enum.

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, quote, quote_spanned};
use syn::ext::IdentExt;
use syn::parse::ParseStream;
use syn::spanned::Spanned;
use syn::{Attribute, Data, DataEnum, DeriveInput, Field, Fields, Ident, LitStr, Path, Variant, parse_quote};

use crate::attribute;
use crate::key::{Key, Owner};
use crate::name;
use crate::serde;

/// The implementation of `Message`, or the errors at what caused them.
pub(crate) fn expand(input: TokenStream) -> syn::Result<TokenStream> {
    let input: DeriveInput = syn::parse2(input)?;
    refuse_lifetimes(&input)?;
    let expansion = match &input.data {
        Data::Struct(data) => expand_struct(&input, &data.fields),
        Data::Enum(data) => expand_enum(&input, data),
        Data::Union(data) => Err(syn::Error::new(
            data.union_token.span,
            "a message is a struct or an enum, not a union",
        )),
    }?;
    let known = ["topic", "type", "key", "crate"];
    let krate = Options::read(&input.attrs, "#[message]", &known)?.krate;
    Ok(attribute::in_crate("postbox", krate.as_ref(), expansion))
}

/// What `#[message(…)]` says on one struct, enum or variant.
#[derive(Default)]
struct Options {
    topic: Option<LitStr>,
    message_type: Option<LitStr>,
    key: Option<Key>,
    krate: Option<Path>,
}

impl Options {
    fn read(attributes: &[Attribute], place: &str, known: &[&str]) -> syn::Result<Self> {
        let mut options = Self::default();
        let mut attributes = attributes
            .iter()
            .filter(|attribute| attribute.path().is_ident("message"));
        let Some(attribute) = attributes.next() else {
            return Ok(options);
        };
        if let Some(second) = attributes.next() {
            return Err(syn::Error::new_spanned(
                second,
                "write one #[message(…)] with all the options",
            ));
        }
        attribute.parse_args_with(|input: ParseStream<'_>| {
            attribute::read_options(input, place, known, |option, name, input| {
                match name {
                    "topic" => options.topic = Some(attribute::name(option, "orders", input)?),
                    "type" => options.message_type = Some(attribute::name(option, "order.placed", input)?),
                    "crate" => {
                        options.krate = Some(attribute::path(option, "shop::reexports::postbox", input)?)
                    }
                    _ => options.key = Some(Key::read(option, input)?),
                }
                Ok(())
            })
        })?;
        Ok(options)
    }

    fn topic(&self, ident: &Ident) -> syn::Result<&LitStr> {
        self.topic.as_ref().ok_or_else(|| {
            let mend = format!("`{ident}` has no topic: add #[message(topic = \"…\")]");
            syn::Error::new(ident.span(), mend)
        })
    }

    /// The type as given, or as the identifier implies.
    fn message_type(&self, ident: &Ident) -> syn::Result<LitStr> {
        if let Some(given) = &self.message_type {
            return Ok(given.clone());
        }
        let implied = name::snake_case(&ident.unraw().to_string());
        name::check_text("type", &implied, ident.span())?;
        Ok(LitStr::new(&implied, ident.span()))
    }
}

fn expand_struct(input: &DeriveInput, fields: &Fields) -> syn::Result<TokenStream> {
    let options = Options::read(&input.attrs, "#[message]", &["topic", "type", "key", "crate"])?;
    refuse_field_options(fields)?;
    let ident = &input.ident;
    let topic = options.topic(ident)?.clone();
    let message_type = options.message_type(ident)?;
    let owner = Owner {
        name: format!("`{ident}`"),
        path: quote!(Self),
        fields,
    };
    let key_arm = options.key.as_ref().map(|key| key.arm(&owner)).transpose()?;

    let mut generics = input.generics.clone();
    if !generics.params.is_empty() {
        // Whether a generic struct is JSON depends on its parameters.
        let (_, of_type, _) = input.generics.split_for_impl();
        generics
            .make_where_clause()
            .predicates
            .push(parse_quote!(#ident #of_type: ::postbox::__private::Payload));
    }
    let json = quote_spanned!(ident.span()=> <Self as ::postbox::__private::Payload>);
    let body = Body {
        topic,
        types: vec![message_type.clone()],
        message_type: message_type.to_token_stream(),
        key: key_arm,
        encode: quote!(#json::encode(self)),
        decode: quote! {
            if message_type == #message_type {
                return #json::decode(payload);
            }
        },
    };
    Ok(body.implementation(ident, &generics))
}

fn expand_enum(input: &DeriveInput, data: &DataEnum) -> syn::Result<TokenStream> {
    let ident = &input.ident;
    if !input.generics.params.is_empty() {
        let message = "a generic enum cannot be a message: derive on an enum of concrete types";
        return Err(syn::Error::new_spanned(&input.generics, message));
    }
    if data.variants.is_empty() {
        return Err(syn::Error::new(
            ident.span(),
            format!("`{ident}` has no variants, so no types"),
        ));
    }
    let options = Options::read(
        &input.attrs,
        "#[message] on an enum (`type` goes on its variants)",
        &["topic", "key", "crate"],
    )?;
    let topic = options.topic(ident)?.clone();

    let mut types: Vec<LitStr> = Vec::new();
    let mut key_arms = Vec::new();
    let mut type_arms = Vec::new();
    let mut decode_arms = Vec::new();
    let mut any_key = false;
    for variant in &data.variants {
        let name = &variant.ident;
        let own = Options::read(
            &variant.attrs,
            "#[message] on a variant (`topic` goes on the enum)",
            &["type", "key"],
        )?;
        refuse_field_options(&variant.fields)?;
        let message_type = own.message_type(name)?;
        if let Some(taken) = types.iter().position(|t| t.value() == message_type.value()) {
            let (text, other) = (message_type.value(), &data.variants[taken].ident);
            let message = format!("type {text:?} is already that of variant `{other}`");
            return Err(syn::Error::new(message_type.span(), message));
        }
        let owner = Owner {
            name: format!("variant `{name}`"),
            path: quote!(Self::#name),
            fields: &variant.fields,
        };
        let key = own.key.or_else(|| options.key.clone()).unwrap_or(Key::None);
        any_key |= !matches!(key, Key::None);
        key_arms.push(key.arm(&owner)?);
        type_arms.push(quote!(Self::#name { .. } => #message_type,));
        decode_arms.push(decode_arm(&input.attrs, variant, &message_type)?);
        types.push(message_type);
    }

    let content = content_enum(input, data)?;
    let body = Body {
        topic,
        types,
        message_type: quote!(match self { #(#type_arms)* }),
        key: any_key.then(|| quote!(#(#key_arms)*)),
        encode: quote! {
            #content
            ::postbox::__private::encode(|serializer| __Content::serialize(self, serializer))
        },
        decode: quote!(match message_type { #(#decode_arms)* _ => {} }),
    };
    Ok(body.implementation(ident, &input.generics))
}

/// The parts of an implementation that differ between a struct and an enum.
struct Body {
    topic: LitStr,
    types: Vec<LitStr>,
    message_type: TokenStream,
    /// Match arms over `self`; without any, the trait's default holds.
    key: Option<TokenStream>,
    encode: TokenStream,
    /// Returns when the type is known.
    decode: TokenStream,
}

impl Body {
    fn implementation(self, ident: &Ident, generics: &syn::Generics) -> TokenStream {
        let Self {
            topic,
            types,
            message_type,
            key,
            encode,
            decode,
        } = self;
        let (of_impl, of_type, conditions) = generics.split_for_impl();
        let key = key.map(|arms| {
            quote! {
                #[allow(unused_variables, clippy::redundant_locals)]
                fn key(&self) -> ::core::option::Option<::std::borrow::Cow<'_, ::core::primitive::str>> {
                    #[allow(unused_imports)]
                    use ::postbox::__private::{OptionalKey as _, RequiredKey as _};
                    match self { #arms }
                }
            }
        });
        quote! {
            #[automatically_derived]
            impl #of_impl ::postbox::Message for #ident #of_type #conditions {
                const TOPIC: &'static ::core::primitive::str = #topic;
                const TYPES: &'static [&'static ::core::primitive::str] = &[#(#types),*];

                fn message_type(&self) -> &'static ::core::primitive::str {
                    #message_type
                }

                #key

                fn encode(
                    &self,
                ) -> ::core::result::Result<::std::vec::Vec<::core::primitive::u8>, ::postbox::EncodeError> {
                    #encode
                }

                fn decode(
                    message_type: &::core::primitive::str,
                    payload: &[::core::primitive::u8],
                ) -> ::core::result::Result<Self, ::postbox::DecodeError> {
                    #decode
                    ::core::result::Result::Err(::postbox::DecodeError::unknown_type(
                        message_type,
                        <Self as ::postbox::Message>::TYPES,
                    ))
                }
            }
        }
    }
}

/// A shadow of the enum that serde writes without a tag, so that a payload is the variant's content alone. It
/// is `remote`: it borrows from the real enum, and the fields' serde attributes see the fields' own types.
fn content_enum(input: &DeriveInput, data: &DataEnum) -> syn::Result<TokenStream> {
    let remote = LitStr::new(&input.ident.to_string(), Span::call_site());
    let container = serde::options(&input.attrs, &["rename_all_fields"])?;
    let mut variants = Vec::new();
    for variant in &data.variants {
        let name = &variant.ident;
        serde::refuse_on_variant(variant)?;
        let options = serde::options(&variant.attrs, &["rename_all"])?;
        let content = content_fields(&variant.fields);
        variants.push(quote!(#(#[serde(#options)])* #name #content));
    }
    Ok(quote! {
        #[derive(::postbox::__private::serde::Serialize)]
        #[serde(crate = "::postbox::__private::serde", remote = #remote, untagged)]
        #(#[serde(#container)])*
        #[allow(dead_code)]
        enum __Content { #(#variants),* }
    })
}

/// The arm that reads one variant's content back and returns.
fn decode_arm(of_enum: &[Attribute], variant: &Variant, message_type: &LitStr) -> syn::Result<TokenStream> {
    let name = &variant.ident;
    let content = content_fields(&variant.fields);
    let (content, value) = match &variant.fields {
        Fields::Named(fields) => {
            let names: Vec<_> = fields.named.iter().map(|field| &field.ident).collect();
            (content, quote!(Self::#name { #(#names: content.#names),* }))
        }
        Fields::Unnamed(fields) => {
            let positions = (0..fields.unnamed.len()).map(syn::Index::from);
            (quote!(#content;), quote!(Self::#name(#(content.#positions),*)))
        }
        // Nothing is read, so a content that a later version adds does not break this one.
        Fields::Unit => return Ok(quote!(#message_type => return ::core::result::Result::Ok(Self::#name),)),
    };
    let options = serde::options_of_content(of_enum, variant)?;
    Ok(quote! {
        #message_type => {
            #[derive(::postbox::__private::serde::Deserialize)]
            #[serde(crate = "::postbox::__private::serde")]
            #(#[serde(#options)])*
            struct __Content #content
            let content: __Content = ::postbox::__private::decode(payload)?;
            return ::core::result::Result::Ok(#value);
        }
    })
}

/// The fields with their types and serde attributes, in their braces or parentheses.
fn content_fields(fields: &Fields) -> TokenStream {
    let content = fields.iter().map(|Field { attrs, ident, ty, .. }| {
        let attributes = attrs
            .iter()
            .filter(|attribute| attribute.path().is_ident("serde"));
        let name = ident.iter();
        quote!(#(#attributes)* #(#name:)* #ty)
    });
    match fields {
        Fields::Named(_) => quote!({ #(#content),* }),
        Fields::Unnamed(_) => quote!((#(#content),*)),
        Fields::Unit => TokenStream::new(),
    }
}

fn refuse_lifetimes(input: &DeriveInput) -> syn::Result<()> {
    match input.generics.lifetimes().next() {
        Some(lifetime) => {
            let message =
                "a message owns its data, because a handler gets it from the database: no lifetimes";
            Err(syn::Error::new(lifetime.span(), message))
        }
        None => Ok(()),
    }
}

fn refuse_field_options(fields: &Fields) -> syn::Result<()> {
    let mut attributes = fields.iter().flat_map(|field| &field.attrs);
    match attributes.find(|attribute| attribute.path().is_ident("message")) {
        Some(misplaced) => {
            let message =
                "#[message(…)] goes on the struct, enum or variant; a field is named there: key = field";
            Err(syn::Error::new_spanned(misplaced, message))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(input: TokenStream) -> String {
        expand(input).unwrap_err().to_string()
    }

    fn expansion(input: TokenStream) -> String {
        expand(input).unwrap().to_string()
    }

    #[test]
    fn a_type_is_named_after_the_struct_or_variant() {
        let of_struct = expansion(quote!(
            #[message(topic = "orders")]
            struct OrderPlaced {
                id: u64,
            }
        ));
        assert!(of_struct.contains(r#"& ["order_placed"]"#), "{of_struct}");
        let of_enum = expansion(quote!(
            #[message(topic = "orders")]
            enum Order {
                WasPlaced,
                Gone { id: u64 },
            }
        ));
        assert!(of_enum.contains(r#"& ["was_placed" , "gone"]"#), "{of_enum}");
    }

    #[test]
    fn without_a_key_the_default_of_the_trait_holds() {
        assert!(
            !expansion(quote!(
                #[message(topic = "orders")]
                struct Order {
                    id: u64,
                }
            ))
            .contains("fn key")
        );
        assert!(
            !expansion(quote!(
                #[message(topic = "orders")]
                enum Order {
                    Placed(u64),
                }
            ))
            .contains("fn key")
        );
    }

    #[test]
    fn a_newtype_variant_delegates_its_key() {
        let expansion = expansion(quote! {
            #[message(topic = "orders", key = customer.id)]
            enum Order { Placed(OrderPlaced), Gone { customer: Customer } }
        });
        assert!(expansion.contains("(field_0 . customer . id)"), "{expansion}");
        assert!(expansion.contains("(customer . id)"), "{expansion}");
    }

    #[test]
    fn a_default_type_outside_the_alphabet_asks_for_an_explicit_one() {
        let error = error(quote!(
            #[message(topic = "orders")]
            struct Größe;
        ));
        assert!(error.starts_with("a type is 1 to 255 characters"), "{error}");
    }
}
