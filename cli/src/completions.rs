//! `postbox completions`

use clap::CommandFactory;
use clap_complete::Shell;

use crate::output::Output;

/// Print a script by which a shell completes this command's subcommands and options
///
/// For bash, in ~/.bashrc: source <(postbox completions bash). For zsh, in a directory of $fpath: postbox completions zsh > _postbox. For fish:
/// postbox completions fish > ~/.config/fish/completions/postbox.fish. No database is asked.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// For which shell
    shell: Shell,
}

pub(crate) fn run<C: CommandFactory>(args: &Args) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut C::command(), "postbox", &mut script);
    Output::default().line(&String::from_utf8(script)?.trim_end())
}
