//! Holds the examples; see the folders beside it.
