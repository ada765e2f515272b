//! The walls of the house: no circle among the rooms of a package, and no file that nobody can hold in mind.
//!
//! **Rooms.** In each folder of a package's `src`, a file is a room, and a folder with the file of its name is one. A room uses another of the same folder when a
//! file in it names something in the other, by `use` or in full, wherever that something is passed on from. What a room's file and the files in its folder
//! say of each other is their own affair, and tests' imports do not count.
#![allow(clippy::unwrap_used)] // Clippy allows it in test functions, and here what they call is as much a test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::Visit;

const PACKAGES: [&str; 8] = [
    "core",
    "outbox",
    "macros",
    "consumer",
    "dispatcher",
    "cli",
    "testkit",
    "tests",
];

/// Lines of code of a file, without its tests.
const MOST_LINES: usize = 500;

/// Of the executor.
const MOST_FIELDS: usize = 12;

/// A module by its path below the crate: `["executor", "run"]`.
type Module = Vec<String>;

/// The files of a crate by their modules.
struct Crate {
    files: BTreeMap<Module, syn::File>,
    /// What a module passes on: the name, and where it is.
    passed_on: BTreeMap<(Module, String), Module>,
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute
                .parse_args::<syn::Ident>()
                .is_ok_and(|condition| condition == "test")
    })
}

/// All paths that a use tree names.
fn leaves(tree: &syn::UseTree, before: &mut Vec<String>, found: &mut Vec<(Vec<String>, Option<String>)>) {
    match tree {
        syn::UseTree::Path(path) => {
            before.push(path.ident.to_string());
            leaves(&path.tree, before, found);
            before.pop();
        }
        syn::UseTree::Name(name) => {
            let mut path = before.clone();
            if name.ident != "self" {
                path.push(name.ident.to_string());
            }
            found.push((path.clone(), path.last().cloned()));
        }
        syn::UseTree::Rename(rename) => {
            let mut path = before.clone();
            path.push(rename.ident.to_string());
            found.push((path, Some(rename.rename.to_string())));
        }
        syn::UseTree::Glob(_) => found.push((before.clone(), None)),
        syn::UseTree::Group(group) => group.items.iter().for_each(|tree| leaves(tree, before, found)),
    }
}

/// The paths that a file names outside of its tests.
#[derive(Default)]
struct Paths(Vec<Vec<String>>);

impl<'ast> Visit<'ast> for Paths {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        let attributes = match item {
            syn::Item::Mod(item) => &item.attrs,
            syn::Item::Use(item) => &item.attrs,
            syn::Item::Fn(item) => &item.attrs,
            syn::Item::Impl(item) => &item.attrs,
            _ => return syn::visit::visit_item(self, item),
        };
        if !is_test(attributes) {
            syn::visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        let mut found = Vec::new();
        leaves(&item.tree, &mut Vec::new(), &mut found);
        self.0.extend(found.into_iter().map(|(path, _)| path));
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.0.push(
            path.segments
                .iter()
                .map(|segment| segment.ident.to_string())
                .collect(),
        );
        syn::visit::visit_path(self, path);
    }
}

impl Crate {
    fn new(files: BTreeMap<Module, syn::File>) -> Self {
        let mut all = Self {
            files,
            passed_on: BTreeMap::new(),
        };
        let mut passed_on = BTreeMap::new();
        for (module, file) in &all.files {
            for item in &file.items {
                let syn::Item::Use(item) = item else { continue };
                if matches!(item.vis, syn::Visibility::Inherited) {
                    continue;
                }
                let mut found = Vec::new();
                leaves(&item.tree, &mut Vec::new(), &mut found);
                for (path, name) in found {
                    if let (Some(name), Some(to)) = (name, all.resolve(module, &path)) {
                        passed_on.insert((module.clone(), name), to);
                    }
                }
            }
        }
        all.passed_on = passed_on;
        all
    }

    /// The module in which what the path names is, as far as files tell.
    fn resolve(&self, from: &Module, path: &[String]) -> Option<Module> {
        let mut at = match path.first()?.as_str() {
            "crate" => Vec::new(),
            "self" => from.clone(),
            "super" => from[..from.len().checked_sub(1)?].to_vec(),
            // A child.
            first => {
                let mut child = from.clone();
                child.push(first.to_owned());
                if !self.files.contains_key(&child) {
                    return None;
                }
                child
            }
        };
        for segment in &path[1..] {
            if segment == "super" {
                at.pop()?;
                continue;
            }
            let mut child = at.clone();
            child.push(segment.clone());
            if self.files.contains_key(&child) {
                at = child;
            } else if let Some(elsewhere) = self.passed_on.get(&(at.clone(), segment.clone())) {
                at = elsewhere.clone();
            } else {
                break;
            }
        }
        Some(at)
    }

    /// Which rooms of the same folder each room uses, and the file that says so.
    fn uses(&self) -> BTreeMap<Module, BTreeMap<Module, String>> {
        let mut uses: BTreeMap<Module, BTreeMap<Module, String>> = BTreeMap::new();
        for (module, file) in &self.files {
            let mut paths = Paths::default();
            paths.visit_file(file);
            for path in paths.0 {
                let Some(to) = self.resolve(module, &path) else {
                    continue;
                };
                let common = module.iter().zip(&to).take_while(|(a, b)| a == b).count();
                if let (Some(_), Some(_)) = (module.get(common), to.get(common)) {
                    let (room, other) = (module[..=common].to_vec(), to[..=common].to_vec());
                    let why = format!("{} names {}", module.join("/"), path.join("::"));
                    uses.entry(room).or_default().entry(other).or_insert(why);
                }
            }
        }
        uses
    }

    /// A circle of rooms, with what makes it one.
    fn circle(&self) -> Option<Vec<String>> {
        fn visit(
            room: &Module,
            uses: &BTreeMap<Module, BTreeMap<Module, String>>,
            way: &mut Vec<(Module, String)>,
            done: &mut BTreeSet<Module>,
        ) -> Option<Vec<String>> {
            for (other, why) in uses.get(room).into_iter().flatten() {
                way.push((room.clone(), why.clone()));
                if let Some(begin) = way.iter().position(|(room, _)| room == other) {
                    return Some(way[begin..].iter().map(|(_, why)| why.clone()).collect());
                }
                if !done.contains(other)
                    && let Some(circle) = visit(other, uses, way, done)
                {
                    return Some(circle);
                }
                way.pop();
            }
            done.insert(room.clone());
            None
        }
        let uses = self.uses();
        let mut done = BTreeSet::new();
        uses.keys()
            .find_map(|room| visit(room, &uses, &mut Vec::new(), &mut done))
    }
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// The crates of a package: its library or program, and the programs in `src/bin`.
fn crates(package: &str) -> Vec<Crate> {
    let src = repository().join(package).join("src");
    let mut crates: BTreeMap<PathBuf, BTreeMap<Module, syn::File>> = BTreeMap::new();
    for path in sources(&src) {
        let below = path.strip_prefix(&src).unwrap();
        let parts: Vec<String> = below
            .with_extension("")
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        let (of, mut module) = match parts.first().map(String::as_str) {
            Some("bin") => (src.join("bin").join(&parts[1]), parts[2..].to_vec()),
            _ => (src.clone(), parts),
        };
        if ["lib", "main", "mod"].contains(&module.last().map_or("", String::as_str)) {
            module.pop();
        }
        let text = fs::read_to_string(&path).unwrap();
        let file = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        crates.entry(of).or_default().insert(module, file);
    }
    crates.into_values().map(Crate::new).collect()
}

#[test]
fn the_rooms_of_a_package_form_no_circle() {
    let mut circles = Vec::new();
    for package in PACKAGES {
        for each in crates(package) {
            if let Some(circle) = each.circle() {
                circles.push(format!("{package}/src:\n  {}", circle.join("\n  ")));
            }
        }
    }
    assert!(circles.is_empty(), "{}", circles.join("\n"));
}

#[test]
fn no_file_is_longer_than_a_reader_can_hold() {
    let mut long = Vec::new();
    for package in PACKAGES {
        for path in sources(&repository().join(package).join("src")) {
            let text = fs::read_to_string(&path).unwrap();
            let lines = text.lines().take_while(|line| *line != "#[cfg(test)]").count();
            if lines > MOST_LINES {
                long.push(format!(
                    "{}: {lines} lines",
                    path.strip_prefix(repository()).unwrap().display()
                ));
            }
        }
    }
    assert!(long.is_empty(), "{}", long.join("\n"));
}

/// A connection that comes from a pool goes back to it, with the transaction that sqlx forgets when its `begin` is dropped. The session's own connection is
/// closed after whatever was cancelled on it.
/// What all of the executor's rooms can reach is as little as it can be.
#[test]
fn the_executor_is_a_few_rooms() {
    let source =
        std::fs::read_to_string(repository().join("consumer/src/executor.rs")).expect("the executor");
    let file = syn::parse_file(&source).expect("Rust");
    let fields = file.items.iter().find_map(|item| match item {
        syn::Item::Struct(item) if item.ident == "Executor" => Some(item.fields.len()),
        _ => None,
    });
    let fields = fields.expect("the struct Executor");
    assert!(
        fields <= MOST_FIELDS,
        "Executor has {fields} fields: which of its rooms is the new one's?"
    );
}

#[test]
fn libraries_begin_transactions_by_the_one_that_may_be_dropped_while_it_begins() {
    let own = ["consumer/src/session/record.rs"];
    let mut others = Vec::new();
    for package in ["core", "outbox", "consumer", "dispatcher"] {
        for path in sources(&repository().join(package).join("src")) {
            let name = path.strip_prefix(repository()).unwrap().display().to_string();
            let text = fs::read_to_string(&path).unwrap();
            let code = text.lines().take_while(|line| *line != "#[cfg(test)]");
            for line in code.filter(|line| !line.trim_start().starts_with("//")) {
                let begins = [".begin()", "begin_with("]
                    .iter()
                    .any(|begin| line.contains(begin));
                if begins && !line.contains('"') && !own.contains(&name.as_str()) {
                    others.push(format!("{name}: {}", line.trim()));
                }
            }
        }
    }
    assert!(
        others.is_empty(),
        "take postbox::__private::Transaction instead:\n{}",
        others.join("\n")
    );
}

fn house(files: &[(&str, &str)]) -> Crate {
    Crate::new(
        files
            .iter()
            .map(|(path, text)| {
                let module = path
                    .split('/')
                    .filter(|part| *part != "lib")
                    .map(str::to_owned)
                    .collect();
                (module, syn::parse_file(text).unwrap())
            })
            .collect(),
    )
}

#[test]
fn a_circle_is_found_however_it_is_closed() {
    let open = [
        ("lib", "mod a; mod b; mod c; pub use c::C;"),
        ("a", "use crate::b::B; pub struct A;"),
        ("b", "mod inner; pub use inner::B;"),
        ("b/inner", "use super::super::c::C; pub struct B(C);"),
        ("c", "pub struct C; #[cfg(test)] mod tests { use crate::a::A; }"),
    ];
    assert_eq!(house(&open).circle(), None);
    for closing in [
        "use crate::a::A; pub struct C(A);",
        "pub struct C(crate::a::A);",
        "use super::a; pub struct C(a::A);",
        "pub struct C; pub fn f() { let _ = crate::a::A; }",
        // By what is passed on.
        "use crate::b::B; pub struct C(B);",
    ] {
        let mut closed = open;
        closed[4] = ("c", closing);
        let circle = house(&closed).circle().unwrap_or_else(|| panic!("{closing}"));
        assert!(
            circle.iter().any(|step| step.starts_with("c names")),
            "{circle:?}"
        );
    }
    // By a name of the crate's own.
    let named = [
        ("lib", "mod a; mod c; pub use c::C;"),
        ("a", "use crate::C; pub struct A;"),
        ("c", "pub struct C(crate::a::A);"),
    ];
    assert!(house(&named).circle().is_some());
    // A room and its own files are one.
    let family = [
        ("lib", "mod a;"),
        ("a", "mod child; use self::child::Child; pub struct A;"),
        ("a/child", "use super::A; pub struct Child(A);"),
    ];
    assert_eq!(house(&family).circle(), None);
}
