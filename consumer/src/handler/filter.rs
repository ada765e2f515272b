//! Filters of handlers: read by the server before anything runs, then numbered by topic.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use postbox::log::Filters;
use sqlx::PgPool;

use crate::error::Error;
use crate::handler::HandlerDefinition;

/// What the filters of a subscription are, by message type; `None`: all of that type are wanted. As [`Takes`](crate::handler::router::Takes) names
/// types.
pub(crate) type ByType = BTreeMap<String, Option<String>>;

const CHECK: &str = "SELECT postbox.filter_reads_payload(postbox.check_filter($1))";

/// A handler's filter.
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    /// Among the filters with which the topic is read.
    pub(crate) number: i16,
    pub(crate) text: String,
}

/// The filters of each topic that this process reads.
#[derive(Default)]
pub(crate) struct FiltersOfTopics(HashMap<String, Arc<Filters>>);

impl FiltersOfTopics {
    /// Has the server read them.
    pub(crate) async fn read(pool: &PgPool, definitions: &[HandlerDefinition]) -> Result<Self, Error> {
        let mut topics: HashMap<String, Filters> = HashMap::new();
        for definition in definitions {
            let (Some(text), Some(topic)) = (&definition.filter, definition.topic_name()) else {
                continue;
            };
            let checked = sqlx::query_scalar(CHECK).bind(text).fetch_one(pool).await;
            let reads_payload = checked.map_err(|error| refused(definition, text, error))?;
            topics.entry(topic).or_default().add(text, reads_payload);
        }
        let shared = topics
            .into_iter()
            .map(|(topic, filters)| (topic, Arc::new(filters)));
        Ok(Self(shared.collect()))
    }

    /// Those of a topic.
    pub(crate) fn of(&self, topic: &str) -> Arc<Filters> {
        self.0.get(topic).cloned().unwrap_or_default()
    }
}

impl Filter {
    /// That of a handler.
    pub(crate) fn of(definition: &HandlerDefinition, filters: &Filters) -> Option<Self> {
        let text = definition.filter.clone()?;
        let index = filters.texts().iter().position(|known| *known == text)?;
        Some(Self {
            number: index as i16 + 1,
            text,
        })
    }
}

fn refused(definition: &HandlerDefinition, filter: &str, error: sqlx::Error) -> Error {
    let said = match &error {
        sqlx::Error::Database(said) => said.try_downcast_ref::<sqlx::postgres::PgDatabaseError>(),
        _ => None,
    };
    match said.filter(|said| said.code() == "PB009") {
        Some(said) => Error::Filter {
            handler: definition.short_name(),
            filter: filter.to_owned(),
            why: match said.hint() {
                Some(hint) => format!("{}. {hint}", said.message()),
                None => said.message().to_owned(),
            },
        },
        None => error.into(),
    }
}
