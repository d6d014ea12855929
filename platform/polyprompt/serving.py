"""The endpoint: HTTP in this process, models in replicas that Ray Serve starts, watches and starts anew.

The HTTP server is not Serve's proxy but uvicorn in the process that was started: a request crosses one border of
processes instead of two, is refused before it crosses any, and is sent again where a replica is lost on the way. Only
this file imports ray.serve.
"""

import asyncio
import contextlib
import logging
import math
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from polyprompt.errors import ConfigError, PolypromptError
from polyprompt.ray_train import cluster
from polyprompt.serving_app import make_app, watching
from polyprompt.serving_desk import Desk
from polyprompt.serving_engine import Ask, Engine, Reply
from polyprompt.serving_limits import Limits, Refusal
from polyprompt.serving_metrics import Metrics
from polyprompt.serving_models import Loaded, Spec, locate

#: A row that takes this many replicas with it is not tried on another one.
ATTEMPTS = 3
#: Open at once; uvicorn answers 503 without more to those beyond.
MAX_CONNECTIONS = 8192
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """models: name → source. uri: of the tracking store. token: of the admin routes ("" shuts them). cpus: of a
    replica, which gpu gives a GPU each. backbone: where all backbones are now, if not where they were in training."""

    models: Mapping[str, str]
    uri: str = field(repr=False)
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    cpus: float = 1
    gpu: bool = False
    batch_rows: int = 64
    backbone: str | None = None
    token: str = field(default="", repr=False)
    limits: Limits = field(default_factory=Limits)

    @property
    def name(self) -> str:
        """Of Serve's application: another endpoint on the same cluster has another port."""
        return f"polyprompt-{self.port}"


class Replica:
    """An engine in a process of its own."""

    async def __init__(self, specs: Sequence[Spec], settings: Mapping[str, Any]) -> None:  # type: ignore[misc]
        """specs: loaded before the first request, as far as they are still there. settings: of Engine."""
        self._engine = Engine(**settings)
        for spec in specs:
            try:
                await self._engine.load(spec, frozenset(specs))
            except PolypromptError as error:
                log.warning("%s version %s is not loaded ahead: %s", spec.name, spec.version, error)

    async def load(self, spec: Spec, wanted: frozenset[Spec]) -> Loaded:
        return await self._engine.load(spec, wanted)

    async def answer(self, asks: Sequence[Ask], wanted: frozenset[Spec]) -> list[Reply]:
        return await self._engine.answer(asks, wanted)

    async def check(self) -> None:
        await self._engine.check()


class Replicas:
    """All replicas, as one engine."""

    def __init__(self, handle: Any, metrics: Metrics) -> None:
        """handle: Serve's, of a deployment of Replica."""
        self._handle, self._metrics = handle, metrics

    async def load(self, spec: Spec, wanted: frozenset[Spec]) -> Loaded:
        from ray.exceptions import RayActorError

        found = await self._handle.broadcast("load", spec, wanted).results_async(return_exceptions=True)
        # The successor of one that was lost loads what it is asked for.
        there = [one for one in found if not isinstance(one, RayActorError)]
        for one in there:
            if isinstance(one, Exception):
                raise _own_error(one) or one
        return there[0] if there else await self._call("load", spec, wanted)

    async def answer(self, asks: Sequence[Ask], wanted: frozenset[Spec]) -> list[Reply]:
        return await self._call("answer", list(asks), wanted)

    async def check(self) -> None:
        await self._call("check")

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Call one replica; another one where it is lost. Answering changes nothing, so it may be done twice."""
        from ray.exceptions import RayActorError, RayTaskError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        for _ in range(ATTEMPTS):
            response = getattr(self._handle, method).remote(*arguments)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError as error:
                raise Refusal(503, "overloaded", "every replica is busy; try again later", retry_seconds=1) from error
            except DeploymentUnavailableError:
                break
            except RayActorError as error:
                log.warning("a replica was lost, its requests go to another: %s", type(error).__name__)
                self._metrics.retries.inc()
            except RayTaskError as error:
                raise _own_error(error) or error from None
        raise Refusal(503, "replica_lost", "replicas were lost over this request; try again later", retry_seconds=10)


def _own_error(found: Any) -> PolypromptError | None:
    """Return the error of ours that a replica raised, if it is one."""
    cause = getattr(found, "cause", found)
    return cause if isinstance(cause, PolypromptError) else None


@contextlib.contextmanager
def replicas(endpoint: Endpoint, specs: Sequence[Spec], metrics: Metrics) -> Iterator[Replicas]:
    """Start the replicas on the cluster that this process is in; end them, what they work on first.

    Raises ConfigError where they cannot be had.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what it warns of is said below, once
    limits = endpoint.limits
    deployment: Any = serve.deployment(
        Replica,
        name="replica",
        num_replicas=endpoint.replicas,
        ray_actor_options={"num_cpus": endpoint.cpus, "num_gpus": 1 if endpoint.gpu else 0},
        # The desk refuses what is too much before Serve does: rows wait in the replica, where they become batches.
        max_ongoing_requests=limits.waiting_rows + 1,
        max_queued_requests=limits.waiting_rows + 1,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=limits.timeout_seconds,
        health_check_period_s=2,
    )
    settings = {
        "backbone": endpoint.backbone,
        "device": "cuda" if endpoint.gpu else "cpu",
        "batch_rows": endpoint.batch_rows,
    }
    serve.start(proxy_location="Disabled")
    try:
        try:
            handle = serve.run(deployment.bind(list(specs), settings), name=endpoint.name, route_prefix=None)
        except RuntimeError as error:
            raise ConfigError(f"the replicas cannot be started: {error}") from error
        yield Replicas(handle, metrics)
    finally:
        serve.delete(endpoint.name)


def serve_forever(endpoint: Endpoint) -> None:
    """Serve until SIGTERM or Ctrl-C: no more requests are taken then, and those that were are answered.

    Raises ConfigError, BundleError, TrackingError for what cannot be served, before anything is started where it can.
    """
    specs = [locate(name, source, endpoint.uri) for name, source in endpoint.models.items()]
    metrics, num_cpus = Metrics(), math.ceil(endpoint.replicas * endpoint.cpus)
    with _listening(endpoint) as listener, cluster(num_cpus), _terminable():
        endpoint = replace(endpoint, port=listener.getsockname()[1])  # of port 0
        with replicas(endpoint, specs, metrics) as engines, contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_answer(endpoint, engines, metrics, listener))
        log.warning("no more requests are taken; those that were are answered")


async def _answer(endpoint: Endpoint, engines: Replicas, metrics: Metrics, listener: socket.socket) -> None:
    import uvicorn

    desk = Desk(engines, endpoint.uri, endpoint.limits, metrics)
    try:
        for name, source in endpoint.models.items():
            await desk.put(name, source)
    except Refusal as refusal:
        raise ConfigError(refusal.message) from refusal
    app = make_app(desk, endpoint.limits, metrics, token=endpoint.token, lifespan=watching(desk))
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        # What is refused costs little, but a connection is a file: the last resort.
        limit_concurrency=MAX_CONNECTIONS,
        # Longer than callers and proxies keep theirs: who closes first is not sent a request meanwhile.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=round(endpoint.limits.timeout_seconds) + 1,
    )
    log.warning("serving at http://%s:%d/", endpoint.host, endpoint.port)
    await uvicorn.Server(config).serve(sockets=[listener])


@contextlib.contextmanager
def _listening(endpoint: Endpoint) -> Iterator[socket.socket]:
    """Take the port before anything expensive starts. Raises ConfigError where it is taken."""
    try:
        listener = socket.create_server((endpoint.host, endpoint.port), backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"--host {endpoint.host} --port {endpoint.port}: {error.strerror}; choose another --port"
        ) from error
    with listener:
        yield listener


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """While inside, SIGTERM is as a Ctrl-C. uvicorn, which stops at both, passes them on when it has stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
