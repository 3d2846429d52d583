"""`chatglm serve --replicas`: the server several times, under Ray Serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RequestError
from .options import PlacementOptions
from .serve_options import _option
from .source_folder import source_folder

if TYPE_CHECKING:
    from ..server.settings import ServerSettings


@dataclass(frozen=True)
class ReplicaOptions:
    """How many servers, behind one address."""

    replicas: Annotated[
        str | None, _option("--replicas", "Servers behind one address, by Ray Serve: a number, or auto", metavar="N")
    ] = None
    min_replicas: Annotated[int | None, _option("--min-replicas", "With auto: at least [1]", metavar="N")] = None
    max_replicas: Annotated[int | None, _option("--max-replicas", "With auto: at most [4]", metavar="N")] = None


def run_replicas(
    settings: ServerSettings, options: ReplicaOptions, source: str | None, placement: PlacementOptions
) -> int:
    """Serve until a signal; the exit status. Raises BadParameter for bounds that do not hold, ChatGLMError."""
    from ..server import replicas

    try:
        assert options.replicas is not None
        count = replicas.ReplicaCount.parse(options.replicas, options.min_replicas, options.max_replicas)
        replicas.check_settings(settings)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from error
    if settings.feedback_db is not None:
        from ..server.feedback.schema import open_for_writing

        open_for_writing(settings.feedback_db).close()  # told before anything heavy is imported or read
    folder = source_folder(source, placement.revision)
    from ..checkpoint import check
    from ..engine.placement import choose_device, physical_cores
    from ..server.logs import RequestLog

    check(folder)
    device = choose_device(placement.device).type
    threads = placement.threads or max(1, physical_cores() // count.most)
    gpus = 1 if device == "cuda" else 0
    model = replicas.ReplicaModel(folder, placement.dtype, device, threads, gpus)
    return replicas.run_replicas(model, settings, count, RequestLog(as_json=settings.log_json))
