//! Tables for people: columns as wide as their widest cell, numbers to the right.

use std::fmt;

use crate::output::in_line;

pub(crate) struct Table {
    title: &'static str,
    heads: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

pub(crate) enum Cell {
    Text(String),
    Number(i64),
}

impl Table {
    pub(crate) fn new(title: &'static str, heads: &[&'static str]) -> Self {
        Self {
            title,
            heads: heads.to_vec(),
            rows: Vec::new(),
        }
    }

    /// A row has a cell for each head.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    fn is_numeric(&self, column: usize) -> bool {
        self.rows
            .iter()
            .all(|row| matches!(row.get(column), Some(Cell::Number(_))))
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.title)?;
        if self.rows.is_empty() {
            return write!(f, "\n  none");
        }
        let heads = self.heads.iter().map(|head| (*head).to_owned()).collect();
        let lines: Vec<Vec<String>> = std::iter::once(heads)
            .chain(
                self.rows
                    .iter()
                    .map(|row| row.iter().map(|cell| in_line(&cell.to_string())).collect()),
            )
            .collect();
        let width = |column: usize| {
            lines
                .iter()
                .filter_map(|line| line.get(column))
                .map(|cell| cell.chars().count())
                .max()
        };
        let columns: Vec<(usize, bool)> = (0..self.heads.len())
            .map(|column| (width(column).unwrap_or(0), self.is_numeric(column)))
            .collect();
        for line in &lines {
            let mut text = String::new();
            for (cell, (width, numeric)) in line.iter().zip(&columns) {
                text.push_str("  ");
                text.push_str(&if *numeric {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:<width$}")
                });
            }
            write!(f, "\n{}", text.trim_end())?;
        }
        Ok(())
    }
}

/// `1 message`, `2 messages`.
pub(crate) fn counted(number: i64, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cell::Text(text) => f.write_str(text),
            Cell::Number(number) => write!(f, "{number}"),
        }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Cell::Text(text.to_owned())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Cell::Text(text)
    }
}

impl From<i64> for Cell {
    fn from(number: i64) -> Self {
        Cell::Number(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new("Topics", &["topic", "next"]);
        table.row(["orders".into(), 12.into()]);
        table.row(["m".into(), 12345.into()]);
        assert_eq!(
            table.to_string(),
            "Topics\n  topic    next\n  orders     12\n  m       12345"
        );
        assert_eq!(Table::new("Topics", &["topic"]).to_string(), "Topics\n  none");
    }
}
