use super::*;

const EXAMPLE: &str = include_str!("../../../../docs/agent.example.toml");

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("/etc/flimcd/agent.toml")).map_err(|error| error.to_string())
}

#[test]
fn the_example_is_valid_and_has_the_defaults() {
    let config = parse(EXAMPLE).unwrap();
    assert_eq!(config.site.as_str(), "berlin");
    assert_eq!(config.images_dir(), Path::new("/var/lib/flimcd/images"));
    assert_eq!(config.api_socket(), Path::new("/run/flimcd/api.sock"));
    assert_eq!(config.limits.reserve_bytes(), 256 << 20);
    let lisbon = config.peer(&"lisbon".parse().unwrap()).unwrap();
    assert!(lisbon.allows_sending(&"anything".parse().unwrap()));
    assert!(lisbon.allows_receiving(&"web-1".parse().unwrap()));
    assert!(!lisbon.allows_receiving(&"web1".parse().unwrap()));
}

/// The example with every commented-out key switched on is valid too.
#[test]
fn the_keys_that_the_example_comments_out_exist() {
    // A table that is commented out ends where the comment does.
    let mut in_table = false;
    let text: String = EXAMPLE
        .lines()
        .map(|line| {
            in_table = line.starts_with("# [[") || (in_table && line.starts_with('#'));
            let key = line.strip_prefix("# ").filter(|rest| {
                in_table
                    || rest.split_once(" = ").is_some_and(|(key, _)| {
                        key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
                    })
            });
            format!("{}\n", key.unwrap_or(line))
        })
        .collect();
    assert!(text.contains("\nbandwidth = ") && text.contains("\nformat = "));
    let config = parse(&text).unwrap();
    assert_eq!(config.limits.bandwidth, Some(ByteRate(25_000_000)));
}

#[test]
fn relative_paths_count_from_the_file() {
    let text = EXAMPLE.replace("/var/lib/flimcd", "state");
    let config = parse(&text).unwrap();
    assert_eq!(config.state_dir, Path::new("/etc/flimcd/state"));
}

#[test]
fn what_is_wrong_is_said_with_file_and_key() {
    let check = |from: &str, to: &str, parts: &[&str]| {
        assert!(EXAMPLE.contains(from), "{from}");
        let message = parse(&EXAMPLE.replacen(from, to, 1)).unwrap_err();
        for part in ["/etc/flimcd/agent.toml"].iter().chain(parts) {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    };
    check("site = \"berlin\"", "", &["missing field `site`"]);
    check("state_dir", "stat_dir", &["unknown field `stat_dir`"]);
    check(
        "\"berlin\"",
        "\"../x\"",
        &["site", "cannot be used as a name"],
    );
    check("site = \"lisbon\"", "site = \"berlin\"", &["own site"]);
    check("0.0.0.0:7411", "7411", &["listen", "ADDRESS:PORT"]);
    check(
        "lisbon.example:7411",
        "lisbon",
        &["peer lisbon: address", "HOST:PORT"],
    );
    check("\"web-*\"", "\"/dev\"", &["may_receive", "pattern"]);
    check(
        "# bandwidth = \"200 Mbit/s\"",
        "bandwidth = \"fast\"",
        &["not a rate"],
    );
    check(
        "# bandwidth = \"200 Mbit/s\"",
        "bandwidth = 5",
        &["limits.bandwidth"],
    );
    check(
        "/run/flimcd",
        &format!("/{}", "x".repeat(120)),
        &["runtime_dir", "shorter"],
    );
    let twice = format!("{EXAMPLE}\n[[peer]]\nsite = \"lisbon\"\n");
    assert!(parse(&twice).unwrap_err().contains("two tables"));
}

#[test]
fn patterns() {
    let check = |pattern: &str, text: &str, expected: bool| {
        let got = matches_pattern(pattern.as_bytes(), text.as_bytes());
        assert_eq!(got, expected, "{pattern} {text}");
    };
    check("*", "a", true);
    check("a*c", "abbc", true);
    check("a*c", "abcb", false);
    check("*-db-*", "x-db-db-1", true);
    check("a", "ab", false);
    check("ab*", "ab", true);
}
