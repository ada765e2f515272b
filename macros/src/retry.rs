//! The `retry(…)` option of a handler.

use proc_macro2::TokenStream;
use quote::quote;
use syn::parse::ParseStream;
use syn::{Expr, ExprPath, Ident, parenthesized};

use crate::attribute;
use crate::duration::Interval;

const KNOWN: &[&str] = &[
    "max_attempts",
    "max_age",
    "backoff",
    "exhausted",
    "dead_letter_on",
];

/// How a failed message is tried again, and what becomes of it in the end.
#[derive(Default)]
pub(crate) struct Retry {
    backoff: Option<Backoff>,
    max_attempts: Option<Expr>,
    max_age: Option<Interval>,
    exhausted: Option<TokenStream>,
    dead_letter_on: Option<ExprPath>,
}

impl Retry {
    /// Reads `(…)`.
    pub(crate) fn read(option: &Ident, input: ParseStream<'_>) -> syn::Result<Self> {
        let mend = "`retry` takes options in parentheses: retry(max_attempts = 8, backoff = \"exponential(1s, 10m)\")";
        if !input.peek(syn::token::Paren) {
            return Err(syn::Error::new(option.span(), mend));
        }
        let content;
        parenthesized!(content in input);
        if content.is_empty() {
            return Err(syn::Error::new(option.span(), mend));
        }
        let mut retry = Self::default();
        attribute::read_options(&content, "retry", KNOWN, |option, name, input| {
            match name {
                "max_attempts" => retry.max_attempts = Some(attribute::count(option, input)?),
                "max_age" => retry.max_age = Some(attribute::interval(option, "1d", input)?),
                "exhausted" => {
                    let choices = [("skip", quote!(Skip)), ("halt", quote!(Halt))];
                    retry.exhausted = Some(attribute::choice(option, &choices, input)?);
                }
                "dead_letter_on" => retry.dead_letter_on = Some(read_predicate(option, input)?),
                _ => retry.backoff = Some(Backoff::read(option, input)?),
            }
            Ok(())
        })?;
        Ok(retry)
    }

    /// The function that says of an error that trying again cannot help.
    pub(crate) fn dead_letter_on(&self) -> Option<&ExprPath> {
        self.dead_letter_on.as_ref()
    }

    /// The expression that makes it.
    pub(crate) fn expression(&self) -> TokenStream {
        let start = self
            .backoff
            .as_ref()
            .map_or_else(|| quote!(default()), Backoff::expression);
        let max_attempts = self.max_attempts.iter();
        let max_age = self.max_age.map(Interval::expression).into_iter();
        let exhausted = self.exhausted.iter();
        quote! {
            ::postbox_consumer::Retry::#start
                #(.max_attempts(#max_attempts))*
                #(.max_age(#max_age))*
                #(.exhausted(::postbox_consumer::Exhausted::#exhausted))*
        }
    }
}

fn read_predicate(option: &Ident, input: ParseStream<'_>) -> syn::Result<ExprPath> {
    let mend = || {
        format!(
            "`{option}` takes the name of a function of the handler's error: {option} = PayError::is_permanent"
        )
    };
    match attribute::value(option, mend, input)? {
        Expr::Path(path) => Ok(path),
        other => Err(syn::Error::new_spanned(other, mend())),
    }
}

/// How the waits grow.
#[derive(Debug, PartialEq)]
enum Backoff {
    Exponential { first: Interval, cap: Interval },
    Linear { step: Interval, cap: Interval },
    Fixed(Interval),
}

impl Backoff {
    fn read(option: &Ident, input: ParseStream<'_>) -> syn::Result<Self> {
        let literal = attribute::string(option, "exponential(1s, 10m)", input)?;
        Self::parse(&literal.value()).map_err(|message| syn::Error::new(literal.span(), message))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mend = || {
            format!(
                "{text:?} is no backoff: write \"exponential(1s, 10m)\" (first wait, longest wait), \
                 \"linear(1s, 1m)\" (step, longest wait) or \"fixed(5s)\""
            )
        };
        let (shape, rest) = text.trim().split_once('(').ok_or_else(mend)?;
        let waits = rest.strip_suffix(')').ok_or_else(mend)?.split(',');
        let waits: Vec<&str> = waits.map(str::trim).collect();
        match (shape.trim(), waits.as_slice()) {
            ("exponential", [first, cap]) => {
                let (first, cap) = growing(first, cap)?;
                Ok(Self::Exponential { first, cap })
            }
            ("linear", [step, cap]) => {
                let (step, cap) = growing(step, cap)?;
                Ok(Self::Linear { step, cap })
            }
            ("fixed", [wait]) => Ok(Self::Fixed(Interval::parse(wait)?)),
            _ => Err(mend()),
        }
    }

    fn expression(&self) -> TokenStream {
        match self {
            Self::Exponential { first, cap } => {
                let (first, cap) = (first.expression(), cap.expression());
                quote!(exponential(#first, #cap))
            }
            Self::Linear { step, cap } => {
                let (step, cap) = (step.expression(), cap.expression());
                quote!(linear(#step, #cap))
            }
            Self::Fixed(wait) => {
                let wait = wait.expression();
                quote!(fixed(#wait))
            }
        }
    }
}

fn growing(first: &str, cap: &str) -> Result<(Interval, Interval), String> {
    let intervals = (Interval::parse(first)?, Interval::parse(cap)?);
    if intervals.1 < intervals.0 {
        return Err(format!(
            "the longest wait, {cap}, is shorter than the first, {first}"
        ));
    }
    Ok(intervals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backoff_is_a_shape_and_its_waits() {
        let interval = |text| Interval::parse(text).unwrap();
        assert_eq!(
            Backoff::parse("exponential(1s, 10m)"),
            Ok(Backoff::Exponential {
                first: interval("1s"),
                cap: interval("10m")
            })
        );
        assert_eq!(
            Backoff::parse("linear(1s,1m)"),
            Ok(Backoff::Linear {
                step: interval("1s"),
                cap: interval("1m")
            })
        );
        assert_eq!(Backoff::parse("fixed( 5s )"), Ok(Backoff::Fixed(interval("5s"))));
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "fixed",
            "fixed(5s",
            "fixed(1s, 2s)",
            "linear(1s)",
            "quadratic(1s, 2s)",
            "linear(2m, 1m)",
        ] {
            assert!(Backoff::parse(text).is_err(), "{text:?} was taken");
        }
    }
}
