"""Online generation on Ray Serve: replicas that generate, and a cheap process that answers HTTP.

``application`` is what ``serve run`` and ``serve deploy`` take; ``dcompile serve`` starts it.
``Generator`` can be bound into an application of one's own:

    generator = serve.deployment(Generator).bind(ServeSettings().as_dict())

Every request is checked where HTTP is answered, then goes to a replica, where requests of one kind
become a batch. A request whose replica dies is made again on another one: its seed is fixed by
then, so the picture is the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from ray import serve
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from dcompile.errors import DcompileError, JobError, LostError, OverloadedError
from dcompile.notices import logger
from dcompile.serving.http import app_of
from dcompile.serving.replica import Replica
from dcompile.serving.settings import EngineSettings, ServeSettings
from dcompile.serving.worker import Event, Made, Request, Ticket

NAME = "dcompile"
# Models that one replica holds at a time; the one used least recently makes room.
MOST_MODELS = 4
MOST_TICKETS = 64  # of one batch, before it is split by kind
RETRIES = 3
RETRY_AFTER = 0.5  # seconds before the first one, twice as many before each further one
HEALTH_CHECKS = {"health_check_period_s": 5, "health_check_timeout_s": 30}


class Generator:
    """Generates with one or more models, each with a thread of its own.

    Args:
        settings: see ``ServeSettings.as_dict``.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = ServeSettings.of(settings)
        if self._settings.threads:
            torch.set_num_threads(self._settings.threads)
        self._name = uuid.uuid4().hex[:8]
        # Of models that had to make room, only requests that still run keep the replica.
        self._loaded: WeakValueDictionary[str, Replica] = WeakValueDictionary()
        self._loading: dict[str, asyncio.Future[Replica]] = {}
        first = self._settings.engines[0]
        # A replica is ready when its first model is.
        self._first = Replica(first, self._name)
        # Each model collects its own, so that none waits for another's batch.
        self._collectors: WeakKeyDictionary[Replica, Callable[[Ticket], Any]] = WeakKeyDictionary()

    async def describe(self, model: str) -> dict[str, Any]:
        """See ``Replica.describe``."""
        replica = await self._replica(model)
        return replica.describe()

    async def generate(self, model: str, request: Request) -> Made:
        """A picture.

        Raises:
            JobError: the model does not do this.
            LostError: this process's device answers nothing any more.
        """
        replica = await self._replica(model)
        return await replica.worker.submit(Ticket(request), self._batcher(replica))

    async def stream(self, model: str, request: Request) -> AsyncIterator[Event]:
        """What happens to a request, the picture last."""
        replica = await self._replica(model)
        async for event in replica.worker.stream(request, self._batcher(replica)):
            yield event

    def check_health(self) -> None:
        """Have this replica started again once it can generate nothing any more."""
        for replica in [self._first, *self._loaded.values()]:
            if replica.worker.failure is not None:
                raise RuntimeError(replica.worker.failure)

    async def _replica(self, model: str) -> Replica:
        if model == self._settings.engines[0].name:
            return self._first
        found: Replica = await self._other(model)
        return found

    @serve.multiplexed(max_num_models_per_replica=MOST_MODELS)  # type: ignore[untyped-decorator]
    async def _other(self, model: str) -> Replica:
        loading = self._loading.get(model)
        if loading is None:
            (engine,) = [one for one in self._settings.engines if one.name == model]
            loop = asyncio.get_running_loop()
            loading = self._loading[model] = loop.run_in_executor(None, _replica_of, engine)
        try:
            # Whoever waits may go away: the next one waits for the same replica.
            replica = await asyncio.shield(loading)
        finally:
            if loading.done():
                self._loading.pop(model, None)
        self._loaded[model] = replica
        return replica

    def _collector_of(self, replica: Replica) -> Callable[[Ticket], Any]:
        found = self._collectors.get(replica)
        if found is None:
            found = self._collectors[replica] = self._collector()
        return found

    def _collector(self) -> Callable[[Ticket], Any]:
        wait = self._settings.batch_wait

        @serve.batch(  # type: ignore[untyped-decorator]
            max_batch_size=MOST_TICKETS, batch_wait_timeout_s=wait
        )
        async def collect(tickets: list[Ticket]) -> list[None]:
            """Run what came together, kind by kind."""
            groups: dict[Any, list[Ticket]] = {}
            for ticket in tickets:
                groups.setdefault(ticket.group, []).append(ticket)
            for group in groups.values():
                worker = group[0].worker
                assert worker is not None
                results = await worker.run_batch(group, self._settings.batch_pixels)
                for ticket, result in zip(group, results, strict=True):
                    ticket.settle(result)
            return [None] * len(tickets)

        return cast(Callable[[Ticket], Any], collect)

    def _batcher(self, replica: Replica) -> Callable[[Ticket], Any]:
        async def batched(ticket: Ticket) -> Made:
            ticket.worker = replica.worker
            ticket.result = asyncio.get_running_loop().create_future()
            collecting = asyncio.ensure_future(self._collector_of(replica)(ticket))
            try:
                await asyncio.wait({ticket.result, collecting}, return_when=asyncio.FIRST_COMPLETED)
                if not ticket.result.done():
                    await collecting  # raises what went wrong
                return await ticket.result
            finally:
                collecting.cancel()
                ticket.result.cancel()  # nobody looks at what comes of it

        return batched


def _replica_of(engine: EngineSettings) -> Replica:
    gc.collect()  # a model that had to make room is part of cycles
    return Replica(engine, uuid.uuid4().hex[:8])  # counts begin again, so the name is new


class RayClient:
    """Generates on a deployment of ``Generator``.

    Args:
        handle: of the deployment.
        model: name of one of its models.
        told: called when a picture is begun again.
    """

    def __init__(
        self, handle: DeploymentHandle, model: str, told: Callable[[], None] = lambda: None
    ) -> None:
        self._handle = handle.options(multiplexed_model_id=model)
        self._model = model
        self.told = told

    async def describe(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = await self._handle.describe.remote(self._model)
        except (RayActorError, DeploymentUnavailableError, BackPressureError) as error:
            return {"ready": False, "reason": _first_line(error)}
        except RayTaskError as error:  # another model than the first cannot be loaded
            return {"ready": False, "reason": _first_line(error.cause)}
        return found

    async def generate(self, request: Request) -> Made:
        attempt = 0
        while True:
            request = await self._again(request, attempt)
            response = self._handle.generate.remote(self._model, request)
            try:
                made: Made = await response
                return made
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:
                self._raise_unless_lost(error, attempt)
                attempt += 1

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        attempt = 0
        while True:
            request = await self._again(request, attempt)
            response = self._handle.options(stream=True).stream.remote(self._model, request)
            try:
                async for event in response:
                    yield event
                return
            except (asyncio.CancelledError, GeneratorExit):
                response.cancel()
                raise
            except Exception as error:
                self._raise_unless_lost(error, attempt)
                attempt += 1

    async def _again(self, request: Request, attempt: int) -> Request:
        """The request for this attempt; later ones wait for a replica that is being replaced."""
        if attempt == 0:
            return request
        await asyncio.sleep(RETRY_AFTER * 2 ** (attempt - 1))
        return replace(request, alone=True)  # it may be what ended the replica

    def _raise_unless_lost(self, error: Exception, attempt: int) -> None:
        """Raise what the request itself has caused; a lost replica's work is made again."""
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, JobError):
                raise cause
            if not isinstance(cause, LostError):
                raise error
            error = cause
        if isinstance(error, BackPressureError):
            raise OverloadedError(str(error)) from error
        lost = (RayActorError, DeploymentUnavailableError, TaskCancelledError, LostError)
        if not isinstance(error, lost) and "Replica" not in type(error).__name__:
            raise error
        if attempt == RETRIES:
            raise LostError(
                f"replicas were lost {attempt + 1} times: {_first_line(error)}"
            ) from error
        logger.warning("a replica was lost, its picture is begun again: %s", _first_line(error))
        self.told()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def application(arguments: Mapping[str, Any]) -> serve.Application:
    """The application: for ``serve.run``, ``serve run`` and the import path of ``serve deploy``.

    Args:
        arguments: ``settings``, see ``ServeSettings.as_dict``; all of them have defaults.

    Raises:
        DcompileError: a setting is unknown or wrong.
    """
    own = ServeSettings.of(arguments.get("settings", {}))
    generator: Any = serve.deployment(
        name="Generator",
        max_ongoing_requests=max(MOST_TICKETS, own.limits.queue),
        graceful_shutdown_timeout_s=own.drain,
        ray_actor_options={"num_cpus": own.cpus, "num_gpus": own.gpus},
        **_replicas(own),
        **HEALTH_CHECKS,
    )(Generator)

    def build_app() -> Any:
        # In the process that answers; a closure travels there, an app with a page cannot.
        handle = serve.get_deployment_handle(
            "Generator", app_name=serve.get_replica_context().app_name
        )
        clients = {one.name: RayClient(handle, one.name) for one in own.engines}
        app = app_of(
            clients, own.limits, chooses_caching=own.chooses_caching, **own.page_arguments()
        )
        for client in clients.values():
            client.told = app.state.server.metrics.retried
        return app

    ingress = serve.deployment(
        name="Http",
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        **HEALTH_CHECKS,
    )(serve.ingress(build_app)())
    bound: serve.Application = ingress.bind(generator.bind(own.as_dict()))
    return bound


def _replicas(own: ServeSettings) -> dict[str, Any]:
    if own.autoscale is None:
        return {"num_replicas": own.replicas}
    least, most = own.autoscale
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            # Two pictures a replica: one is made while the next one waits.
            "target_ongoing_requests": 2,
            "upscale_delay_s": 10,
            "downscale_delay_s": 300,
        }
    }


def start(settings: ServeSettings, host: str, port: int) -> None:
    """Start a cluster if there is none, and the application on it; returns when it is ready.

    Args:
        settings: of the application.
        host, port: where HTTP is answered.

    Raises:
        DcompileError: the replicas cannot start; says why.
    """
    import os

    import ray

    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = os.environ.get("RAY_ADDRESS")
        options = {} if address else {"include_dashboard": False}
        ray.init(address=address, namespace=NAME, log_to_driver=True, **options)
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(application({"settings": settings.as_dict()}), name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise DcompileError(f"the server cannot start: {_why(error)}") from error


def stop() -> None:
    """End the application; and the cluster, if it is this process's own."""
    import ray

    serve.delete(NAME)
    ray.shutdown()


def _why(error: BaseException) -> str:
    """The error that a replica was stopped by, as far as Serve says it."""
    said = [str(error)]
    with contextlib.suppress(Exception):  # the reason is of less weight than the failure
        deployments = serve.status().applications[NAME].deployments
        said += [deployment.message for deployment in deployments.values()]
    lines = [line.strip() for text in said for line in text.splitlines() if line.strip()]
    found = [line for line in lines if "Error: " in line and not line.startswith("ray.")]
    return (found or lines or ["no reason given"])[-1]
