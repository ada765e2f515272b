//! A dispatcher as a process.

use postbox_dispatcher::Dispatcher;

use crate::role::{Role, RoleArgs, until_it_starts};

pub(crate) async fn run(args: RoleArgs) -> anyhow::Result<()> {
    let role = Role::begin(&args, 3, "")?;
    let dispatcher = until_it_starts(&role.stop, async || {
        Dispatcher::new(role.pool.clone()).start().await
    });
    if let Some(dispatcher) = dispatcher.await {
        role.stop.cancelled().await;
        dispatcher.shutdown().await;
    }
    Ok(())
}
