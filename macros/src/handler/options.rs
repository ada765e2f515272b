//! The options of `#[handler]`.

use proc_macro2::{Span, TokenStream};
use quote::quote;
use syn::parse::ParseStream;
use syn::punctuated::Punctuated;
use syn::{Expr, ExprLit, ExprPath, Ident, Lit, LitStr, Path, Token, bracketed};

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
    "filter",
    "timeout",
    "retry",
    "expired",
    "unknown",
    "undecodable",
    "breaker",
    "connections",
    "on_dead_letter",
    "dead_letters_of",
    "crate",
];

/// Who gets each message.
pub(super) enum Audience {
    Group(Expr),
    Broadcast,
    DurableBroadcast,
}

/// What `#[handler(…)]` says.
pub(super) struct Options {
    pub(super) audience: Audience,
    pub(super) topic: Option<Expr>,
    pub(super) types: Vec<Expr>,
    pub(super) concurrency: Option<Expr>,
    pub(super) batch: Option<(Expr, Span)>,
    pub(super) batch_wait: Option<(Interval, Span)>,
    pub(super) order: Option<TokenStream>,
    pub(super) start: Option<TokenStream>,
    pub(super) lanes: Option<Expr>,
    pub(super) rate: Option<Expr>,
    pub(super) instance_rate: Option<Expr>,
    pub(super) window: Option<LitStr>,
    pub(super) filter: Option<Expr>,
    pub(super) timeout: Option<Interval>,
    pub(super) retry: Option<Retry>,
    pub(super) expired: Option<TokenStream>,
    pub(super) unknown: Option<TokenStream>,
    pub(super) undecodable: Option<TokenStream>,
    pub(super) breaker: Option<TokenStream>,
    pub(super) connections: Option<Expr>,
    pub(super) on_dead_letter: Option<ExprPath>,
    pub(super) dead_letters_of: Option<Expr>,
    pub(super) krate: Option<Path>,
}

impl Options {
    pub(super) fn read(input: ParseStream<'_>) -> syn::Result<Self> {
        let (mut group, mut broadcast) = (None, None);
        let (mut topic, mut types) = (None, Vec::new());
        let (mut concurrency, mut lanes, mut timeout, mut retry) = (None, None, None, None);
        let (mut batch, mut batch_wait) = (None, None);
        let (mut rate, mut instance_rate, mut window, mut pace) = (None, None, None, None);
        let (mut order, mut start, mut expired, mut on_dead_letter) = (None, None, None, None);
        let (mut unknown, mut filter) = (None, None);
        let (mut undecodable, mut breaker, mut connections) = (None, None, None);
        let (mut dead_letters_of, mut krate) = (None, None);
        attribute::read_options(input, "#[handler]", KNOWN, |option, name, input| {
            match name {
                "group" => {
                    group = Some((
                        attribute::name_or_constant(option, "inventory", input)?,
                        option.span(),
                    ))
                }
                "broadcast" => broadcast = Some((read_broadcast(option, input)?, option.span())),
                "topic" => topic = Some(attribute::name_or_constant(option, "orders", input)?),
                "type" | "types" if !types.is_empty() => {
                    return Err(syn::Error::new(option.span(), "give either `type` or `types`"));
                }
                "type" => types.push(attribute::name_or_constant(option, "order.placed", input)?),
                "types" => types = read_types(option, input)?,
                "concurrency" => concurrency = Some(attribute::count(option, input)?),
                "batch" => batch = Some((attribute::count(option, input)?, option.span())),
                "batch_wait" => {
                    batch_wait = Some((attribute::interval(option, "20ms", input)?, option.span()))
                }
                "order" => {
                    let choices = [
                        ("key", quote!(MessageOrder::Key)),
                        ("topic", quote!(MessageOrder::Topic)),
                        ("none", quote!(MessageOrder::None)),
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
                "unknown" => {
                    let choices = [
                        ("wait", quote!(UnknownType::Wait)),
                        ("settle", quote!(UnknownType::Settle)),
                        ("fail", quote!(UnknownType::Fail)),
                        ("dead_letter", quote!(UnknownType::DeadLetter)),
                    ];
                    unknown = Some(attribute::choice(option, &choices, input)?);
                }
                "undecodable" => {
                    let choices = [
                        ("dead_letter", quote!(Undecodable::DeadLetter)),
                        ("retry", quote!(Undecodable::Retry)),
                    ];
                    undecodable = Some(attribute::choice(option, &choices, input)?);
                }
                "breaker" => {
                    let choices = [("on", quote!(Breaker::On)), ("off", quote!(Breaker::Off))];
                    breaker = Some(attribute::choice(option, &choices, input)?);
                }
                "connections" => connections = Some(attribute::count(option, input)?),
                "start" => {
                    let choices = [
                        ("earliest", quote!(Position::Earliest)),
                        ("latest", quote!(Position::Latest)),
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
                "filter" => {
                    filter = Some(attribute::text_or_constant(
                        option,
                        "$.payload.total > 100",
                        input,
                    )?);
                }
                "timeout" => timeout = Some(attribute::interval(option, "20s", input)?),
                "dead_letters_of" => {
                    dead_letters_of = Some((
                        attribute::name_or_constant(option, "inventory", input)?,
                        option.span(),
                    ))
                }
                "crate" => {
                    krate = Some(attribute::path(
                        option,
                        "shop::reexports::postbox_consumer",
                        input,
                    )?)
                }
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
        if let (Some(_), Some((_, span))) = (&topic, &dead_letters_of) {
            let message = "the dead letters of a group are a topic of their own: leave `topic` out";
            return Err(syn::Error::new(*span, message));
        }
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
            filter,
            timeout,
            retry,
            expired,
            unknown,
            undecodable,
            breaker,
            connections,
            on_dead_letter: on_dead_letter.map(|(function, _)| function),
            dead_letters_of: dead_letters_of.map(|(group, _)| group),
            krate,
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

fn read_types(option: &Ident, input: ParseStream<'_>) -> syn::Result<Vec<Expr>> {
    let mend = "`types` takes strings in brackets: types = [\"order.placed\", \"order.paid\"]";
    if !(input.peek(Token![=]) && input.peek2(syn::token::Bracket)) {
        return Err(syn::Error::new(option.span(), mend));
    }
    input.parse::<Token![=]>()?;
    let content;
    bracketed!(content in input);
    let types: Vec<Expr> = Punctuated::<Expr, Token![,]>::parse_terminated(&content)?
        .into_iter()
        .map(attribute::ungrouped)
        .collect();
    if types.is_empty() {
        return Err(syn::Error::new(option.span(), mend));
    }
    for each in &types {
        match each {
            Expr::Lit(ExprLit {
                lit: Lit::Str(literal),
                ..
            }) => name::check("type", literal)?,
            Expr::Path(_) | Expr::Macro(_) => {}
            other => return Err(syn::Error::new_spanned(other, mend)),
        }
    }
    Ok(types)
}
