//! URLs of databases: what they may say, and which servers they name.

use sqlx::postgres::PgConnectOptions;

/// The servers that a URL names, in its order; several are tried one after another, as libpq does:
/// `postgres://user:password@one:5432,two:5432/name`.
pub fn servers(url: &str) -> Result<Vec<PgConnectOptions>, String> {
    let (scheme, rest) = url
        .split_once("://")
        .ok_or("it does not begin with postgres://")?;
    match scheme {
        "postgres" | "postgresql" => {}
        "mysql" | "mariadb" => {
            return Err(format!(
                "it is of MySQL ({scheme}://), and Postbox is for PostgreSQL"
            ));
        }
        "sqlite" => return Err("it is of SQLite, and Postbox is for PostgreSQL".to_owned()),
        _ => return Err(format!("its scheme is {scheme}://, not postgres://")),
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let (user, hosts) = match authority.rsplit_once('@') {
        Some((user, hosts)) => (format!("{user}@"), hosts),
        None => (String::new(), authority),
    };
    hosts
        .split(',')
        .map(|host| server(&format!("postgres://{user}{host}{}", without_attributes(path))))
        .collect()
}

fn server(url: &str) -> Result<PgConnectOptions, String> {
    let options: PgConnectOptions = url.parse().map_err(|error: sqlx::Error| {
        // The URL itself is not repeated: it may hold a password.
        format!("{error} (in a user name or password, write % as %25, / as %2F, ? as %3F, # as %23, @ as %40, : as %3A)")
    })?;
    // sqlx keeps the brackets of an IPv6 address, with which no name server knows it.
    let host = options.get_host().to_owned();
    Ok(
        match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(address) => options.host(address),
            None => options,
        },
    )
}

/// Of several servers always one is looked for that can be written to.
fn without_attributes(path: &str) -> String {
    let Some((path, parameters)) = path.split_once('?') else {
        return path.to_owned();
    };
    let kept: Vec<&str> = parameters
        .split('&')
        .filter(|parameter| !parameter.starts_with("target_session_attrs="))
        .collect();
    match kept.is_empty() {
        true => path.to_owned(),
        false => format!("{path}?{}", kept.join("&")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(url: &str) -> Vec<(String, u16, Option<String>)> {
        let servers = servers(url).expect("a URL");
        servers
            .iter()
            .map(|options| {
                let database = options.get_database().map(ToOwned::to_owned);
                (options.get_host().to_owned(), options.get_port(), database)
            })
            .collect()
    }

    #[test]
    fn an_ipv6_address_is_named_without_its_brackets() {
        let app = Some("app".to_owned());
        assert_eq!(
            named("postgres://u:p@[::1]:5433/app"),
            [("::1".to_owned(), 5433, app.clone())]
        );
        assert_eq!(
            named("postgres://u@[fe80::1],b:6/app?target_session_attrs=read-write&sslmode=disable"),
            [
                ("fe80::1".to_owned(), 5432, app.clone()),
                ("b".to_owned(), 6, app)
            ]
        );
    }

    #[test]
    fn a_password_may_have_every_character() {
        let url = "postgres://u:p%40%2F%3A%3F%23%25%20%C3%A9@h/app";
        assert_eq!(named(url), [("h".to_owned(), 5432, Some("app".to_owned()))]);
        let error = servers("postgres://u:p#w@h/app").expect_err("refused");
        assert!(error.contains("%23"), "{error}");
    }

    #[test]
    fn other_databases_are_refused_by_name() {
        for (url, name) in [
            ("mysql://u:secret@h/app", "MySQL"),
            ("mariadb://h/app", "MySQL"),
            ("sqlite://x.db", "SQLite"),
            ("https://h/app", "https"),
            ("h/app", "postgres://"),
        ] {
            let error = servers(url).expect_err("refused");
            assert!(error.contains(name) && !error.contains("secret"), "{error}");
        }
    }
}
