"""Replicas under Ray Serve: the same application several times, behind Ray's proxy and router.

Imported only for `serve --replicas`. A replica loads the model for itself and runs its own engine; Ray starts another
where one dies, and with `auto` more where many requests are under way.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import DeviceError, RequestError
from .logs import RequestLog, set_up_logging
from .settings import ServerSettings

APPLICATION = "chatglm"

BUSY_SHARE = 0.7
"""Of the answers that run at once: beyond it `auto` starts another replica."""

PROBES = 16
"""Requests for health and metrics beside those that the engine counts."""

QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""Ray's own lines; each replica writes the server's."""

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


@dataclass(frozen=True)
class ReplicaCount:
    """How many: a number, or between two. Raises RequestError."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str, least: int | None, most: int | None) -> ReplicaCount:
        """From `--replicas N` or `auto` with its bounds (1 and 4 unless given)."""
        if text != "auto":
            if not text.isdecimal() or not 1 <= int(text[:6]) <= 1024:
                raise RequestError(f"--replicas is {text!r}; it must be from 1 to 1024, or auto")
            if least is not None or most is not None:
                raise RequestError("--min-replicas and --max-replicas go with --replicas auto")
            return cls(int(text), int(text))
        found = cls(least if least is not None else 1, most if most is not None else max(4, least or 1))
        if not 1 <= found.least <= found.most:
            raise RequestError(
                f"--min-replicas is {found.least}, --max-replicas {found.most}; 1 <= min <= max must hold"
            )
        return found

    @property
    def is_fixed(self) -> bool:
        return self.least == self.most


@dataclass(frozen=True)
class ReplicaModel:
    """What each replica loads, from its own host's disk."""

    folder: Path
    dtype: str
    device: str
    threads: int
    num_gpus: int


class ReplicaApp:
    """The server's application with its engine's life tied to the replica's."""

    def __init__(self, model: ReplicaModel, settings: ServerSettings, name: str) -> None:
        import torch

        from ..engine.loading import load_model
        from .app import build_app
        from .backend import Backend

        torch.set_num_threads(model.threads)
        self.log = RequestLog(as_json=settings.log_json)
        set_up_logging(self.log)
        self.backend = Backend(load_model(model.folder, model.dtype, model.device), settings)
        self._app: ASGIApp = build_app(self.backend, self.log)
        self._name = name

    @property
    def is_alive(self) -> bool:
        """Whether the engine is: what Ray asks every few seconds."""
        return self.backend.thread.is_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":  # Ray's proxy adds the request id itself
                headers = [each for each in message.get("headers", []) if each[0].lower() != b"x-request-id"]
                message = {**message, "headers": [*headers, (b"x-replica", self._name.encode())]}
            await send(message)

        await self._app(scope, receive, named)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()  # lifespan.startup
        await self.backend.open()
        self.log.event("replica", name=self._name, pid=os.getpid(), model=self.backend.model_name)
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
        self.backend.is_draining = True
        await self.backend.close()
        await send({"type": "lifespan.shutdown.complete"})


def replica_application(model: ReplicaModel, settings: ServerSettings, count: ReplicaCount) -> Any:
    """The deployment, bound; what `serve.run` takes."""
    from ray import serve

    def build() -> Any:
        return ReplicaApp(model, settings, serve.get_replica_context().replica_id.unique_id)

    class Replica:
        async def check_health(self) -> None:
            application: ReplicaApp = self.app  # type: ignore[attr-defined]
            if not application.is_alive:
                raise RuntimeError("the engine is gone")

    deployment: Any = serve.deployment(**deployment_options(model, settings, count))
    return deployment(serve.ingress(build)(Replica)).bind()


def deployment_options(model: ReplicaModel, settings: ServerSettings, count: ReplicaCount) -> dict[str, Any]:
    """Ray refuses nothing that the engine would queue; the engine's own limits refuse, in the common shape."""
    options: dict[str, Any] = {
        "name": APPLICATION,
        "max_ongoing_requests": settings.max_running + settings.max_waiting + PROBES,
        "max_queued_requests": -1,
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": settings.drain_timeout_s + 5,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": 3,
        "logging_config": QUIET,
        "ray_actor_options": {"num_cpus": 0.5, "num_gpus": model.num_gpus},
    }
    if count.is_fixed:
        return options | {"num_replicas": count.least}
    scaling = {
        "min_replicas": count.least,
        "max_replicas": count.most,
        "target_ongoing_requests": max(1, round(BUSY_SHARE * settings.max_running)),
    }
    return options | {"autoscaling_config": scaling}


def start_ray(is_local: bool) -> None:
    """A Ray of our own on this machine (its processes ask each other for a token), or the cluster of RAY_ADDRESS."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ[CALLBACK] = "chatglm.server.replica_border.middlewares"
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray

    if not is_local:
        ray.init(namespace=APPLICATION, logging_level=logging.WARNING)
        return
    ray.init(
        namespace=APPLICATION,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=100 << 20,  # nothing large goes through it
        logging_level=logging.WARNING,
    )


def stop_ray() -> None:
    """Leave the cluster; one of our own ends with it."""
    import ray

    ray.shutdown()


def check_settings(settings: ServerSettings) -> None:
    """Raises RequestError for what replicas cannot share."""
    if settings.web:
        raise RequestError(
            "--web keeps its event queue in one process, which replicas do not share",
            cure="serve the page by one `chatglm serve --web` and the API by replicas",
        )


def run_replicas(model: ReplicaModel, settings: ServerSettings, count: ReplicaCount, log: RequestLog) -> int:
    """Start them, serve until a signal, let answers finish; the exit status. Raises DeviceError for a taken port."""
    check_settings(settings)
    from .running import bind

    with bind(settings.host, settings.port) as listener:  # a clear line where it is taken
        port = int(listener.getsockname()[1])
    settings = replace(settings, port=port)
    start_ray(is_local="RAY_ADDRESS" not in os.environ)
    from ray.exceptions import RayError

    serve: Any = importlib.import_module("ray.serve")
    stopped = threading.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, _second_ends(stopped))
    location = "HeadOnly" if settings.is_loopback else "EveryNode"
    try:
        http = {"host": settings.host, "port": port, "location": location}
        serve.start(http_options=http, logging_config=QUIET)
        _say_what_replicas_share(settings, count, log)
        serve.run(replica_application(model, settings, count), name=APPLICATION, route_prefix="/")
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        log.event("listening", url=f"http://{host}:{port}", replicas=f"{count.least} to {count.most}")
        stopped.wait()
        log.event("draining")
        serve.delete(APPLICATION)  # new requests are refused, replicas finish theirs; the proxy stays for both
        serve.shutdown()
    except (RuntimeError, TimeoutError, RayError) as error:
        raise DeviceError(f"the replicas cannot be started: {_first_line(error)}") from error
    finally:
        stop_ray()
    return 0


def _second_ends(stopped: threading.Event) -> Callable[[int, Any], None]:
    def handle(sig: int, frame: Any) -> None:
        if stopped.is_set():
            os._exit(128 + sig)
        stopped.set()

    return handle


def _say_what_replicas_share(settings: ServerSettings, count: ReplicaCount, log: RequestLog) -> None:
    if (settings.rate_limit or settings.token_limit) and count.most > 1:
        message = f"rates are counted in each replica: a key may use up to {count.most} times its limit"
        log.event("log", level="warning", message=message)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
