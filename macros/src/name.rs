//! The names that the database stores: topics, types and groups share one alphabet and one limit.

use proc_macro2::Span;
use syn::LitStr;

/// The longest name, in characters; the columns of the schema have the same limit.
const LIMIT: usize = 255;

/// Refuses a literal that the database would refuse, at the literal.
pub(crate) fn check(what: &str, literal: &LitStr) -> syn::Result<()> {
    check_text(what, &literal.value(), literal.span())
}

/// The same for a name that was made from an identifier.
pub(crate) fn check_text(what: &str, text: &str, span: Span) -> syn::Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':' | '/');
    let found = if text.is_empty() {
        "this is empty".to_owned()
    } else if let Some(stranger) = text.chars().find(|c| !allowed(*c)) {
        format!("{stranger:?} is none of them")
    } else if text.len() > LIMIT {
        format!("this has {}", text.len())
    } else {
        return Ok(());
    };
    let message = format!("a {what} is 1 to {LIMIT} characters of A-Z a-z 0-9 . _ - : / ({found})");
    Err(syn::Error::new(span, message))
}

/// `OrderPlaced` becomes `order_placed`, `HTTPCall` becomes `http_call`.
pub(crate) fn snake_case(ident: &str) -> String {
    let characters: Vec<char> = ident.chars().collect();
    let mut snake = String::new();
    for (at, character) in characters.iter().enumerate() {
        let before = at.checked_sub(1).and_then(|i| characters.get(i)).copied();
        let next_is_lower = characters.get(at + 1).is_some_and(|c| c.is_lowercase());
        let starts_a_word = character.is_uppercase()
            && before.is_some_and(|b| b != '_' && (!b.is_uppercase() || next_is_lower));
        if starts_a_word {
            snake.push('_');
        }
        snake.extend(character.to_lowercase());
    }
    snake
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_name_becomes_snake_case() {
        for (given, expected) in [
            ("OrderPlaced", "order_placed"),
            ("HTTPCall", "http_call"),
            ("CallHTTP", "call_http"),
            ("V2Order", "v2_order"),
            ("Order_Placed", "order_placed"),
            ("A", "a"),
        ] {
            assert_eq!(snake_case(given), expected);
        }
    }

    #[test]
    fn a_name_is_limited_in_length_and_alphabet() {
        let check = |text: &str| check_text("topic", text, Span::call_site()).map_err(|e| e.to_string());
        assert_eq!(check("Orders/v2:eu.west_1-a"), Ok(()));
        assert_eq!(check(&"x".repeat(255)), Ok(()));
        assert!(check(&"x".repeat(256)).unwrap_err().contains("this has 256"));
        assert!(check("").unwrap_err().contains("this is empty"));
        assert!(check("my orders").unwrap_err().contains("' ' is none of them"));
        assert!(check("größe").unwrap_err().contains("'ö' is none of them"));
    }
}
