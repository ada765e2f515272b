//! How far a bench is, on standard error, if somebody is watching.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    pub(crate) fn new(hidden: bool) -> Self {
        // It hides itself where standard error is no terminal.
        let target = if hidden {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let style = ProgressStyle::with_template("{prefix:>10} {wide_bar} {pos}/{len} {elapsed} {msg}");
        let bar = ProgressBar::with_draw_target(Some(0), target);
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar }
    }

    /// A bench begins that takes so many steps.
    pub(crate) fn begin(&self, bench: &'static str, steps: usize) {
        self.bar.reset();
        self.bar.set_prefix(bench);
        self.bar.set_message("");
        self.bar.set_length(steps as u64);
    }

    pub(crate) fn step(&self, what: &'static str) {
        self.bar.set_message(what);
        self.bar.inc(1);
    }

    /// Out of the way of the figures.
    pub(crate) fn done(&self) {
        self.bar.finish_and_clear();
    }
}
