//! `#[postbox_testkit::test]`: a test with a fresh database, as a function that the test harness finds.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::parse::{ParseStream, Parser};
use syn::spanned::Spanned;
use syn::{Attribute, Expr, FnArg, Ident, ItemFn, LitStr, Path, Token};

use crate::attribute;

const KNOWN: &[&str] = &["migrator", "migrations", "crate"];
const EXAMPLE: &str = "async fn a_paid_order_is_shipped(kit: Kit)";

/// The test, or the error; beside an error the function stays, so that nothing else complains.
pub(crate) fn expand(options: TokenStream, item: TokenStream) -> TokenStream {
    let function: ItemFn = match syn::parse2(item.clone()) {
        Ok(function) => function,
        Err(_) => return with_error(&item, syn::Error::new_spanned(&item, message_of_shape())),
    };
    let expanded = check(&function).and_then(|()| {
        let options = Options::read.parse2(options)?;
        Ok(attribute::in_crate(
            "postbox_testkit",
            options.krate.as_ref(),
            test(&function, &options),
        ))
    });
    expanded.unwrap_or_else(|error| with_error(&item, error))
}

fn with_error(item: &TokenStream, error: syn::Error) -> TokenStream {
    let error = error.into_compile_error();
    quote!(#[allow(dead_code)] #item #error)
}

fn message_of_shape() -> String {
    format!("#[postbox_testkit::test] goes on an async function: {EXAMPLE}")
}

/// What `#[postbox_testkit::test(…)]` says.
#[derive(Default)]
struct Options {
    migrator: Option<Path>,
    migrations: Option<LitStr>,
    krate: Option<Path>,
}

impl Options {
    fn read(input: ParseStream<'_>) -> syn::Result<Self> {
        let mut options = Self::default();
        attribute::read_options(
            input,
            "#[postbox_testkit::test]",
            KNOWN,
            |option, known, input| {
                match known {
                    "migrator" => options.migrator = Some(migrator(option, input)?),
                    "migrations" => {
                        options.migrations = Some(attribute::string(option, "./migrations", input)?);
                    }
                    _ => {
                        options.krate = Some(attribute::path(
                            option,
                            "shop::reexports::postbox_testkit",
                            input,
                        )?);
                    }
                }
                if options.migrator.is_some() && options.migrations.is_some() {
                    return Err(syn::Error::new(
                        option.span(),
                        "give either `migrator` or `migrations`",
                    ));
                }
                Ok(())
            },
        )?;
        Ok(options)
    }

    fn migrator(&self) -> Option<TokenStream> {
        if let Some(path) = &self.migrator {
            return Some(quote_spanned!(path.span()=> &#path));
        }
        let folder = self.migrations.as_ref()?;
        Some(quote_spanned! {folder.span()=>
            {
                static MIGRATOR: ::sqlx::migrate::Migrator = ::sqlx::migrate!(#folder);
                &MIGRATOR
            }
        })
    }
}

/// The path of a static, in a string or as it is.
fn migrator(option: &Ident, input: ParseStream<'_>) -> syn::Result<Path> {
    let mend = "`migrator` takes the path of a static: migrator = MIGRATOR, with static MIGRATOR: Migrator = sqlx::migrate!();";
    if !input.peek(Token![=]) {
        return Err(syn::Error::new(option.span(), mend));
    }
    input.parse::<Token![=]>()?;
    match input.parse()? {
        Expr::Path(path) => Ok(path.path),
        Expr::Lit(literal) => match &literal.lit {
            syn::Lit::Str(text) => text.parse().map_err(|_| syn::Error::new(text.span(), mend)),
            _ => Err(syn::Error::new_spanned(literal, mend)),
        },
        other => Err(syn::Error::new_spanned(other, mend)),
    }
}

fn check(function: &ItemFn) -> syn::Result<()> {
    let signature = &function.sig;
    if signature.asyncness.is_none() {
        let message = format!("a test with a Kit is async: async fn {}", signature.ident);
        return Err(syn::Error::new(signature.fn_token.span, message));
    }
    if !signature.generics.params.is_empty() {
        let message = "a test has no generics, because nobody is there to name the types";
        return Err(syn::Error::new_spanned(&signature.generics, message));
    }
    if let Some(attribute) = function.attrs.iter().find(|attribute| is_test(attribute)) {
        let message = "#[postbox_testkit::test] makes it a test already: remove the other attribute";
        return Err(syn::Error::new_spanned(attribute, message));
    }
    let mut arguments = signature.inputs.iter();
    match (arguments.next(), arguments.next()) {
        (Some(FnArg::Typed(_)), None) => Ok(()),
        (None, _) => {
            let message = format!("the test takes its database as an argument, `kit: Kit`: {EXAMPLE}");
            Err(syn::Error::new_spanned(&signature.ident, message))
        }
        (Some(FnArg::Receiver(receiver)), _) => {
            let message = "a test is a free function: it takes `kit: Kit` alone";
            Err(syn::Error::new_spanned(receiver, message))
        }
        (_, Some(second)) => {
            let message = "a test takes one argument, `kit: Kit`: what else it needs it makes itself";
            Err(syn::Error::new_spanned(second, message))
        }
    }
}

/// `#[test]`, and those of other crates that end so.
fn is_test(attribute: &Attribute) -> bool {
    let last = attribute.path().segments.last();
    last.is_some_and(|segment| segment.ident == "test")
}

fn test(function: &ItemFn, options: &Options) -> TokenStream {
    let ItemFn {
        attrs,
        vis,
        sig,
        block,
    } = function;
    let (name, output, argument) = (&sig.ident, &sig.output, &sig.inputs);
    let migrations = options.migrator().into_iter();
    quote! {
        #[::core::prelude::v1::test]
        #(#attrs)*
        #vis fn #name() #output {
            async fn body(#argument) #output #block
            ::postbox_testkit::__private::run(
                ::postbox_testkit::__private::Options::default() #(.migrator(#migrations))*,
                body,
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expansion(options: TokenStream) -> String {
        let item = quote!(
            #[should_panic]
            async fn ships(kit: Kit) -> Result<(), Oh> {
                Ok(())
            }
        );
        expand(options, item).to_string()
    }

    #[test]
    fn it_keeps_attributes_and_result_and_says_where_the_migrations_are() {
        let plain = expansion(quote!());
        for part in [
            quote!(#[should_panic] fn ships() -> Result<(), Oh>),
            quote!(async fn body(kit: Kit) -> Result<(), Oh>),
            quote!(::postbox_testkit::__private::run(
                ::postbox_testkit::__private::Options::default(),
                body,
            )),
        ] {
            assert!(plain.contains(&part.to_string()), "{plain} has {part}");
        }
        let migrated = expansion(quote!(migrator = crate::MIGRATOR));
        let part = quote!(.migrator(&crate::MIGRATOR));
        assert!(migrated.contains(&part.to_string()), "{migrated}");
        let migrated = expansion(quote!(migrations = "db"));
        let part = quote!(::sqlx::migrate!("db"));
        assert!(migrated.contains(&part.to_string()), "{migrated}");
    }

    #[test]
    fn who_has_the_crate_under_another_name_says_so() {
        let renamed = expansion(quote!(crate = shop::kit));
        assert!(renamed.contains("shop :: kit :: __private :: run"), "{renamed}");
    }
}
