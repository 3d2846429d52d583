"""`chatglm serve`: the model behind OpenAI's API."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CheckpointError, MissingExtraError, RequestError
from .options import CommonOptions, PlacementOptions, Source
from .progress import ProgressBar
from .serve_options import LimitOptions, ListenOptions
from .serve_replicas import ReplicaOptions, run_replicas
from .source_folder import source_folder
from .streams import Terminal

if TYPE_CHECKING:
    from ..engine.loading import LoadedModel
    from ..server.settings import ServerSettings

SERVING = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def serve(
    source: Source = None,
    *,
    listen: ListenOptions,
    limits: LimitOptions,
    served_model_name: Annotated[
        str, typer.Option("--served-model-name", help="What requests call it", envvar="CHATGLM_SERVED_MODEL_NAME")
    ] = "chatglm",
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="A LoRA or prefix, asked for as MODEL:NAME (repeatable)", metavar="NAME=DIR"),
    ] = None,
    legacy_api: Annotated[
        bool, typer.Option("--legacy-api", help="Also the original's POST /", envvar="CHATGLM_LEGACY_API")
    ] = False,
    web: Annotated[bool, typer.Option("--web", help="Also the chat page", envvar="CHATGLM_WEB")] = False,
    web_path: Annotated[str, typer.Option("--web-path", help="Where the page is", envvar="CHATGLM_WEB_PATH")] = "/chat",
    log_json: Annotated[bool, typer.Option("--log-json", help="Log lines as JSON", envvar="CHATGLM_LOG_JSON")] = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Prompts and answers into the log", envvar="CHATGLM_LOG_PROMPTS")
    ] = False,
    metrics_prefix: Annotated[
        str, typer.Option("--metrics-prefix", help="chatglm, or vllm for dashboards made for it")
    ] = "chatglm",
    enable_faults: Annotated[bool, typer.Option("--enable-faults", hidden=True)] = False,
    replicas: ReplicaOptions,
    placement: PlacementOptions,
    common: CommonOptions,
) -> None:
    """Serve a model over HTTP, many users at once: chat, completions, embeddings, metrics.

    It listens on this machine only; for other hosts set a key. SIGTERM lets running answers finish and exits with 0.

    Try: chatglm serve --port 8000
    """
    need_extra("serve", SERVING, "`chatglm serve`")
    if web:
        need_extra("web", ("gradio",), "`chatglm serve --web`")
    if placement.devices > 1:
        raise typer.BadParameter("serve runs on one device; start one server for each", param_hint="--devices")
    from ..checkpoint.adapter import is_adapter, open_adapter
    from ..server.settings import read_adapters

    try:
        settings = listen.settings(
            limits,
            served_model_name=served_model_name,
            adapters=read_adapters(adapter or []),
            legacy_api=legacy_api,
            web=web,
            web_path=web_path,
            log_json=log_json,
            log_prompts=log_prompts,
            metrics_prefix=metrics_prefix,
            enable_faults=enable_faults,
        )
    except RequestError as error:
        raise typer.BadParameter(str(error)) from error
    if source is not None and is_adapter(source):
        raise CheckpointError(f"{source} is an adapter", cure=f"chatglm serve MODEL --adapter NAME={source}")
    for folder in settings.adapters.values():
        open_adapter(folder)  # what is wrong with it is told before anything heavy is imported or read
    if replicas.replicas is not None:
        need_extra("ray", ("ray",), "`chatglm serve --replicas`")
        status = run_replicas(settings, replicas, source, placement)
        if status:
            raise typer.Exit(status)
        return
    if replicas.min_replicas is not None or replicas.max_replicas is not None:
        raise typer.BadParameter("--min-replicas and --max-replicas go with --replicas auto")
    run(settings, source, placement, common.terminal())


def run(
    settings: ServerSettings,
    source: str | None,
    placement: PlacementOptions,
    terminal: Terminal,
    on_address: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until a signal. `on_address` hears where, once the model is loaded. Raises typer.Exit with the status."""
    if settings.feedback_db is not None:
        from ..server.feedback.schema import open_for_writing

        open_for_writing(settings.feedback_db).close()  # told before anything heavy is imported or read
    if settings.feedback_spool is not None:
        from ..server.feedback.spool import Spool

        Spool(settings.feedback_spool).close()
    from ..server.running import bind, run_server

    with bind(settings.host, settings.port) as listener:
        from ..server.backend import Backend
        from ..server.logs import RequestLog

        loaded = load_weights(source, placement, terminal)
        backend = Backend(loaded, settings)
        host, port = listener.getsockname()[:2]
        on_address(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        status = run_server(backend, listener, RequestLog(as_json=settings.log_json))
    if status:
        raise typer.Exit(status)


def need_extra(extra: str, packages: tuple[str, ...], purpose: str) -> None:
    """Raises MissingExtraError for the first package that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra=extra, purpose=purpose)


def load_weights(source: str | None, placement: PlacementOptions, terminal: Terminal) -> LoadedModel:
    """The model without a cache, which the serving engine makes. Raises a ChatGLMError."""
    folder = source_folder(source, placement.revision)
    from ..checkpoint import check

    check(folder)
    import torch

    from ..engine.loading import load_model
    from ..engine.placement import physical_cores

    cores = physical_cores()
    torch.set_num_threads(placement.threads or (cores - 1 if cores > 2 else cores))  # one for the HTTP loop
    with ProgressBar(terminal) as progress:
        return load_model(folder, placement.dtype, placement.device, progress=progress)
