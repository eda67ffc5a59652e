# SPDX-License-Identifier: Apache-2.0
"""The processes of a training: who they are, what they agree on, and how the model is spread over them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastloop.ops.plan import local_shard

STRATEGIES = (None, "ddp", "fsdp2")


class Ranks:
    """The processes that train together; a world of one without torch.distributed."""

    def __init__(self, device: torch.device, group: Any = None) -> None:
        self.device = device
        self.group = group
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if together else 0
        self.size = dist.get_world_size(group) if together else 1

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks, in place; on a GPU without waiting."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def largest(self, number: float) -> float:
        """The largest of the ranks' numbers. Waits: for use once in an epoch, not in a step."""
        if self.size == 1:
            return number
        value = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return value.item()

    def from_first(self, value: Any) -> Any:
        """Rank 0's value (numbers, strings, None), on every rank. Waits."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group, device=self.device)
        return box[0]

    def names_of_first(self, names: list[str]) -> list[str]:
        """The names of the rank that has most of them: one without any data knows none."""
        if self.size == 1:
            return names
        known: list[Any] = [None] * self.size
        dist.all_gather_object(known, names, group=self.group)
        return max(known, key=len)  # type: ignore[no-any-return]

    def same_buffers(self, model: nn.Module) -> None:
        """Rank 0's buffers, such as BatchNorm's averages, on every rank: those are what a checkpoint holds. Waits."""
        if self.size > 1:
            for buffer in model.buffers():
                local = local_shard(buffer)
                plain = local.view(torch.uint8) if local.dtype == torch.bool else local
                dist.broadcast(plain, group_src=0, group=self.group)

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.size > 1:
            self.largest(0.0)


def start(strategy: str | None, device: torch.device | None, model: nn.Module) -> tuple[torch.device, Ranks]:
    """The device of this process and its ranks; starts torch.distributed from torchrun's variables if it has to.

    Raises:
        ValueError: an unknown strategy.
        RuntimeError: several processes and no strategy, or DataParallel.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"[Loop] strategy must be one of {STRATEGIES}, got {strategy!r}")
    if isinstance(model, nn.DataParallel):
        raise RuntimeError(
            "[Loop] DataParallel splits each batch over threads of one process, which Python's lock and the copy of "
            'the weights at every step make slower than one process per GPU; pass model.module and strategy="ddp", and '
            "start the script with torchrun --nproc-per-node=N"
        )
    started = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
    chosen = torch.device(device) if device is not None else _own_device(model)
    if chosen.type not in ("cpu", "cuda"):
        raise RuntimeError(f"[Loop] trains on a CPU or on CUDA, got a model on {chosen}; move it, or pass device=")
    if chosen.type == "cuda":
        if chosen.index is None:
            chosen = torch.device("cuda", _local_gpu())
        torch.cuda.set_device(chosen)  # what NCCL and kernels without a device take
    if strategy is not None and dist.is_available() and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        if world > 1 or "MASTER_ADDR" in os.environ:
            _join(backend)
        elif strategy == "fsdp2":
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if strategy is None and world > 1 and not isinstance(model, DistributedDataParallel):
        raise RuntimeError(
            f"[Loop] {world} processes would each train a model of their own into the same run_dir; pass "
            'strategy="ddp" or strategy="fsdp2"'
        )
    return chosen, Ranks(chosen)


def _join(backend: str) -> None:
    """Start torch.distributed; of torchrun's restarts on one machine each meets under a name of its own.

    torchrun keeps its store over a restart (torch 2.13), and with it the addresses of the dead processes: whoever is
    quicker than its peers connects to these, and fails. Several machines count their restarts each for itself; there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun begin with a new store.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend)
        return
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore(f"restart-{restarts}", store), rank=rank, world_size=size)


def _own_device(model: nn.Module) -> torch.device:
    """The GPU of this process if there is one and the model is not on another device already, else the CPU."""
    here = next((p.device for p in model.parameters()), torch.device("cpu"))
    if here.type != "cpu":
        return here
    if torch.cuda.is_available():
        return torch.device("cuda", _local_gpu())
    return here


def _local_gpu() -> int:
    """torchrun's LOCAL_RANK, or the current device; the only one where each process is given one."""
    return int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())) % max(1, torch.cuda.device_count())


def spread(strategy: str | None, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> nn.Module:
    """The module to call: the model itself, DDP around it, or the model with its parameters sharded in place.

    Raises:
        RuntimeError: FSDP2 with an optimizer that has state already, or with parameters that the model does not have.
    """
    if isinstance(model, DistributedDataParallel):
        return model
    if strategy == "ddp" and ranks.size > 1:
        _check_owned(strategy, model, optimizer)
        model.register_forward_pre_hook(_RefuseCallsPastDDP())
        return _in_ddp(model, ranks)
    if strategy == "fsdp2" and not _is_sharded(model):
        _shard(model, optimizer, ranks)
    return model


def _in_ddp(model: nn.Module, ranks: Ranks) -> DistributedDataParallel:
    on_gpu = ranks.device.type == "cuda"
    made = DistributedDataParallel(model, device_ids=[ranks.device] if on_gpu else None, gradient_as_bucket_view=True)
    made.training = model.training
    return made


class _RefuseCallsPastDDP:
    """A forward pre-hook of this model; a copy of it, and one that was saved whole, may be called by whoever has it."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        active = DistributedDataParallel._active_ddp_module
        if module.training and torch.is_grad_enabled() and (active is None or active.module is not module):
            raise RuntimeError(
                "[Loop] the model was called past loop.model: its gradients would not be averaged over the ranks, "
                "whose weights would drift apart; call loop.model(...)"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _RefuseNothing, ()


class _RefuseNothing:
    def __call__(self, module: nn.Module, args: Any) -> None:
        pass


def _refuse_former(module: nn.Module, args: Any) -> None:
    raise RuntimeError(
        "[Loop] this is what loop.model was before parameters were frozen or unfrozen; call loop.model(...), and keep "
        "no reference to it"
    )


def trained(model: nn.Module) -> list[bool]:
    """Of each parameter, whether it is trained now."""
    return [p.requires_grad for p in model.parameters()]


def spread_anew(called: nn.Module, ranks: Ranks) -> nn.Module:
    """The module to call from now on, after parameters were frozen or unfrozen: DDP's buckets are for what is trained.

    FSDP2 looks at each parameter again in every forward.

    Raises:
        RuntimeError: a DDP that the loop did not make, whose settings it does not know; nothing left to train.
    """
    if not isinstance(called, DistributedDataParallel):
        return called
    model = called.module
    if not any(isinstance(hook, _RefuseCallsPastDDP) for hook in model._forward_pre_hooks.values()):
        raise RuntimeError(
            "[Loop] a DistributedDataParallel is built for the parameters that are trained when it is made, and this "
            'one was made by the caller; give Loop the model itself and strategy="ddp"'
        )
    if not any(trained(model)):
        raise RuntimeError("[Loop] no parameter is left to train; leave some unfrozen")
    hooks = called._comm_hooks
    for p in model.parameters():
        p.grad = None  # a view of the old buckets
    del called.reducer, called.logger  # its hooks at the parameters go with the last reference
    called.register_forward_pre_hook(_refuse_former)
    made = _in_ddp(model, ranks)
    for hook, state in hooks:
        made.register_comm_hook(state, hook)
    return made


def _is_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _check_owned(strategy: str | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Names of the model's parameters by id; raises if the optimizer has others, which no rank would hear of."""
    names = {id(p): name for name, p in model.named_parameters()}
    missing = [p for g in optimizer.param_groups for p in g["params"] if id(p) not in names]
    if missing:
        raise RuntimeError(
            f"[Loop] {strategy} spreads the model, and the optimizer has {len(missing)} parameters that are not the "
            f"model's, the first of shape {tuple(missing[0].shape)}: ranks would train them apart; give it "
            "model.parameters(), and make a criterion with parameters a part of the model"
        )
    return names


def _shard(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """FSDP2: each repeated block is a unit, and what is left another; then the optimizer gets the new parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if any(optimizer.state.values()):
        raise RuntimeError(
            "[Loop] fsdp2 replaces the parameters, and the optimizer has state for the old ones; make the Loop before "
            "the first step, and let it load the checkpoint"
        )
    names = _check_owned("fsdp2", model, optimizer)
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[names[id(p)]] for p in group["params"]]
    forget = getattr(optimizer, "_forget_plan", None)
    if forget is not None:
        forget()


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of the longest ModuleList or Sequential whose members have parameters: a transformer's blocks."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    blocks: Sequence[nn.Module] = max(
        ([b for b in m if any(True for _ in b.parameters())] for m in lists), key=len, default=[]
    )
    return list(blocks) if len(blocks) > 1 else []


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradient_sync(model: nn.Module, ranks: Ranks) -> Callable[[bool], None] | None:
    """A switch: whether the next forward and backward sum the gradients over the ranks; None if nothing does."""
    if ranks.size == 1:
        return None
    if isinstance(model, DistributedDataParallel):

        def switch_ddp(on: bool) -> None:
            model.require_backward_grad_sync = on

        return switch_ddp
    if "torch.distributed.fsdp" in sys.modules and _is_sharded(model):
        return cast("Callable[[bool], None]", model.set_requires_gradient_sync)
    return None
