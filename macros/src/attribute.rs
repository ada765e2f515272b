//! The options inside an attribute: `name = value`, `name` or `name(…)`, separated by commas.

use proc_macro2::{Group, Literal, TokenStream, TokenTree};
use quote::ToTokens;
use syn::ext::IdentExt;
use syn::parse::ParseStream;
use syn::{Expr, ExprLit, Ident, Lit, LitStr, Path, Token};

use crate::duration::Interval;
use crate::name;

/// Reads the options of one attribute. `read` is called after each option's name, with the input standing at
/// its value. An option that is not `known` or is given twice is an error.
pub(crate) fn read_options(
    input: ParseStream<'_>,
    attribute: &str,
    known: &[&str],
    mut read: impl FnMut(&Ident, &str, ParseStream<'_>) -> syn::Result<()>,
) -> syn::Result<()> {
    let mut seen: Vec<String> = Vec::new();
    while !input.is_empty() {
        // `type` is a keyword and an option all the same.
        let ident = input.call(Ident::parse_any)?;
        let name = ident.to_string();
        if !known.contains(&name.as_str()) {
            let message = format!(
                "unknown option `{name}` of {attribute}; known are: {}",
                known.join(", ")
            );
            return Err(syn::Error::new(ident.span(), message));
        }
        if seen.contains(&name) {
            return Err(syn::Error::new(ident.span(), format!("`{name}` is given twice")));
        }
        read(&ident, &name, input)?;
        seen.push(name);
        if !input.is_empty() {
            input.parse::<Token![,]>()?;
        }
    }
    Ok(())
}

/// The string literal in `= "…"`.
pub(crate) fn string(option: &Ident, example: &str, input: ParseStream<'_>) -> syn::Result<LitStr> {
    let mend = || format!("`{option}` takes a string: {option} = \"{example}\"");
    let value = value(option, mend, input)?;
    match value {
        Expr::Lit(ExprLit {
            lit: Lit::Str(literal),
            ..
        }) => Ok(literal),
        _ => Err(syn::Error::new_spanned(value, mend())),
    }
}

/// The string literal in `= "…"` that names a topic, type or group.
pub(crate) fn name(option: &Ident, example: &str, input: ParseStream<'_>) -> syn::Result<LitStr> {
    let literal = string(option, example, input)?;
    name::check(&option.to_string(), &literal)?;
    Ok(literal)
}

/// The string in `= "…"` that names a topic, type or group, or a constant or macro that gives one, such as `concat!("a", ".b")`, which is checked when
/// the consumer starts.
pub(crate) fn name_or_constant(option: &Ident, example: &str, input: ParseStream<'_>) -> syn::Result<Expr> {
    let value = text_or_constant(option, example, input)?;
    if let Expr::Lit(ExprLit {
        lit: Lit::Str(literal),
        ..
    }) = &value
    {
        name::check(&option.to_string(), literal)?;
    }
    Ok(value)
}

/// The string in `= "…"`, or a constant or macro that gives one.
pub(crate) fn text_or_constant(option: &Ident, example: &str, input: ParseStream<'_>) -> syn::Result<Expr> {
    let mend = || format!("`{option}` takes a string: {option} = \"{example}\"");
    let value = value(option, mend, input)?;
    match &value {
        Expr::Lit(ExprLit { lit: Lit::Str(_), .. }) | Expr::Path(_) | Expr::Macro(_) => Ok(value),
        _ => Err(syn::Error::new_spanned(value, mend())),
    }
}

/// The path in `= "…"`, or as it is.
pub(crate) fn path(option: &Ident, example: &str, input: ParseStream<'_>) -> syn::Result<Path> {
    let mend = || format!("`{option}` takes the path of a crate: {option} = \"{example}\"");
    match value(option, mend, input)? {
        Expr::Lit(ExprLit {
            lit: Lit::Str(literal),
            ..
        }) => literal
            .parse()
            .map_err(|_| syn::Error::new(literal.span(), mend())),
        Expr::Path(path) => Ok(path.path),
        other => Err(syn::Error::new_spanned(other, mend())),
    }
}

/// The same tokens with another path where they say `::name`: for who has the crate under another name, or by way of another crate.
pub(crate) fn in_crate(name: &str, krate: Option<&Path>, tokens: TokenStream) -> TokenStream {
    let Some(krate) = krate else { return tokens };
    let mut out: Vec<TokenTree> = Vec::new();
    for token in tokens {
        match token {
            TokenTree::Group(group) => {
                let inner = in_crate(name, Some(krate), group.stream());
                let mut replaced = Group::new(group.delimiter(), inner);
                replaced.set_span(group.span());
                out.push(replaced.into());
            }
            TokenTree::Ident(ident) if ident == name && ends_with_colons(&out) => {
                out.truncate(out.len() - 2);
                out.extend(krate.to_token_stream());
            }
            // A path in a string, for another attribute.
            TokenTree::Literal(literal) if literal.to_string().starts_with(&format!("\"::{name}::")) => {
                let path = krate.to_token_stream().to_string();
                let text = literal.to_string().replacen(&format!("::{name}"), &path, 1);
                let mut replaced = Literal::string(text.trim_matches('"'));
                replaced.set_span(literal.span());
                out.push(replaced.into());
            }
            other => out.push(other),
        }
    }
    out.into_iter().collect()
}

fn ends_with_colons(tokens: &[TokenTree]) -> bool {
    let is_colon = |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ':');
    matches!(tokens, [.., first, second] if is_colon(first) && is_colon(second))
}

/// The expression in `= …`; without one, the error at the option's name says what it takes.
pub(crate) fn value(option: &Ident, mend: impl Fn() -> String, input: ParseStream<'_>) -> syn::Result<Expr> {
    let missing = |_| syn::Error::new(option.span(), mend());
    input.parse::<Token![=]>().map_err(missing)?;
    if input.is_empty() || input.peek(Token![,]) {
        return Err(syn::Error::new(option.span(), mend()));
    }
    input.parse().map(ungrouped)
}

/// What a macro of the user's took as `$it:literal` or `$it:expr` stands in a group that nobody wrote.
pub(crate) fn ungrouped(mut value: Expr) -> Expr {
    while let Expr::Group(group) = value {
        value = *group.expr;
    }
    value
}

/// One of the strings that the option knows; gives what stands beside it.
pub(crate) fn choice<T: Clone>(
    option: &Ident,
    choices: &[(&str, T)],
    input: ParseStream<'_>,
) -> syn::Result<T> {
    let literal = string(option, choices.first().map_or("", |(first, _)| first), input)?;
    let given = literal.value();
    let chosen = choices.iter().find(|(choice, _)| *choice == given);
    chosen.map(|(_, meaning)| meaning.clone()).ok_or_else(|| {
        let known: Vec<String> = choices.iter().map(|(choice, _)| format!("{choice:?}")).collect();
        let message = format!("{given:?} is no `{option}`; known are: {}", known.join(", "));
        syn::Error::new(literal.span(), message)
    })
}

/// The duration in `= "20s"`.
pub(crate) fn interval(option: &Ident, example: &str, input: ParseStream<'_>) -> syn::Result<Interval> {
    Interval::from_literal(&string(option, example, input)?)
}

/// The messages a second in `= 200` or `= 0.5`, or an expression that gives a number, such as a constant; as an `f64`.
pub(crate) fn rate(option: &Ident, input: ParseStream<'_>) -> syn::Result<Expr> {
    let mend = || format!("`{option}` takes a number of messages a second above 0: {option} = 200");
    let expression = value(option, mend, input)?;
    let is_rate = match &expression {
        Expr::Lit(ExprLit {
            lit: Lit::Int(number),
            ..
        }) => number.base10_parse::<u32>().is_ok_and(|n| n > 0),
        Expr::Lit(ExprLit {
            lit: Lit::Float(number),
            ..
        }) => number.base10_parse::<f64>().is_ok_and(|n| n > 0.0),
        Expr::Lit(_) | Expr::Unary(_) => false,
        _ => true,
    };
    if is_rate {
        Ok(syn::parse_quote!(::core::primitive::f64::from(#expression)))
    } else {
        Err(syn::Error::new_spanned(expression, mend()))
    }
}

/// The number in `= 8`, or an expression that gives one, such as a constant.
pub(crate) fn count(option: &Ident, input: ParseStream<'_>) -> syn::Result<Expr> {
    let mend = || format!("`{option}` takes a number from 1 up: {option} = 8");
    let expression = value(option, mend, input)?;
    let is_number = match &expression {
        Expr::Lit(ExprLit {
            lit: Lit::Int(number),
            ..
        }) => number.base10_parse::<u64>().is_ok_and(|n| n > 0),
        Expr::Lit(_) | Expr::Unary(_) => false,
        _ => true,
    };
    if is_number {
        Ok(expression)
    } else {
        Err(syn::Error::new_spanned(expression, mend()))
    }
}
