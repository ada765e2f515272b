//! What the sequencer says after a step: which topics have new heads, and where their newest messages are.
//!
//! It reaches every session through the server, and those in the dispatcher's own process at once. Not part of the API.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use postbox::log::{Segment, StoredMessage};
use sqlx::PgExecutor;
use tokio::sync::broadcast;

/// News that a session has not taken up yet; one that misses some looks at everything, as if a notification were lost.
const BACKLOG: usize = 64;

/// Dispatchers and consumers of this process that are connected to the same database of the same server since its last start.
static DESKS: LazyLock<Mutex<HashMap<String, Weak<Shared>>>> = LazyLock::new(Mutex::default);

struct Shared {
    news: broadcast::Sender<Arc<News>>,
    /// How many steps are being taken.
    steps: AtomicUsize,
}

/// After a crash the server may not have what was told before, so what is told goes to those only who are connected to the same run of it: a crash
/// ends all its processes.
const PLACE: &str = "SELECT concat_ws(' ', postbox.system_identifier(), pg_postmaster_start_time(), \
     (SELECT a.pid FROM pg_stat_get_activity(NULL) a WHERE a.backend_type = 'checkpointer'), \
     (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()))";

/// What a step found.
#[derive(Debug)]
pub struct News {
    /// As `postbox.step` writes it.
    pub text: String,
    /// The messages of the one segment of which it tells, where a dispatcher got them with the step.
    pub messages: Option<Vec<StoredMessage>>,
}

/// Where dispatchers of this process tell sessions of this process.
pub struct Desk(Arc<Shared>);

/// A step is being taken, until it is dropped.
pub struct Stepping<'a>(&'a AtomicUsize);

impl Drop for Stepping<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Desk {
    /// The one for the database at the other end.
    pub async fn of(connection: impl PgExecutor<'_>) -> Result<Self, sqlx::Error> {
        let place: String = sqlx::query_scalar(PLACE).fetch_one(connection).await?;
        let mut desks = DESKS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = desks.get(&place).and_then(Weak::upgrade) {
            return Ok(Self(shared));
        }
        desks.retain(|_, shared| shared.strong_count() > 0);
        let shared = Arc::new(Shared {
            news: broadcast::Sender::new(BACKLOG),
            steps: AtomicUsize::new(0),
        });
        desks.insert(place, Arc::downgrade(&shared));
        Ok(Self(shared))
    }

    /// To be kept until what the step found is told.
    pub fn stepping(&self) -> Stepping<'_> {
        self.0.steps.fetch_add(1, Ordering::Relaxed);
        Stepping(&self.0.steps)
    }

    /// Whether there may be news in a moment.
    pub(crate) fn expects_news(&self) -> bool {
        self.0.steps.load(Ordering::Relaxed) > 0
    }

    /// Tells it to those who listen.
    pub fn tell(&self, news: News) {
        // Nobody may be there.
        let _ = self.0.news.send(Arc::new(news));
    }

    /// Whether anybody listens.
    pub fn is_attended(&self) -> bool {
        self.0.news.receiver_count() > 0
    }

    pub(crate) fn listen(&self) -> broadcast::Receiver<Arc<News>> {
        self.0.news.subscribe()
    }
}

/// The topics of the text of news, with their heads, and the newest segment where it is said. None: anything may be new.
pub fn topics(news: &str) -> impl Iterator<Item = (&str, i64, Option<Segment>)> {
    let mut words = news.split(' ');
    std::iter::from_fn(move || {
        let (topic, head, place) = (words.next()?, words.next()?.parse().ok()?, words.next()?);
        Some((topic, head, Segment::parse(head, place)))
    })
}

#[cfg(test)]
mod tests {
    use postbox::Offset;

    use super::topics;

    #[test]
    fn news_is_of_topics_with_their_heads_and_perhaps_a_segment() {
        let news = "orders 17 2:120:7001,7002:55,56:-,1234 a:b/c 3 -";
        let all: Vec<_> = topics(news).collect();
        let [("orders", 17, Some(segment)), ("a:b/c", 3, None)] = all.as_slice() else {
            panic!("{all:?}");
        };
        assert_eq!(
            (segment.base(), segment.end()),
            (Offset::new(15), Offset::new(17))
        );
        assert_eq!(
            (
                segment.key_hash(Offset::new(15)),
                segment.key_hash(Offset::new(16))
            ),
            (None, Some(1234))
        );
        assert_eq!(segment.mean_bytes(), 60);
    }

    #[test]
    fn what_is_not_understood_is_no_segment() {
        for place in [
            "",
            "-",
            "2",
            "2:120:1:2,3:-,-",
            "2:x:1:2:-",
            "2:1:::",
            "2:1:1:2:-:",
        ] {
            let news = format!("orders 17 {place}");
            assert!(topics(&news).all(|(.., segment)| segment.is_none()), "{place:?}");
        }
        assert_eq!(topics("").count(), 0);
    }
}
