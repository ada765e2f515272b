//! Connection URLs.

/// The same server and user, another database.
pub(crate) fn with_database(url: &str, database: &str) -> String {
    let (address, parameters) = match url.find('?') {
        Some(at) => url.split_at(at),
        None => (url, ""),
    };
    let host = address.find("://").map_or(0, |at| at + 3);
    let server = address[host..]
        .find('/')
        .map_or(address, |at| &address[..host + at]);
    format!("{server}/{database}{parameters}")
}

/// For a server of ours. `sslmode` keeps a `PGSSLMODE` of the user's out of it.
pub(crate) fn local(port: u16, password: &str) -> String {
    format!("postgres://postgres:{password}@127.0.0.1:{port}/postgres?sslmode=disable")
}

#[cfg(test)]
mod tests {
    use super::with_database;

    #[test]
    fn only_the_database_changes() {
        assert_eq!(
            with_database("postgres://u:p@h:1/old?x=/y", "new"),
            "postgres://u:p@h:1/new?x=/y"
        );
        assert_eq!(with_database("postgres://u@h", "new"), "postgres://u@h/new");
        assert_eq!(
            with_database("postgres://?host=/run/pg", "new"),
            "postgres:///new?host=/run/pg"
        );
    }
}
