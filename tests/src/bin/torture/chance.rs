//! Chance that comes from the seed.

use fastrand::Rng;

/// A generator of its own for each purpose, so that one more throw in one place changes nothing in another.
pub(crate) fn rng(seed: u64, purpose: &str) -> Rng {
    Rng::with_seed(mix(seed, purpose.as_bytes()))
}

/// One throw, from 0 to before `sides`, that is the same whenever it is made: what happens to a message does not depend on who runs it.
pub(crate) fn throw(seed: u64, about: &[u8], sides: u64) -> u64 {
    Rng::with_seed(mix(seed, about)).u64(0..sides)
}

/// FNV-1a over the seed and the bytes.
fn mix(seed: u64, bytes: &[u8]) -> u64 {
    seed.to_le_bytes()
        .iter()
        .chain(bytes)
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_throws_and_another_one_does_not() {
        let draw = |seed, purpose| rng(seed, purpose).u64(..);
        assert_eq!(draw(7, "plan"), draw(7, "plan"));
        assert_ne!(draw(7, "plan"), draw(8, "plan"));
        assert_ne!(draw(7, "plan"), draw(7, "producer"));
    }
}
