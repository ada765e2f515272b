//! What the sequencer announces after a step: which topics have new heads, and where their newest messages are.
//!
//! It reaches every session through the server, and those in the dispatcher's own process at once. Not part of the API.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use postbox::log::{Segment, StoredMessage};
use tokio::sync::broadcast;

/// Announcements that a session has not taken up yet; one that misses some looks at everything, as if a notification were lost.
const BACKLOG: usize = 64;

/// Dispatchers and consumers of this process that are connected to the same database of the same server since its last start.
static EXCHANGES: LazyLock<Mutex<HashMap<Vec<u8>, Weak<Shared>>>> = LazyLock::new(Mutex::default);

struct Shared {
    sender: broadcast::Sender<Arc<Announcement>>,
    /// How many steps are being taken.
    steps: AtomicUsize,
}

/// What a step found.
#[derive(Debug)]
pub struct Announcement {
    /// As `postbox.step` writes it.
    pub text: String,
    /// The messages of the one segment of which it tells, where a dispatcher got them with the step.
    pub messages: Option<Vec<StoredMessage>>,
}

/// From dispatchers of this process to sessions of this process.
pub struct Announcements(Arc<Shared>);

/// A step is being taken, until it is dropped.
pub struct Stepping<'a>(&'a AtomicUsize);

impl Drop for Stepping<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Announcements {
    /// Those of the database of this key (`postbox.run_key`). After a crash the server may not have what was announced before, and has another key: so
    /// what is announced goes to those only who are connected to the same run of it.
    #[must_use]
    pub fn of(key: &[u8]) -> Self {
        let mut exchanges = EXCHANGES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = exchanges.get(key).and_then(Weak::upgrade) {
            return Self(shared);
        }
        exchanges.retain(|_, shared| shared.strong_count() > 0);
        let shared = Arc::new(Shared {
            sender: broadcast::Sender::new(BACKLOG),
            steps: AtomicUsize::new(0),
        });
        exchanges.insert(key.to_vec(), Arc::downgrade(&shared));
        Self(shared)
    }

    /// To be kept until what the step found is announced.
    pub fn stepping(&self) -> Stepping<'_> {
        self.0.steps.fetch_add(1, Ordering::Relaxed);
        Stepping(&self.0.steps)
    }

    /// Whether there may be an announcement in a moment.
    pub fn expects_announcements(&self) -> bool {
        self.0.steps.load(Ordering::Relaxed) > 0
    }

    /// Tells it to those who listen.
    pub fn announce(&self, announcement: Announcement) {
        // Nobody may be there.
        let _ = self.0.sender.send(Arc::new(announcement));
    }

    /// Whether anybody listens.
    pub fn is_attended(&self) -> bool {
        self.0.sender.receiver_count() > 0
    }

    /// What is announced from now on.
    pub fn listen(&self) -> broadcast::Receiver<Arc<Announcement>> {
        self.0.sender.subscribe()
    }
}

/// The topics of the text of an announcement, with their heads, and the newest segment where it is said. None: anything may be new.
pub fn topics(text: &str) -> impl Iterator<Item = (&str, i64, Option<Segment>)> {
    let mut words = text.split(' ');
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
    fn an_announcement_is_of_topics_with_their_heads_and_perhaps_a_segment() {
        let text = "orders 17 2:120:7001,7002:55,56:-,1234:77,- a:b/c 3 -";
        let all: Vec<_> = topics(text).collect();
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
        let types = [15, 16].map(|offset| segment.type_hash(Offset::new(offset)));
        assert_eq!(types, [Some(77), None]);
        assert_eq!(segment.mean_bytes(), 60);
    }

    #[test]
    fn what_is_not_understood_is_no_segment() {
        for place in [
            "",
            "-",
            "2",
            "2:120:1:2,3:-,-:-,-",
            "2:x:1:2:-:-",
            "2:1::::",
            "2:1:1:2:-:-:",
            "2:1:1:2:-:-,-",
            "2:1:1:2:-",
        ] {
            let text = format!("orders 17 {place}");
            assert!(topics(&text).all(|(.., segment)| segment.is_none()), "{place:?}");
        }
        assert_eq!(topics("").count(), 0);
    }
}
