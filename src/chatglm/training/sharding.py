"""One run over several processes: who holds which part of the model, and who reads which rows.

`torchrun` starts the processes. Data parallel: each process reads other rows; `ddp` keeps the whole model in each,
`fsdp` a part of every block (PyTorch's fully_shard). Tensor parallel: `tensor` neighbouring processes share the two
matrices of each attention and feed-forward by heads and inner units, and the embedding by rows (DTensor); they read
the same rows. Source: Megatron-LM (Shoeybi et al. 2019) §3; PyTorch's FSDP2.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from ..engine.placement import choose_device
from ..errors import TrainingError
from ..model import GLM
from ..model.block import Block
from ..parallel import check_divisible
from .run_config import ComputeSettings, ParallelSettings
from .task import Loss


@dataclass(frozen=True)
class World:
    """One process among all of a run.

    data_rank, data_size      which share of the rows it reads
    tensor_size               processes that share each matrix
    strategy                  ddp, fsdp, or auto (see over_processes)
    mesh                      DeviceMesh of names ("data", "tensor"), or None alone
    files                     group of processes for checkpoints in the background (Gloo), or None alone
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    data_rank: int = 0
    data_size: int = 1
    tensor_size: int = 1
    strategy: str = "alone"
    mesh: Any = None
    files: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Elementwise sum over the processes that read different rows; in place."""
        if self.data_size > 1:
            torch.distributed.all_reduce(values, group=self.mesh.get_group("data"))
        return values

    def any(self, value: bool) -> bool:
        """Whether it is true in any process."""
        if self.size == 1:
            return value
        flag = torch.tensor([float(value)], device=self.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item() > 0)

    def broadcast(self, value: Any) -> Any:
        """Process 0's value, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


@contextmanager
def joined(parallel: ParallelSettings, compute: ComputeSettings) -> Iterator[World]:
    """The processes that `torchrun` started, joined; a single process without it. Leaves the group at the end.

    Raises TrainingError when `parallel` does not fit the number of processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(compute.device, local_rank)
    if compute.threads:
        torch.set_num_threads(compute.threads)
    if size % parallel.tensor:
        raise TrainingError(
            f"{size} processes cannot be divided into groups of `parallel.tensor` {parallel.tensor}",
            cure=f"torchrun --nproc-per-node {parallel.tensor} …, or parallel.tensor: 1",
        )
    if size == 1:
        yield World(device)
        return
    is_ours = not torch.distributed.is_initialized()
    if is_ours:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=parallel.timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    try:
        yield _world(parallel, device)
    finally:
        if is_ours:
            torch.distributed.destroy_process_group()


def _world(parallel: ParallelSettings, device: torch.device) -> World:
    from torch.distributed.device_mesh import init_device_mesh

    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    data_size = size // parallel.tensor
    mesh = init_device_mesh(device.type, (data_size, parallel.tensor), mesh_dim_names=("data", "tensor"))
    strategy = parallel.strategy
    if strategy == "ddp" and parallel.tensor > 1 and data_size > 1:
        raise TrainingError("`parallel.strategy` ddp has no tensor parallel form", cure="parallel.strategy: fsdp")
    files = torch.distributed.new_group(backend="gloo")
    data_rank = rank // parallel.tensor
    return World(device, rank, size, data_rank, data_size, parallel.tensor, strategy, mesh, files)


def _device(name: str, local_rank: int) -> torch.device:
    chosen = torch.device(choose_device(name))
    return torch.device("cuda", local_rank) if chosen.type == "cuda" and chosen.index is None else chosen


class Forward(nn.Module):
    """The loss as a module's forward, so that DDP and FSDP see one pass from the ids to the sum."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Any:
        return self.loss(self.model, batch)


def glms(model: nn.Module) -> list[GLM]:
    """Every GLM inside a model."""
    return [module for module in model.modules() if isinstance(module, GLM)]


def share_matrices(model: nn.Module, world: World) -> None:
    """Tensor parallel, in place: each process keeps its heads, inner units and rows of the embedding."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if world.tensor_size == 1:
        return
    mesh = world.mesh["tensor"]
    for glm in glms(model):
        _check_tensor_parallel(glm, world.tensor_size)
        for layer in glm.transformer.layers:
            assert isinstance(layer, Block)
            layer.attention.num_heads //= world.tensor_size
            plan: dict[str, Any] = {
                "attention.query_key_value": ColwiseParallel(),
                "attention.dense": RowwiseParallel(),
                "mlp.dense_h_to_4h": ColwiseParallel(),
                "mlp.dense_4h_to_h": RowwiseParallel(),
            }
            parallelize_module(layer, mesh, plan)
        table = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        parallelize_module(glm.transformer, mesh, {"word_embeddings": table})
        parallelize_module(glm, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
        glm.tie_head()


def _check_tensor_parallel(glm: GLM, size: int) -> None:
    config = glm.config
    check_divisible(config, size)
    if config.qkv_layout != "per_head" or config.mlp == "geglu" or config.pre_seq_len is not None:
        raise TrainingError(
            "tensor parallel training knows ChatGLM's layout alone: qkv_layout per_head, mlp gelu_tanh, no prefix",
            cure="parallel.tensor: 1 with parallel.strategy: fsdp",
        )


def over_processes(module: Forward, world: World, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Data parallel: the module to call instead; its backward also sums gradients over processes (`divided_by`).

    dtype  of activations: FSDP gathers the layers' weights in it
    With `auto`, a model of which a part is frozen is kept whole (DDP): FSDP wants one dtype in each layer, and an
    adapter's gradients are small.
    """
    if world.data_size == 1:
        return module
    is_frozen = any(not parameter.requires_grad for parameter in module.parameters())
    if world.strategy == "ddp" or (world.strategy == "auto" and is_frozen):
        from torch.nn.parallel import DistributedDataParallel

        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
        options: dict[str, Any] = {sync: False}
        return DistributedDataParallel(module, process_group=world.mesh.get_group("data"), **options)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = world.mesh["data"]
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:  # inputs are not cast: rotary tables stay fp32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for glm in glms(module):
        for layer in glm.transformer.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh)
    return module


def divided_by(world: World) -> int:
    """What DDP and FSDP divide the sum of gradients by."""
    return world.data_size


def without_sum(module: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
    """DDP sums once a step; FSDP with every micro-batch, since whole gradients would need the whole memory."""
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(module, DistributedDataParallel) and not is_last:
        return module.no_sync()
    return nullcontext()


@contextmanager
def outside_forward(module: nn.Module) -> Iterator[None]:
    """While it lasts, parts of the model can be run by themselves: FSDP gathers what belongs to no layer only in the
    forward of the whole. Every process must run the same parts.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; a collective where it is sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
