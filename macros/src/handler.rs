//! `#[handler]`: a definition beside an async function, in the type namespace under the function's name.

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::ext::IdentExt;
use syn::parse::{ParseStream, Parser};
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::{
    Attribute, Expr, ExprPath, FnArg, Ident, ItemFn, LitStr, PathSegment, ReturnType, Signature, Token, Type,
    bracketed,
};

use crate::attribute;
use crate::duration::Interval;
use crate::name;
use crate::retry::Retry;

const KNOWN: &[&str] = &[
    "group",
    "broadcast",
    "topic",
    "type",
    "types",
    "concurrency",
    "batch",
    "batch_wait",
    "order",
    "start",
    "lanes",
    "rate",
    "instance_rate",
    "window",
    "timeout",
    "retry",
    "expired",
    "on_dead_letter",
];

/// The item as it was, and its definition or the errors.
pub(crate) fn expand(options: TokenStream, item: TokenStream) -> TokenStream {
    expand_with("#[handler]", item, |signature, arguments| {
        let options = Options::read.parse2(options)?;
        check_batch(&options, arguments)?;
        check_result(signature, arguments)?;
        Ok(definition(signature, arguments, &options))
    })
}

/// As [`expand`], for any attribute that makes a handler of a function: `define` gives the expression that makes the definition.
pub(crate) fn expand_with(
    attribute: &str,
    item: TokenStream,
    define: impl FnOnce(&Signature, &[&Type]) -> syn::Result<TokenStream>,
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
    let define = define(&function.sig, &arguments).unwrap_or_else(|error| {
        let error = error.into_compile_error();
        quote!(#error ::core::unreachable!())
    });
    let definition = beside(&function, &define);
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

/// Who gets each message.
enum Audience {
    Group(LitStr),
    Broadcast,
    DurableBroadcast,
}

/// What `#[handler(…)]` says.
struct Options {
    audience: Audience,
    topic: Option<LitStr>,
    types: Vec<LitStr>,
    concurrency: Option<Expr>,
    batch: Option<(Expr, Span)>,
    batch_wait: Option<(Interval, Span)>,
    order: Option<TokenStream>,
    start: Option<TokenStream>,
    lanes: Option<Expr>,
    rate: Option<Expr>,
    instance_rate: Option<Expr>,
    window: Option<LitStr>,
    timeout: Option<Interval>,
    retry: Option<Retry>,
    expired: Option<TokenStream>,
    on_dead_letter: Option<ExprPath>,
}

impl Options {
    fn read(input: ParseStream<'_>) -> syn::Result<Self> {
        let (mut group, mut broadcast) = (None, None);
        let (mut topic, mut types) = (None, Vec::new());
        let (mut concurrency, mut lanes, mut timeout, mut retry) = (None, None, None, None);
        let (mut batch, mut batch_wait) = (None, None);
        let (mut rate, mut instance_rate, mut window, mut pace) = (None, None, None, None);
        let (mut order, mut start, mut expired, mut on_dead_letter) = (None, None, None, None);
        attribute::read_options(input, "#[handler]", KNOWN, |option, name, input| {
            match name {
                "group" => group = Some((attribute::name(option, "inventory", input)?, option.span())),
                "broadcast" => broadcast = Some((read_broadcast(option, input)?, option.span())),
                "topic" => topic = Some(attribute::name(option, "orders", input)?),
                "type" | "types" if !types.is_empty() => {
                    return Err(syn::Error::new(option.span(), "give either `type` or `types`"));
                }
                "type" => types.push(attribute::name(option, "order.placed", input)?),
                "types" => types = read_types(option, input)?,
                "concurrency" => concurrency = Some(attribute::count(option, input)?),
                "batch" => batch = Some((attribute::count(option, input)?, option.span())),
                "batch_wait" => {
                    batch_wait = Some((attribute::interval(option, "20ms", input)?, option.span()))
                }
                "order" => {
                    let choices = [
                        ("key", quote!(Order::Key)),
                        ("topic", quote!(Order::Topic)),
                        ("none", quote!(Order::None)),
                    ];
                    order = Some(attribute::choice(option, &choices, input)?);
                }
                "expired" => {
                    let choices = [
                        ("settle", quote!(Expired::Settle)),
                        ("dead_letter", quote!(Expired::DeadLetter)),
                    ];
                    expired = Some(attribute::choice(option, &choices, input)?);
                }
                "start" => {
                    let choices = [
                        ("earliest", quote!(Start::Earliest)),
                        ("latest", quote!(Start::Latest)),
                    ];
                    start = Some(attribute::choice(option, &choices, input)?);
                }
                "lanes" => lanes = Some(attribute::count(option, input)?),
                "rate" | "instance_rate" => {
                    let messages = Some(attribute::rate(option, input)?);
                    match name {
                        "rate" => rate = messages,
                        _ => instance_rate = messages,
                    }
                    pace = Some(option.clone());
                }
                "window" => {
                    window = Some(attribute::string(option, "22:00-06:00 Europe/Berlin", input)?);
                    pace = Some(option.clone());
                }
                "timeout" => timeout = Some(attribute::interval(option, "20s", input)?),
                "on_dead_letter" => on_dead_letter = Some((read_function(option, input)?, option.span())),
                _ => retry = Some(Retry::read(option, input)?),
            }
            Ok(())
        })?;
        let audience = match (group, broadcast) {
            (Some((group, _)), None) => Audience::Group(group),
            (None, Some((broadcast, _))) => broadcast,
            (Some(_), Some((_, span))) => {
                let message = "`group` and `broadcast` exclude each other: a group handles each message once, \
                               a broadcast once on every node";
                return Err(syn::Error::new(span, message));
            }
            (None, None) => {
                let message = "add group = \"…\", the consumers that share the messages, or broadcast, for \
                               every node";
                return Err(syn::Error::new(Span::call_site(), message));
            }
        };
        if let (Audience::Broadcast, Some((_, span))) = (&audience, &on_dead_letter) {
            let message = "a broadcast from memory has no dead letters: `on_dead_letter` goes with group = \"…\" or \
                           broadcast = \"durable\"";
            return Err(syn::Error::new(*span, message));
        }
        if let (Audience::Broadcast, Some(option)) = (&audience, &pace) {
            let message = format!(
                "a broadcast from memory goes as fast as it can: `{option}` goes with group = \"…\" or broadcast = \"durable\""
            );
            return Err(syn::Error::new(option.span(), message));
        }
        Ok(Self {
            audience,
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
            timeout,
            retry,
            expired,
            on_dead_letter: on_dead_letter.map(|(function, _)| function),
        })
    }
}

fn read_broadcast(option: &Ident, input: ParseStream<'_>) -> syn::Result<Audience> {
    if !input.peek(Token![=]) {
        return Ok(Audience::Broadcast);
    }
    attribute::choice(option, &[("durable", ())], input)?;
    Ok(Audience::DurableBroadcast)
}

/// The path in `= notify` or `= crate::support::notify`.
fn read_function(option: &Ident, input: ParseStream<'_>) -> syn::Result<ExprPath> {
    let mend = || format!("`{option}` takes the name of an async function: {option} = tell_support");
    match attribute::value(option, mend, input)? {
        Expr::Path(path) => Ok(path),
        other => Err(syn::Error::new_spanned(other, mend())),
    }
}

fn read_types(option: &Ident, input: ParseStream<'_>) -> syn::Result<Vec<LitStr>> {
    let mend = "`types` takes strings in brackets: types = [\"order.placed\", \"order.paid\"]";
    if !(input.peek(Token![=]) && input.peek2(syn::token::Bracket)) {
        return Err(syn::Error::new(option.span(), mend));
    }
    input.parse::<Token![=]>()?;
    let content;
    bracketed!(content in input);
    let types: Vec<LitStr> = Punctuated::<LitStr, Token![,]>::parse_terminated(&content)?
        .into_iter()
        .collect();
    if types.is_empty() {
        return Err(syn::Error::new(option.span(), mend));
    }
    types.iter().try_for_each(|each| name::check("type", each))?;
    Ok(types)
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
        timeout,
        retry,
        expired,
        on_dead_letter,
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
    let timeout = timeout.map(Interval::expression).into_iter();
    let retry = retry.as_ref().map(Retry::expression).into_iter();
    let expired = expired.iter();
    let on_dead_letter = on_dead_letter.iter().map(letter_call);
    let call = call(signature, arguments);
    let has_batch = options.batch.is_some();
    let declared = arguments
        .iter()
        .map(|argument| match has_batch && !is_batch(argument) {
            true => quote_spanned!(argument.span()=> .argument_beside_batch::<#argument>()),
            false => quote!(.argument::<#argument>()),
        });
    quote! {
        ::postbox_consumer::HandlerDefinition::new(::core::concat!(::core::module_path!(), "::", #name))
            .#audience
            #(.topic(#topic))*
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
            #(.timeout(#timeout))*
            #(.retry(#retry))*
            #(.expired(::postbox_consumer::#expired))*
            #(.on_dead_letter(#on_dead_letter))*
            #(#declared)*
            .call(#call)
    }
}

/// Whether the argument is a batch, by its name.
fn is_batch(argument: &Type) -> bool {
    last_segment(argument).is_some_and(|segment| segment.ident == "Batch" && !segment.arguments.is_none())
}

fn last_segment(named: &Type) -> Option<&PathSegment> {
    match named {
        Type::Path(path) => path.path.segments.last(),
        _ => None,
    }
}

/// Who returns a `BatchResult` has a batch whose messages can fail one by one.
fn check_result(signature: &Signature, arguments: &[&Type]) -> syn::Result<()> {
    let is = |named: &Type, name: &str| last_segment(named).is_some_and(|segment| segment.ident == name);
    let output = match &signature.output {
        ReturnType::Type(_, output) if is(output, "BatchResult") => output,
        _ => return Ok(()),
    };
    if !arguments.iter().any(|argument| is_batch(argument)) {
        let message = "`BatchResult` says which messages of a batch failed: take a `Batch<…>`, or return `Result<(), HandlerError>`";
        return Err(syn::Error::new_spanned(output, message));
    }
    if arguments.iter().any(|argument| is(argument, "Tx")) {
        let message = "a `Tx` commits whole, so no single messages of its batch can fail: return `Result<(), HandlerError>`";
        return Err(syn::Error::new_spanned(output, message));
    }
    Ok(())
}

/// The option and the argument go together.
fn check_batch(options: &Options, arguments: &[&Type]) -> syn::Result<()> {
    let mut batches = arguments.iter().filter(|argument| is_batch(argument));
    match (&options.batch, &options.batch_wait, batches.next()) {
        (Some((_, span)), _, None) => {
            let message =
                "`batch` is for a handler that takes many messages at once: take them as `Batch<…>`";
            Err(syn::Error::new(*span, message))
        }
        (None, _, Some(argument)) => {
            let message = "a handler of batches says how many messages it takes at once: add batch = 100";
            Err(syn::Error::new_spanned(argument, message))
        }
        (None, Some((_, span)), None) => {
            let message = "`batch_wait` is how long a batch waits for more messages, and goes with `batch`";
            Err(syn::Error::new(*span, message))
        }
        _ => match batches.next() {
            Some(second) => Err(syn::Error::new_spanned(second, "a handler takes one batch")),
            None => Ok(()),
        },
    }
}

/// The closure that extracts the arguments and calls the function. The types keep their spans, so that the
/// compiler points at an argument that is no extractor and at a return type that is no outcome.
pub(crate) fn call(signature: &Signature, arguments: &[&Type]) -> TokenStream {
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
    quote! {
        |#invocation| ::std::boxed::Box::pin(async move {
            #(#extract)*
            #outcome::into_outcome(#function(#(#names),*).await)
        })
    }
}

/// The closure that calls the function of `on_dead_letter`. It keeps the path's span, so that the compiler points there at a
/// function that takes or returns something else.
fn letter_call(function: &ExprPath) -> TokenStream {
    quote_spanned! {function.span()=>
        |letter| ::std::boxed::Box::pin(async move {
            ::postbox_consumer::IntoOutcome::into_outcome(#function(letter).await)
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
                start = "latest", lanes = LANES, rate = 200, instance_rate = 0.5, window = "22:00-06:00 UTC", timeout = "20s",
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
                .order(::postbox_consumer::Order::Topic)
                .start(::postbox_consumer::Start::Latest)
                .lanes(LANES)
                .rate(::core::primitive::f64::from(200))
                .instance_rate(::core::primitive::f64::from(0.5))
                .window("22:00-06:00 UTC")
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
                .on_dead_letter(|letter| ::std::boxed::Box::pin(async move {
                    ::postbox_consumer::IntoOutcome::into_outcome(support::tell(letter).await)
                }))
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
