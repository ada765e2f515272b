//! Arrays of numbers as the server sends them. The driver decodes them element by element, at ten times the cost, and where little is wanted they are
//! most of what is read.

use sqlx::postgres::{PgRow, PgValueFormat};
use sqlx::{Row, ValueRef};

/// The elements of an array column, of a type of `N` bytes, each made of its bytes; `None`: there is no array.
pub(super) fn elements<const N: usize, T>(
    row: &PgRow,
    column: usize,
    make: impl Fn(Option<[u8; N]>) -> Option<T>,
) -> sqlx::Result<Option<Vec<T>>> {
    let value = row.try_get_raw(column)?;
    if value.is_null() {
        return Ok(None);
    }
    let is_binary = value.format() == PgValueFormat::Binary;
    let bytes = value.as_bytes().map_err(sqlx::Error::Decode)?;
    let decoded = is_binary.then(|| decode(bytes, make)).flatten();
    match decoded {
        Some(elements) => Ok(Some(elements)),
        None => Err(sqlx::Error::ColumnDecode {
            index: column.to_string(),
            source: "it is not an array of one dimension as it should be".into(),
        }),
    }
}

/// `None` if it is anything else.
fn decode<const N: usize, T>(bytes: &[u8], make: impl Fn(Option<[u8; N]>) -> Option<T>) -> Option<Vec<T>> {
    let (dimensions, rest) = number(bytes)?;
    // Whether it has nulls, and the type of its elements, are of no interest.
    let rest = rest.get(8..)?;
    if dimensions == 0 {
        return Some(Vec::new());
    }
    let (count, rest) = number(rest)?;
    let mut rest = rest.get(4..).filter(|_| dimensions == 1)?;
    let mut elements = Vec::with_capacity(usize::try_from(count).ok()?.min(rest.len() / 4));
    for _ in 0..count {
        let (length, after) = number(rest)?;
        let element = match length {
            -1 => {
                rest = after;
                None
            }
            _ => {
                let (element, after) = after.split_first_chunk::<N>()?;
                rest = after;
                Some(*element).filter(|_| length as usize == N).map(Some)?
            }
        };
        elements.push(make(element)?);
    }
    rest.is_empty().then_some(elements)
}

fn number(bytes: &[u8]) -> Option<(i32, &[u8])> {
    let (number, rest) = bytes.split_first_chunk()?;
    Some((i32::from_be_bytes(*number), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(elements: &[Option<i32>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for number in [1, 1, 23, elements.len() as i32, 1] {
            bytes.extend(i32::to_be_bytes(number));
        }
        for element in elements {
            bytes.extend(i32::to_be_bytes(if element.is_some() { 4 } else { -1 }));
            bytes.extend(element.iter().flat_map(|element| element.to_be_bytes()));
        }
        bytes
    }

    fn read(bytes: &[u8]) -> Option<Vec<Option<i32>>> {
        decode(bytes, |element| Some(element.map(i32::from_be_bytes)))
    }

    #[test]
    fn an_array_is_read_and_what_is_none_is_not() {
        let some = [Some(7), None, Some(-1)];
        assert_eq!(read(&array(&some)).as_deref(), Some(some.as_slice()));
        let empty: Vec<u8> = [0, 0, 23].into_iter().flat_map(i32::to_be_bytes).collect();
        assert_eq!(read(&empty), Some(Vec::new()));
        let whole = array(&some);
        for end in 0..whole.len() {
            assert_eq!(read(&whole[..end]), None, "{end}");
        }
        assert_eq!(read(&[whole.as_slice(), &[0]].concat()), None);
        let wide = decode::<8, u64>(&whole, |element| element.map(u64::from_be_bytes));
        assert_eq!(wide, None, "its elements have four bytes");
    }
}
