//! `#[handler]`: a definition beside an async function, in the type namespace under the function's name.

mod options;

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::ext::IdentExt;
use syn::parse::Parser;
use syn::spanned::Spanned;
use syn::{Attribute, ExprPath, FnArg, ItemFn, Path, ReturnType, Signature, Type};

use crate::attribute;
use crate::duration::Interval;
use crate::retry::Retry;
use options::{Audience, Options};

/// The item as it was, and its definition or the errors.
pub(crate) fn expand(options: TokenStream, item: TokenStream) -> TokenStream {
    expand_with("#[handler]", item, |signature, arguments| {
        let options = Options::read.parse2(options)?;
        Ok((definition(signature, arguments, &options), options.krate))
    })
}

/// As [`expand`], for any attribute that makes a handler of a function: `define` gives the expression that makes the definition.
pub(crate) fn expand_with(
    attribute: &str,
    item: TokenStream,
    define: impl FnOnce(&Signature, &[&Type]) -> syn::Result<(TokenStream, Option<Path>)>,
) -> TokenStream {
    let function: ItemFn = match syn::parse2(item.clone()) {
        Ok(function) => function,
        Err(_) => {
            let message = format!("{attribute} goes on an async fn with a body");
            return with_error(item.clone(), syn::Error::new(first_span(&item), message));
        }
    };
    let arguments = match argument_types(&function.sig) {
        Ok(arguments) => arguments,
        Err(error) => return with_error(item, error),
    };
    // A body that is never run keeps `handlers![]` from complaining of the same mistake.
    let (define, krate) = define(&function.sig, &arguments).unwrap_or_else(|error| {
        let error = error.into_compile_error();
        (quote!(#error ::core::unreachable!()), None)
    });
    let definition = attribute::in_crate("postbox_consumer", krate.as_ref(), beside(&function, &define));
    quote!(#item #definition)
}

fn with_error(item: TokenStream, error: syn::Error) -> TokenStream {
    let error = error.into_compile_error();
    quote!(#item #error)
}

fn first_span(item: &TokenStream) -> Span {
    item.clone()
        .into_iter()
        .next()
        .map_or_else(Span::call_site, |token| token.span())
}

/// The types of the arguments of a function that can be a handler.
fn argument_types(signature: &Signature) -> syn::Result<Vec<&Type>> {
    if signature.asyncness.is_none() {
        let message = format!("a handler is async: async fn {}", signature.ident);
        return Err(syn::Error::new(signature.fn_token.span, message));
    }
    if let Some(unsafety) = &signature.unsafety {
        return Err(syn::Error::new(
            unsafety.span,
            "a handler is not unsafe: move the unsafe block inside",
        ));
    }
    if !signature.generics.params.is_empty() {
        let message =
            "a handler has no generics, because it is called with what the database holds: name the types";
        return Err(syn::Error::new_spanned(&signature.generics, message));
    }
    signature.inputs.iter().map(argument_type).collect()
}

fn argument_type(argument: &FnArg) -> syn::Result<&Type> {
    let typed = match argument {
        FnArg::Typed(typed) => typed,
        FnArg::Receiver(receiver) => {
            let message = "a handler is a free function: take what it needs as State<…> instead of `self`";
            return Err(syn::Error::new_spanned(receiver, message));
        }
    };
    match &*typed.ty {
        Type::Reference(reference) => {
            let owned = reference.elem.to_token_stream().to_string();
            let message = format!("an argument of a handler is owned: take it by value, `{owned}`");
            Err(syn::Error::new_spanned(reference, message))
        }
        Type::ImplTrait(bounds) => {
            let message =
                "an argument of a handler has a named type, because the type says how it is extracted";
            Err(syn::Error::new_spanned(bounds, message))
        }
        named => Ok(named),
    }
}

/// The expression that makes the `HandlerDefinition`.
fn definition(signature: &Signature, arguments: &[&Type], options: &Options) -> TokenStream {
    let name = signature.ident.unraw().to_string();
    let audience = match &options.audience {
        Audience::Group(group) => quote!(group(#group)),
        Audience::Broadcast => quote!(broadcast()),
        Audience::DurableBroadcast => quote!(durable_broadcast()),
    };
    let Options {
        topic,
        types,
        concurrency,
        batch,
        batch_wait,
        order,
        start,
        lanes,
        rate,
        instance_rate,
        window,
        filter,
        timeout,
        retry,
        expired,
        unknown,
        undecodable,
        breaker,
        connections,
        on_dead_letter,
        dead_letters_of,
        ..
    } = options;
    let topic = topic.iter();
    let concurrency = concurrency.iter();
    let batch = batch.iter().map(|(messages, _)| messages);
    let batch_wait = batch_wait.map(|(wait, _)| wait.expression()).into_iter();
    let order = order.iter();
    let start = start.iter();
    let lanes = lanes.iter();
    let rate = rate.iter();
    let instance_rate = instance_rate.iter();
    let window = window.iter();
    let filter = filter.iter();
    let timeout = timeout.map(Interval::expression).into_iter();
    let retry = retry.as_ref().map(Retry::expression).into_iter();
    let expired = expired.iter();
    let unknown = unknown.iter();
    let undecodable = undecodable.iter();
    let breaker = breaker.iter();
    let connections = connections.iter();
    let on_dead_letter = on_dead_letter
        .iter()
        .map(|function| quote_spanned!(function.span()=> .on_dead_letter(#function)));
    let dead_letters_of = dead_letters_of.iter();
    let permanent = options.retry.as_ref().and_then(Retry::dead_letter_on);
    let call = call(signature, arguments, permanent);
    let has_batch = options.batch.is_some();
    let fits = fits(signature, arguments, has_batch, options.batch_wait.is_some());
    let declared = arguments.iter().map(|argument| match has_batch {
        true => quote_spanned!(argument.span()=> .argument_beside_batch::<#argument>()),
        false => quote!(.argument::<#argument>()),
    });
    quote! {
        #fits
        ::postbox_consumer::HandlerDefinition::new(::core::concat!(::core::module_path!(), "::", #name))
            .#audience
            #(.topic(#topic))*
            #(.dead_letters_of(#dead_letters_of))*
            #(.message_type(#types))*
            #(.concurrency(#concurrency))*
            #(.batch(#batch))*
            #(.batch_wait(#batch_wait))*
            #(.order(::postbox_consumer::#order))*
            #(.start(::postbox_consumer::#start))*
            #(.lanes(#lanes))*
            #(.rate(#rate))*
            #(.instance_rate(#instance_rate))*
            #(.window(#window))*
            #(.filter(#filter))*
            #(.timeout(#timeout))*
            #(.retry(#retry))*
            #(.expired(::postbox_consumer::#expired))*
            #(.unknown(::postbox_consumer::#unknown))*
            #(.undecodable(::postbox_consumer::#undecodable))*
            #(.breaker(::postbox_consumer::#breaker))*
            #(.connections(#connections))*
            #(#on_dead_letter)*
            #(#declared)*
            .call(#call)
    }
}

/// What refuses to compile where the arguments, the options and the return value do not go together. By their types, not by their names: what is an
/// alias is taken for what it is.
pub(crate) fn fits(signature: &Signature, arguments: &[&Type], batch: bool, batch_wait: bool) -> TokenStream {
    let result_of_each = match &signature.output {
        // `impl Trait` cannot be named here.
        ReturnType::Type(_, output) if !matches!(**output, Type::ImplTrait(_)) => {
            quote_spanned!(output.span()=> <#output as ::postbox_consumer::IntoOutcome>::OF_EACH)
        }
        _ => quote!(false),
    };
    let needs = arguments
        .iter()
        .map(|argument| quote_spanned!(argument.span()=> <#argument as ::postbox_consumer::Extract>::NEEDS));
    quote_spanned! {signature.ident.span()=>
        const _: () = ::postbox_consumer::__private::fits(&[#(#needs),*], #batch, #batch_wait, #result_of_each);
    }
}

/// The closure that extracts the arguments and calls the function. The types keep their spans, so that the
/// compiler points at an argument that is no extractor and at a return type that is no outcome.
pub(crate) fn call(signature: &Signature, arguments: &[&Type], permanent: Option<&ExprPath>) -> TokenStream {
    let function = &signature.ident;
    let names: Vec<_> = (0..arguments.len())
        .map(|position| format_ident!("argument_{position}"))
        .collect();
    let extract = names.iter().zip(arguments).map(|(name, argument)| {
        quote_spanned! {argument.span()=>
            let #name = <#argument as ::postbox_consumer::Extract>::extract(&mut invocation).await?;
        }
    });
    let invocation = if arguments.is_empty() {
        quote!(_invocation)
    } else {
        quote!(mut invocation)
    };
    let outcome = match &signature.output {
        ReturnType::Default => quote!(<() as ::postbox_consumer::IntoOutcome>),
        // `impl Trait` cannot be named here.
        ReturnType::Type(_, output) if matches!(**output, Type::ImplTrait(_)) => {
            quote_spanned!(output.span()=> ::postbox_consumer::IntoOutcome)
        }
        ReturnType::Type(_, output) => {
            quote_spanned!(output.span()=> <#output as ::postbox_consumer::IntoOutcome>)
        }
    };
    let outcome = match permanent {
        None => quote!(#outcome::into_outcome(#function(#(#names),*).await)),
        Some(path) => quote_spanned! {path.span()=>
            ::postbox_consumer::__private::classified(#function(#(#names),*).await, #path)
        },
    };
    quote! {
        |#invocation| ::std::boxed::Box::pin(async move {
            #(#extract)*
            #outcome
        })
    }
}

/// The struct that shares the function's name and visibility. It has braces, because a unit struct would be a
/// value of that name too.
fn beside(function: &ItemFn, define: &TokenStream) -> TokenStream {
    let name = &function.sig.ident;
    let visibility = &function.vis;
    let conditions: Vec<&Attribute> = function
        .attrs
        .iter()
        .filter(|attribute| attribute.path().is_ident("cfg"))
        .collect();
    quote! {
        #(#conditions)*
        #[doc(hidden)]
        #[allow(non_camel_case_types)]
        #visibility struct #name {}

        #(#conditions)*
        #[automatically_derived]
        impl ::postbox_consumer::DefineHandler for #name {
            fn define() -> ::postbox_consumer::HandlerDefinition {
                #define
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expansion(options: TokenStream, item: TokenStream) -> String {
        expand(options, item).to_string()
    }

    #[test]
    fn the_function_stays_untouched() {
        let item = quote! {
            /// Documented.
            #[tracing::instrument]
            pub(crate) async fn ship(mut tx: Tx, State(stock): State<Stock>) -> Result<(), Oh> { ship_it().await }
        };
        let expansion = expansion(quote!(group = "g"), item.clone());
        assert!(expansion.starts_with(&item.to_string()), "{expansion}");
        assert!(expansion.contains("pub (crate) struct ship { }"), "{expansion}");
    }

    #[test]
    fn every_option_becomes_one_call() {
        let expansion = expansion(
            quote! {
                group = "inventory", topic = "orders", types = ["a", "b"], concurrency = 64, order = "topic",
                start = "latest", lanes = LANES, rate = 200, instance_rate = 0.5, window = "22:00-06:00 UTC", filter = "$.key == \"a\"", timeout = "20s",
                retry(backoff = "linear(1s, 1m)", exhausted = "halt", max_attempts = 8, max_age = "1d"),
                on_dead_letter = support::tell,
            },
            quote!(
                async fn ship(order: OrderPlaced) {}
            ),
        );
        let expected = quote! {
            ::postbox_consumer::HandlerDefinition::new(::core::concat!(::core::module_path!(), "::", "ship"))
                .group("inventory")
                .topic("orders")
                .message_type("a")
                .message_type("b")
                .concurrency(64)
                .order(::postbox_consumer::MessageOrder::Topic)
                .start(::postbox_consumer::Position::Latest)
                .lanes(LANES)
                .rate(::core::primitive::f64::from(200))
                .instance_rate(::core::primitive::f64::from(0.5))
                .window("22:00-06:00 UTC")
                .filter("$.key == \"a\"")
                .timeout(::core::time::Duration::from_millis(20000u64))
                .retry(
                    ::postbox_consumer::Retry::linear(
                        ::core::time::Duration::from_millis(1000u64),
                        ::core::time::Duration::from_millis(60000u64)
                    )
                    .max_attempts(8)
                    .max_age(::core::time::Duration::from_millis(86400000u64))
                    .exhausted(::postbox_consumer::Exhausted::Halt)
                )
                .on_dead_letter(support::tell)
                .argument::<OrderPlaced>()
                .call(|mut invocation| ::std::boxed::Box::pin(async move {
                    let argument_0 =
                        <OrderPlaced as ::postbox_consumer::Extract>::extract(&mut invocation).await?;
                    <() as ::postbox_consumer::IntoOutcome>::into_outcome(ship(argument_0).await)
                }))
        };
        assert!(
            expansion.contains(&expected.to_string()),
            "{expansion}\n{expected}"
        );
    }

    #[test]
    fn a_retry_without_a_backoff_starts_from_the_default() {
        let expansion = expansion(
            quote!(broadcast, retry(max_attempts = 3)),
            quote!(
                async fn ship() {}
            ),
        );
        let expected = quote!(.broadcast().retry(::postbox_consumer::Retry::default().max_attempts(3)));
        assert!(expansion.contains(&expected.to_string()), "{expansion}");
    }

    #[test]
    fn only_who_has_dead_letters_may_ask_for_them() {
        for (options, refused) in [
            (quote!(broadcast, on_dead_letter = tell), true),
            (quote!(broadcast = "durable", on_dead_letter = tell), false),
            (quote!(group = "g", on_dead_letter = tell), false),
        ] {
            let item = quote!(
                async fn ship() {}
            );
            let expansion = expansion(options, item);
            assert_eq!(expansion.contains("has no dead letters"), refused, "{expansion}");
        }
    }

    #[test]
    fn a_wrong_option_still_defines_the_handler() {
        let expansion = expansion(
            quote!(grup = "g"),
            quote!(
                async fn ship() {}
            ),
        );
        assert!(expansion.contains("unknown option `grup`"), "{expansion}");
        assert!(expansion.contains("DefineHandler for ship"), "{expansion}");
    }
}
