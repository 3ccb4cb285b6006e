"""The service on Ray Serve: `lora-fusion serve-ray`, or `service.fleet.app:build` in a file for `serve deploy`.

An ingress reads which stack a request belongs to and sends it to a replica that has it, by Serve's own multiplexing;
each replica is an actor that runs a server. Serve scales by requests in progress and replaces replicas that end.
"""

import os
import signal
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from service.errors import ApiError, error_response
from service.fleet.environment import keep_on_loopback
from service.fleet.routing import Call, Head, ReplicaLostError, Stacks, answer
from service.fleet.server import ReplicaServer, hold_folder
from service.key_ring import check_keyless
from service.registry import Registry
from service.settings import CLIENT_KEY, PREFIX, Settings, SettingsError, read_settings

keep_on_loopback()  # replicas import this before they listen

APP = "lora-fusion"
PASSED_ON = (PREFIX, "VLLM_", "HF_", "OMP_", "TOKENIZERS_")
"""Of the environment of the command, what replicas on other machines get, too."""
KILL_S = 10.0
"""As `python -m service` may take beyond its own bounds."""
SERVES_OWN = (b"x-request-id", b"date", b"server")
"""Headers that Serve itself puts into each answer; the id is the request's."""
QUEUE = 2
"""Requests that a replica has in progress at most, times those at which another is started."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How many replicas, and of what size."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing: int = 16
    cpus: float = 1.0
    gpus: float = 0.0

    def check(self, settings: Settings) -> None:
        """Raise `SettingsError` for counts that make no sense, and for replicas that would not share a registry."""
        if not 1 <= self.min_replicas <= self.max_replicas or self.target_ongoing < 1:
            raise SettingsError("expected 1 <= min_replicas <= max_replicas and target_ongoing >= 1")
        if self.max_replicas > 1 and not settings.store:
            needed = "FUSION_DATABASE=postgresql://… and FUSION_STORE, in which replicas share adapters and profiles"
            raise SettingsError(f"max_replicas={self.max_replicas} needs {needed}; see docs/replicas.md")


class Fusion:
    """A replica: an actor with a server, in which `max_stacks` stacks stay."""

    async def __init__(self, environment: Mapping[str, str], max_stacks: int) -> None:  # type: ignore[misc]  # Serve awaits it
        base = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # Ray sets it to 1
        given = {**base, **environment}
        settings = read_settings({name: value for name, value in given.items() if name.startswith(PREFIX)})
        if settings.store:
            folder, self._lock = hold_folder(settings.data)
            given[f"{PREFIX}DATA"] = str(folder)
        # Without the actor nothing routes to the server, and without the server nothing may route to the actor.
        end = partial(os._exit, 1)
        self._server = ReplicaServer(given, end, settings.drain_s + settings.stop_timeout_s + KILL_S)
        self._hold_stack = serve.multiplexed(max_num_models_per_replica=max_stacks)(_name)
        await self._server.start()

    async def pass_on(self, call: Call) -> AsyncGenerator[Head | bytes, None]:
        """The server's answer."""
        if key := serve.get_multiplexed_model_id():
            await self._hold_stack(key)
        async for part in self._server.pass_on(call):
            yield part

    async def check_health(self) -> None:
        """Raise when the server is not alive; one whose engine restarts is."""
        if not await self._server.answers("/livez"):
            raise RuntimeError("the server does not answer")

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self._server.stop()


async def _name(stack: str) -> str:
    """In place of what Serve's multiplexing would load: the server does that itself."""
    return stack


class Ingress:
    """Takes all requests, and sends each to a replica that has its stack."""

    def __init__(self, replicas: DeploymentHandle, max_bytes: int) -> None:
        self._replicas = replicas.options(stream=True, method_name="pass_on")
        self._max_bytes = max_bytes
        self._stacks = Stacks(self._send)

    async def _send(self, call: Call, key: str) -> AsyncGenerator[Head | bytes, None]:
        response = self._replicas.options(multiplexed_model_id=key).remote(call)
        try:
            async for part in response:
                yield part
        except (RayActorError, DeploymentUnavailableError) as error:
            raise ReplicaLostError(str(error)) from error
        finally:
            response.cancel()

    async def __call__(self, request: Request) -> Response:
        """Answer by a replica, the bytes as they come."""
        try:
            head, body = await answer(await self._read(request), self._send, self._stacks)
        except BackPressureError:
            return error_response(ApiError(503, "Too many requests wait for a replica; try again."))
        except ApiError as error:
            return error_response(error)
        response = StreamingResponse(body, status_code=head.status)
        response.raw_headers = [pair for pair in head.headers if pair[0] not in SERVES_OWN]
        return response

    async def _read(self, request: Request) -> Call:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_bytes:
                raise ApiError(413, f"The body is larger than {self._max_bytes} bytes.")
        target = request.scope["raw_path"].decode("latin-1")
        if query := request.scope["query_string"].decode("latin-1"):
            target += f"?{query}"
        return Call(request.method, target, list(request.headers.raw), bytes(body))


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application, for `args` named as the fields of `Scale`; `SettingsError` for those that do not fit."""
    defaults = asdict(Scale())
    if unknown := sorted(set(args) - set(defaults)):
        raise SettingsError(f"unknown arguments {unknown}; expected some of {list(defaults)}")
    scale = Scale(**{name: type(default)(args.get(name, default)) for name, default in defaults.items()})
    settings = read_settings()
    scale.check(settings)
    environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    environment.pop(CLIENT_KEY, None)
    scaling = {"min_replicas": scale.min_replicas, "max_replicas": scale.max_replicas}
    replicas = serve.deployment(
        name="Fusion",
        autoscaling_config={**scaling, "target_ongoing_requests": scale.target_ongoing},
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        max_ongoing_requests=QUEUE * scale.target_ongoing,
        max_queued_requests=settings.max_requests,
        health_check_period_s=5,
        health_check_timeout_s=15,
        graceful_shutdown_timeout_s=settings.drain_s + settings.stop_timeout_s + KILL_S,
    )(Fusion)
    ingress = serve.deployment(
        name="Ingress", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=16 * settings.max_requests
    )(Ingress)
    limit = max(settings.max_upload_bytes, settings.max_body_bytes) + 2**20  # the replica's own limit comes first
    return ingress.bind(replicas.bind(environment, settings.max_cpu_loras), limit)


def check_keys(settings: Settings) -> None:
    """Raise `SettingsError` when the ingress would let everybody in: each replica sees a loopback address alone."""
    has_keys = False
    if settings.database:  # else each replica has a registry of its own
        shared = bool(settings.store)
        registry = Registry(settings.registry_url, timeout_s=settings.database_timeout_s, shared=shared)
        has_keys = registry.snapshot.has_keys
        registry.close()
    try:
        check_keyless(settings, has_keys=has_keys)
    except RuntimeError as error:
        raise SettingsError(str(error)) from error


def run(args: Mapping[str, Any], address: str | None) -> None:
    """Serve on FUSION_HOST:FUSION_PORT until SIGTERM or SIGINT, on the Ray cluster at `address`, or else one that
    starts and ends with this process, as `prepare_ray` said before Ray was imported.
    """
    settings, application = read_settings(), build(args)
    check_keys(settings)
    ray.init(address=address, **({} if address else {"include_dashboard": False}))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        http = {"host": settings.host, "port": settings.port, "request_timeout_s": settings.request_timeout_s}
        serve.start(http_options=http)
        serve.run(application, name=APP, route_prefix="/")
        print(f"ready on http://{settings.host}:{settings.port}", file=sys.stderr, flush=True)
        while True:
            signal.pause()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        serve.shutdown() if address is None else serve.delete(APP)
        ray.shutdown()
