//! The ordering key: `key = field`, `key = 0` for a tuple's field, or an expression over the fields.

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::parse::ParseStream;
use syn::spanned::Spanned;
use syn::{Expr, ExprLit, Fields, Ident, Lit, parse_quote};

use crate::attribute;

/// What stands after `key =`.
#[derive(Clone)]
pub(crate) enum Key {
    /// `None`: this message has no key.
    None,
    /// The field of this position in a tuple.
    Position(usize, Span),
    /// Everything else; a bare identifier in it is a field.
    Expression(Expr),
}

/// The struct or variant whose fields a key is made of.
pub(crate) struct Owner<'a> {
    /// As a message names it: "`Order`" or "variant `Sent`".
    pub(crate) name: String,
    /// The path of its pattern: `Self` or `Self::Sent`.
    pub(crate) path: TokenStream,
    pub(crate) fields: &'a Fields,
}

impl Key {
    /// Reads `= …`.
    pub(crate) fn read(option: &Ident, input: ParseStream<'_>) -> syn::Result<Self> {
        let mend = || "`key` takes a field or an expression: key = order_id".to_owned();
        let expression = attribute::value(option, mend, input)?;
        match &expression {
            Expr::Lit(ExprLit {
                lit: Lit::Str(text), ..
            }) => {
                let message = match syn::parse_str::<Ident>(&text.value()) {
                    Ok(field) => format!("a key is a field or an expression, without quotes: key = {field}"),
                    Err(_) => "a key is a field or an expression, not a string: key = order_id".to_owned(),
                };
                Err(syn::Error::new(text.span(), message))
            }
            Expr::Lit(ExprLit {
                lit: Lit::Int(position),
                ..
            }) => Ok(Self::Position(position.base10_parse()?, position.span())),
            Expr::Path(path) if path.path.is_ident("None") => Ok(Self::None),
            _ => Ok(Self::Expression(expression)),
        }
    }

    /// The match arm that makes the key's text from the owner's fields.
    pub(crate) fn arm(&self, owner: &Owner<'_>) -> syn::Result<TokenStream> {
        let text = match self {
            Self::None => quote!(::core::option::Option::None),
            Self::Position(position, span) => {
                if *position >= owner.fields.len() || !matches!(owner.fields, Fields::Unnamed(_)) {
                    return Err(owner.lacks(&position.to_string(), *span));
                }
                key_text(*span, position_binding(*position).to_token_stream())
            }
            Self::Expression(expression) => owner.expression(expression)?,
        };
        let pattern = owner.pattern();
        Ok(quote!(#pattern => #text,))
    }
}

impl Owner<'_> {
    /// Binds every field to a reference: to its name, or to [`position_binding`] in a tuple.
    fn pattern(&self) -> TokenStream {
        let path = &self.path;
        match self.fields {
            Fields::Named(fields) => {
                let names = fields.named.iter().map(|field| &field.ident);
                quote!(#path { #(#names),* })
            }
            Fields::Unnamed(fields) => {
                let names = (0..fields.unnamed.len()).map(position_binding);
                quote!(#path(#(#names),*))
            }
            Fields::Unit => path.clone(),
        }
    }

    fn expression(&self, expression: &Expr) -> syn::Result<TokenStream> {
        let mut expression = expression.clone();
        let span = expression.span();
        let is_bare = matches!(expression, Expr::Path(_));
        let Some(root) = field_at_root(&mut expression) else {
            return Ok(key_text(span, quote!(&(#expression))));
        };
        let field = root.to_token_stream();
        let named = |fields: &syn::FieldsNamed| {
            fields
                .named
                .iter()
                .any(|f| f.ident.as_ref().is_some_and(|i| *i == field.to_string()))
        };
        match self.fields {
            Fields::Named(fields) if named(fields) && is_bare => {
                Ok(key_text(span, expression.to_token_stream()))
            }
            Fields::Named(fields) if named(fields) => Ok(key_text(span, quote!(&(#expression)))),
            // A newtype stands for what it holds.
            Fields::Unnamed(fields) if fields.unnamed.len() == 1 => {
                let inner = Ident::new("field_0", root.span());
                *root = parse_quote!(#inner.#field);
                Ok(key_text(span, quote!(&(#expression))))
            }
            _ => Err(self.lacks(&field.to_string(), root.span())),
        }
    }

    fn lacks(&self, field: &str, span: Span) -> syn::Error {
        let name = &self.name;
        let has = match self.fields {
            Fields::Named(fields) if fields.named.len() == 1 => {
                let name = fields.named.iter().find_map(|f| f.ident.as_ref());
                name.map(|ident| format!("its only field is `{ident}`"))
                    .unwrap_or_default()
            }
            Fields::Named(fields) if !fields.named.is_empty() => {
                let names = fields.named.iter().filter_map(|f| f.ident.as_ref());
                let names: Vec<String> = names.map(|ident| format!("`{ident}`")).collect();
                format!("its fields are {}", names.join(", "))
            }
            Fields::Unnamed(fields) if fields.unnamed.len() == 1 => "its only field is 0".to_owned(),
            Fields::Unnamed(fields) if fields.unnamed.len() > 1 => {
                format!("its fields are 0 to {}", fields.unnamed.len() - 1)
            }
            _ => "it has no fields at all".to_owned(),
        };
        let mend = if name.starts_with("variant") {
            "; give the variant its own: #[message(key = …)], or key = None"
        } else {
            ""
        };
        syn::Error::new(
            span,
            format!("the key names `{field}`, which {name} does not have: {has}{mend}"),
        )
    }
}

/// The identifier that `a`, `a.b`, `a.b()` and `&a` begin with, if by its case it can be a field.
fn field_at_root(expression: &mut Expr) -> Option<&mut Expr> {
    match expression {
        Expr::Path(path) => {
            let ident = path.path.get_ident()?;
            let text = ident.to_string();
            let is_field = text != "self" && !text.contains(char::is_uppercase);
            is_field.then_some(expression)
        }
        Expr::Field(field) => field_at_root(&mut field.base),
        Expr::MethodCall(call) => field_at_root(&mut call.receiver),
        Expr::Paren(paren) => field_at_root(&mut paren.expr),
        Expr::Group(group) => field_at_root(&mut group.expr),
        Expr::Reference(reference) => field_at_root(&mut reference.expr),
        Expr::Index(index) => field_at_root(&mut index.expr),
        _ => None,
    }
}

fn position_binding(position: usize) -> Ident {
    format_ident!("field_{position}")
}

/// `reference` as text; an `Option` gives the text of its content. What is no text is an error at the key.
fn key_text(span: Span, reference: TokenStream) -> TokenStream {
    quote_spanned! {span=> {
        let key = #reference;
        (&::postbox::__private::Key(key)).kind().text(key)
    }}
}
