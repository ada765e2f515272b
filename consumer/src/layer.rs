//! Layers around handlers: what a service does beside each of them.

use std::sync::Arc;
use std::task::{Context, Poll};

use tower_layer::Layer;
use tower_service::Service;

use crate::extract::Invocation;
use crate::outcome::{BoxFuture, HandlerError, HandlerFailure, Outcome};

/// What runs for a message.
pub(crate) type Run = Arc<dyn Fn(Invocation) -> BoxFuture<Outcome> + Send + Sync>;

/// A handler as a tower service, which is what a layer given to [`Consumer::layer`](crate::Consumer::layer) wraps. It is always ready.
#[derive(Clone)]
pub struct HandlerService(Run);

impl Service<Invocation> for HandlerService {
    type Response = ();
    type Error = HandlerFailure;
    type Future = BoxFuture<Result<(), HandlerFailure>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), HandlerFailure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, invocation: Invocation) -> Self::Future {
        let run = (self.0)(invocation);
        Box::pin(async move { run.await.map_err(HandlerFailure::from) })
    }
}

impl std::fmt::Debug for HandlerService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HandlerService")
    }
}

/// What runs when `run` has this layer around it.
pub(crate) fn around<L>(layer: &L, run: Run) -> Run
where
    L: Layer<HandlerService>,
    L::Service: Service<Invocation, Response = ()> + Clone + Send + Sync + 'static,
    <L::Service as Service<Invocation>>::Error: Into<HandlerError>,
    <L::Service as Service<Invocation>>::Future: Send + 'static,
{
    let service = layer.layer(HandlerService(run));
    Arc::new(move |invocation| {
        let mut service = service.clone();
        Box::pin(async move {
            std::future::poll_fn(|context| service.poll_ready(context))
                .await
                .map_err(Into::into)?;
            service.call(invocation).await.map_err(Into::into)
        })
    })
}
