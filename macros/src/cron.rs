//! `#[cron]`: a handler of a recurring message, beside an async function, as `#[handler]` makes it.

use proc_macro2::TokenStream;
use quote::quote;
use syn::ext::IdentExt;
use syn::parse::{ParseStream, Parser};
use syn::{LitStr, Path, Signature, Token, Type};

use crate::attribute;
use crate::duration::Interval;
use crate::handler;
use crate::retry::Retry;

const KNOWN: &[&str] = &["tz", "name", "group", "missed", "timeout", "retry", "crate"];

/// The item as it was, and its definition or the errors.
pub(crate) fn expand(options: TokenStream, item: TokenStream) -> TokenStream {
    handler::expand_with("#[cron]", item, |signature, arguments| {
        let options = Options::read.parse2(options)?;
        Ok((definition(signature, arguments, &options), options.krate))
    })
}

/// What `#[cron("…", …)]` says.
struct Options {
    schedule: LitStr,
    time_zone: Option<LitStr>,
    name: Option<LitStr>,
    group: Option<LitStr>,
    missed: Option<TokenStream>,
    timeout: Option<Interval>,
    retry: Option<Retry>,
    krate: Option<Path>,
}

impl Options {
    fn read(input: ParseStream<'_>) -> syn::Result<Self> {
        let mend = "give the schedule first: #[cron(\"0 6 * * mon-fri\", tz = \"Europe/Berlin\")]";
        let schedule: LitStr = input
            .parse()
            .map_err(|error| syn::Error::new(error.span(), mend))?;
        check_schedule(&schedule)?;
        if !input.is_empty() {
            input.parse::<Token![,]>()?;
        }
        let (mut time_zone, mut name, mut group) = (None, None, None);
        let (mut missed, mut timeout, mut retry, mut krate) = (None, None, None, None);
        attribute::read_options(input, "#[cron]", KNOWN, |option, known, input| {
            match known {
                "tz" => {
                    let zone = attribute::string(option, "Europe/Berlin", input)?;
                    check_zone(&zone)?;
                    time_zone = Some(zone);
                }
                "name" => name = Some(attribute::name(option, "billing/daily-report", input)?),
                "group" => group = Some(attribute::name(option, "reports", input)?),
                "missed" => {
                    let choices = [
                        ("once", quote!(Missed::Once)),
                        ("skip", quote!(Missed::Skip)),
                        ("all", quote!(Missed::All)),
                    ];
                    missed = Some(attribute::choice(option, &choices, input)?);
                }
                "timeout" => timeout = Some(attribute::interval(option, "20s", input)?),
                "crate" => {
                    krate = Some(attribute::path(
                        option,
                        "shop::reexports::postbox_consumer",
                        input,
                    )?)
                }
                _ => retry = Some(Retry::read(option, input)?),
            }
            Ok(())
        })?;
        Ok(Self {
            schedule,
            time_zone,
            name,
            group,
            missed,
            timeout,
            retry,
            krate,
        })
    }
}

/// The form alone; what the fields say is read when the consumer starts.
fn check_schedule(schedule: &LitStr) -> syn::Result<()> {
    let text = schedule.value();
    let is_macro = [
        "@hourly",
        "@daily",
        "@midnight",
        "@weekly",
        "@monthly",
        "@yearly",
        "@annually",
    ]
    .contains(&text.trim());
    if is_macro || matches!(text.split_whitespace().count(), 5 | 6) {
        return Ok(());
    }
    let message = format!(
        "{text:?} is no schedule: write five fields (minute, hour, day of the month, month, day of the week), six with the \
         second first, or one of @hourly, @daily, @weekly, @monthly, @yearly"
    );
    Err(syn::Error::new(schedule.span(), message))
}

/// The form alone, too.
fn check_zone(zone: &LitStr) -> syn::Result<()> {
    let text = zone.value();
    let is_in_name = |c: char| c.is_ascii_alphanumeric() || "_+-/".contains(c);
    if !text.is_empty() && text.chars().all(is_in_name) {
        return Ok(());
    }
    let message = format!("{text:?} is no time zone: use an IANA name such as Europe/Berlin or UTC");
    Err(syn::Error::new(zone.span(), message))
}

/// The expression that makes the `HandlerDefinition`. The package's name is that of the crate the function is in.
fn definition(signature: &Signature, arguments: &[&Type], options: &Options) -> TokenStream {
    let function = signature.ident.unraw().to_string();
    let name = match &options.name {
        Some(name) => quote!(#name),
        None => quote!(::core::concat!(::core::env!("CARGO_PKG_NAME"), "/", #function)),
    };
    let schedule = &options.schedule;
    let time_zone = match &options.time_zone {
        Some(time_zone) => quote!(#time_zone),
        None => quote!("UTC"),
    };
    let group = options.group.iter();
    let missed = options.missed.iter();
    let timeout = options.timeout.map(Interval::expression).into_iter();
    let retry = options.retry.as_ref().map(Retry::expression).into_iter();
    let permanent = options.retry.as_ref().and_then(Retry::dead_letter_on);
    let call = handler::call(signature, arguments, permanent);
    let fits = handler::fits(signature, arguments, false, false);
    quote! {
        #fits
        ::postbox_consumer::HandlerDefinition::new(::core::concat!(::core::module_path!(), "::", #function))
            .cron(#name, #schedule, #time_zone)
            #(.group(#group))*
            #(.missed(::postbox_consumer::#missed))*
            #(.timeout(#timeout))*
            #(.retry(#retry))*
            #(.argument::<#arguments>())*
            .call(#call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expansion(options: TokenStream) -> String {
        let item = quote!(
            async fn report(at: ScheduledAt) {}
        );
        expand(options, item).to_string()
    }

    #[test]
    fn the_name_is_the_package_and_the_function_unless_it_is_given() {
        let named = expansion(quote!("@daily"));
        let expected = quote!(.cron(
            ::core::concat!(::core::env!("CARGO_PKG_NAME"), "/", "report"), "@daily", "UTC"));
        assert!(named.contains(&expected.to_string()), "{named}");
        let named = expansion(quote!(
            "@daily",
            tz = "Europe/Berlin",
            name = "r",
            group = "g",
            missed = "all"
        ));
        let expected = quote!(.cron("r", "@daily", "Europe/Berlin").group("g")
            .missed(::postbox_consumer::Missed::All));
        assert!(named.contains(&expected.to_string()), "{named}");
    }

    #[test]
    fn a_mistake_is_an_error_at_its_place() {
        for (options, says) in [
            (quote!(), "give the schedule first"),
            (quote!(tz = "UTC"), "give the schedule first"),
            (quote!("0 6 * *"), "is no schedule"),
            (quote!("@dayly"), "is no schedule"),
            (quote!("@daily", tz = "Berlin time"), "is no time zone"),
            (quote!("@daily", zone = "UTC"), "unknown option `zone`"),
            (quote!("@daily", missed = "never"), "no `missed`"),
            (quote!("@daily", name = "a b"), "1 to 255 characters"),
        ] {
            let expansion = expansion(options);
            assert!(expansion.contains(says), "{expansion} says {says:?}");
        }
    }
}
