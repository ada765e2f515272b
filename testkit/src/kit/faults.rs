//! What stands before each handler: runs that are to fail, and what runs just now.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use postbox::MessageId;
use postbox_consumer::{__testkit as consumers, HandlerDefinition, HandlerError, Invocation};

use super::locked;

/// A handler of a kit's consumers: the function that has `#[handler]`, or its name as a text, with as much of its path as tells it from others.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler",
    label = "not a function with up to eight arguments, and no text",
    note = "name the handler: `kit.fail_once(ship)` or `kit.fail_once(\"ship\")`"
)]
pub trait HandlerName<M> {
    /// Its name.
    fn name(&self) -> Cow<'static, str>;
}

/// A handler that is said by its name.
#[derive(Debug)]
pub enum ByText {}

impl HandlerName<ByText> for &str {
    fn name(&self) -> Cow<'static, str> {
        Cow::Owned((*self).to_owned())
    }
}

macro_rules! functions {
    ($($argument:ident)*) => {
        impl<F, R, $($argument,)*> HandlerName<($($argument,)*)> for F
        where
            F: Fn($($argument),*) -> R,
            R: Future,
        {
            fn name(&self) -> Cow<'static, str> {
                Cow::Borrowed(std::any::type_name::<F>())
            }
        }
    };
}

functions!();
functions!(A);
functions!(A B);
functions!(A B C);
functions!(A B C D);
functions!(A B C D E);
functions!(A B C D E G);
functions!(A B C D E G H);
functions!(A B C D E G H I);

#[derive(Default)]
pub(super) struct Faults {
    handlers: Mutex<Vec<&'static str>>,
    /// How many runs of a handler are to fail.
    failing: Mutex<BTreeMap<&'static str, usize>>,
    running: Mutex<BTreeMap<u64, Running>>,
}

/// A run of a handler.
#[derive(Clone)]
pub(super) struct Running {
    handler: &'static str,
    group: String,
    topic: String,
    id: MessageId,
    key: Option<String>,
    attempt: u32,
    messages: usize,
    since: Instant,
}

/// Takes it off the list when it ends, however it does.
struct Run {
    faults: Arc<Faults>,
    number: u64,
}

impl Drop for Run {
    fn drop(&mut self) {
        locked(&self.faults.running).remove(&self.number);
    }
}

impl Faults {
    /// Before this handler, from now on.
    pub(super) fn stand_before(self: &Arc<Self>, handler: &mut HandlerDefinition) {
        let name = consumers::name(handler);
        let mut handlers = locked(&self.handlers);
        if !handlers.contains(&name) {
            handlers.push(name);
        }
        drop(handlers);
        let faults = self.clone();
        consumers::wrap(handler, |run| {
            Arc::new(move |invocation| {
                if faults.is_to_fail(name) {
                    let failure = HandlerError::retry("it fails because the test said so (fail_once)");
                    return Box::pin(std::future::ready(Err(failure)));
                }
                let listed = faults.begin(name, &invocation);
                let run = run(invocation);
                Box::pin(async move {
                    let _listed = listed;
                    run.await
                })
            })
        });
    }

    fn begin(self: &Arc<Self>, handler: &'static str, invocation: &Invocation) -> Run {
        let (id, key) = consumers::message(invocation);
        let run = Running {
            handler,
            group: invocation.group().to_owned(),
            topic: invocation.topic().to_owned(),
            id,
            key: key.map(str::to_owned),
            attempt: invocation.attempt(),
            messages: invocation.messages(),
            since: Instant::now(),
        };
        let mut running = locked(&self.running);
        let number = running.last_key_value().map_or(0, |(last, _)| last + 1);
        running.insert(number, run);
        Run {
            faults: self.clone(),
            number,
        }
    }

    /// What runs, the longest first.
    pub(super) fn running(&self) -> Vec<Running> {
        locked(&self.running).values().cloned().collect()
    }

    fn is_to_fail(&self, handler: &'static str) -> bool {
        let mut failing = locked(&self.failing);
        let Some(runs) = failing.get_mut(handler).filter(|runs| **runs > 0) else {
            return false;
        };
        *runs -= 1;
        true
    }

    /// The next runs of the handler of this name fail, however many more were to.
    pub(super) fn fail(&self, name: &str, runs: usize) {
        let known = locked(&self.handlers).clone();
        match find(&known, name) {
            Ok(handler) => *locked(&self.failing).entry(handler).or_default() += runs,
            Err(why) => panic!("{why}"),
        }
    }
}

/// The handler of this name. A function that is defined in another has that one's name in its path, which its handler has not; so the path counts only
/// where the last part does not decide.
fn find(known: &[&'static str], name: &str) -> Result<&'static str, String> {
    if let Some(exact) = known.iter().find(|handler| **handler == name) {
        return Ok(exact);
    }
    let last = last_part(name);
    let same: Vec<&'static str> = (known.iter().copied())
        .filter(|handler| last_part(handler) == last)
        .collect();
    let ends: Vec<&'static str> = (same.iter().copied())
        .filter(|handler| handler.ends_with(&format!("::{name}")))
        .collect();
    match (&same[..], &ends[..]) {
        ([only], _) | (_, [only]) => Ok(only),
        ([], _) => Err(format!(
            "no handler of this kit is called {name:?}: give it to kit.consumer(handlers![…]) first; there {}",
            match known {
                [] => "is none".to_owned(),
                known => format!("are: {}", known.join(", ")),
            }
        )),
        _ => Err(format!(
            "several handlers of this kit are called {last:?}: name the one with its path, of {}",
            same.join(", ")
        )),
    }
}

fn last_part(name: &str) -> &str {
    name.rsplit("::").next().unwrap_or(name)
}

impl fmt::Display for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            handler,
            group,
            topic,
            id,
            attempt,
            ..
        } = self;
        write!(f, "{} of group {group} on topic {topic}: ", last_part(handler))?;
        if self.messages > 1 {
            write!(f, "{} messages from ", self.messages)?;
        }
        write!(f, "message {id}")?;
        if let Some(key) = &self.key {
            write!(f, " of key {key:?}")?;
        }
        write!(f, ", attempt {attempt}, for {:?}", rounded(self.since))
    }
}

fn rounded(since: Instant) -> std::time::Duration {
    std::time::Duration::from_millis(since.elapsed().as_millis().try_into().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_is_found_by_its_function_and_by_as_much_of_its_path_as_is_needed() {
        let known = ["shop::mail::send", "shop::sms::send", "shop::ship"];
        assert_eq!(find(&known, "ship"), Ok("shop::ship"));
        // As a function inside of a test is called.
        assert_eq!(find(&known, "shop::a_test::{{closure}}::ship"), Ok("shop::ship"));
        assert_eq!(find(&known, "shop::sms::send"), Ok("shop::sms::send"));
        assert_eq!(find(&known, "sms::send"), Ok("shop::sms::send"));
        assert!(find(&known, "send").is_err_and(|why| why.contains("several")));
        assert!(find(&known, "pay").is_err_and(|why| why.contains("shop::ship")));
        assert!(find(&[], "pay").is_err_and(|why| why.contains("is none")));
    }
}
