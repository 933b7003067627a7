"""Training on several processes: the same model, the same trainer, parameters in shards and experts with owners.

A step's sequences are dealt out to all ranks, or a stretch of each to every rank of a group (context.py). A rank
computes its sums over the counts of the whole step (objective.py), so gradients are added, never averaged, and a run
equals that of one process but for the order of sums.

- Parameters are sharded over all ranks (FSDP2), a decoder layer at a time; embedding, final norm and head, which the
  MTP layer uses too, are the root's and stay whole from forward to backward.
- Experts may have owners (``expert`` > 1): a rank holds its share of a layer's experts, and tokens travel to them and
  back. The number of collectives is the same on all ranks whatever tokens choose, none at all included.

Shape legend: T tokens, k experts per token, N rows that travel, D hidden.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nanoglm import ops
from nanoglm.errors import InputError, NanoglmError
from nanoglm.model import GLM
from nanoglm.model.moe import Experts, MoE
from nanoglm.model.mtp import MTPLayer
from nanoglm.train.context import Context
from nanoglm.train.data import Sample

T = TypeVar("T")


class Ranks:
    """The processes of a run. ``torch.distributed`` is initialised already.

    They form two meshes over the same ranks, neighbours innermost: (data, expert) for parameters and (group, context)
    for sequences. Who shares experts and who shares sequences are questions apart: two processes can share both.

    Args:
        expert: ranks that share a layer's experts. context: ranks that share a sequence.
        device: its type.

    Attributes:
        context: this rank's group, None where sequences are whole.
        sent: bytes that this rank gave to others for experts, so that a test can see tokens move.

    Raises:
        InputError: one of them does not divide the number of processes.
    """

    def __init__(self, expert: int = 1, context: int = 1, device: str = "cpu") -> None:
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        for name, n in (("expert", expert), ("context", context)):
            if n < 1 or self.world % n:
                raise InputError(f"{name}_ranks is {n}; expected a divisor of the {self.world} processes")
        self.mesh = init_device_mesh(device, (self.world // expert, expert), mesh_dim_names=("data", "expert"))
        self.all = self.mesh._flatten("all")
        self.groups, self.context = self.world // context, None
        if context > 1:
            sequences = init_device_mesh(device, (self.groups, context), mesh_dim_names=("group", "context"))
            self.context = Context(sequences.get_group("context"))
        self.expert, self.sent = expert, 0

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all: log and files."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        value = value.clone()
        dist.all_reduce(value)
        return value

    def share(self, sample: Sample, pass_tokens: int | None) -> Sample:
        """This rank's sequences of a step, or its rows of its group's: as many neighbours as every other's.

        Raises:
            InputError: they do not divide; or they are of unlike lengths and a step is accumulated, where the number of
                passes, and with it of collectives, would be each rank's own.
        """
        n = len(sample.counts)
        if n % self.groups:
            each = "processes" if self.context is None else "groups of processes"
            raise InputError(f"step has {n} sequences; expected a multiple of the {self.groups} {each}")
        if pass_tokens is not None and len(set(sample.counts)) > 1:
            raise InputError(
                f"pass_tokens is {pass_tokens}; expected none on several processes where sequences have unlike lengths"
            )
        group = self.rank * self.groups // self.world
        own = sample.part(group * n // self.groups, (group + 1) * n // self.groups)
        return own if self.context is None else self.context.part(own)

    def first_does(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on the first rank, where alone it runs, for all; a :class:`NanoglmError` likewise."""
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = action()
            except NanoglmError as error:
                found[1] = error
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        result: T = found[0]
        return result

    def clip(self, parameters: Iterable[Tensor], limit: float) -> None:
        """Scales gradients to a norm of at most ``limit`` over all ranks, as ``clip_grad_norm_`` does on one."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        squares = torch.stack([g.square().sum() for g in local]).sum() if local else torch.zeros(())
        scale = (limit / (self.total(squares).sqrt() + 1e-6)).clamp(max=1.0)
        for g in local:
            g.mul_(scale)


@contextmanager
def launched(expert: int = 1, context: int = 1, device: str = "cpu") -> Iterator[Ranks | None]:
    """The processes that torchrun started, which end with the block; None for a process by itself.

    Raises:
        InputError: ranks are to share something, and there is one process. Under torchrun what all ranks meet within
            the block is told once.
    """
    if not dist.is_torchelastic_launched():
        if expert != 1 or context != 1:
            raise InputError(f"expert_ranks is {expert} and context_ranks {context}; expected 1 without torchrun")
        yield None
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield Ranks(expert, context, device)
    except NanoglmError as error:
        if dist.get_rank() > 0:
            time.sleep(5)  # the first says what all met, and torchrun ends the others with it; what one met, one says
        print(f"nanoglm: {error}", file=sys.stderr)
        leave(2)
    leave()


def leave(code: int = 0) -> NoReturn:
    """Ends this process with an exit code and all output written; if that is 0, once every rank has come here.

    Not through the interpreter's own end. DTensor's caches hold meshes, and meshes their process groups, whatever
    ``destroy_process_group`` and ``gc.collect`` do; so gloo's threads are still there when the interpreter finalises.
    One that lets go of a tensor then asks for the GIL, is ended for it and takes the process down (SIGABRT).
    """
    if code == 0:
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parallelise(model: GLM, ranks: Ranks) -> GLM:
    """Shards a model that is initialised alike on every rank, in place.

    Raises:
        InputError: the ranks that own experts do not divide them.
    """
    config = model.config
    if ranks.expert > 1 and config.n_routed_experts % ranks.expert:
        raise InputError(f"expert_ranks is {ranks.expert}; expected a divisor of the {config.n_routed_experts} experts")
    owned: set[nn.Parameter] = set()
    for layer in model.model.layers:
        moe = layer.get_submodule("mlp")
        if ranks.expert > 1 and isinstance(moe, MoE):
            moe.experts = OwnedExperts(moe.experts, ranks)
            if ranks.mesh["data"].size() > 1:
                # The experts' own dimension is cut already.
                fully_shard(moe.experts, mesh=ranks.mesh["data"], shard_placement_fn=lambda p: Shard(1))
            else:
                owned |= set(moe.experts.parameters())
        fully_shard(layer, mesh=ranks.all, reshard_after_forward=False, ignored_params=owned)
        if isinstance(layer, MTPLayer):
            register_fsdp_forward_method(layer, "draft")
    fully_shard(model, mesh=ranks.all, ignored_params=owned)
    for module in _sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_reshard_after_backward(False)
    return model


def reshard(model: GLM) -> None:
    """Behind the last backward of a step, before the optimisers: lets go of what other ranks keep."""
    for module in _sharded(model):
        module.reshard()


def gathered(model: GLM, ranks: Ranks) -> GLM | None:
    """The model whole, on the CPU of the first rank; None on the others. Called by all."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if ranks.first:
            tensors[name] = value.cpu()
    if not ranks.first:
        return None
    whole = GLM(model.config)
    whole.load_state_dict(tensors)
    return whole


def _sharded(model: GLM) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class OwnedExperts(Experts):
    """A layer's experts, of which this rank holds its share; the parameters are DTensors cut by expert."""

    def __init__(self, whole: Experts, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self.ranks, mesh = ranks, ranks.mesh["expert"]
        for name, parameter in whole.named_parameters():
            cut = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            setattr(self, name, nn.Parameter(cut))

    def forward(self, x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        gate_up, down = _local(self.gate_up_proj), _local(self.down_proj)
        group, mine, k = self.ranks.mesh["expert"].get_group(), gate_up.shape[0], ids_Tk.shape[1]
        order = ids_Tk.flatten().argsort(stable=True)  # by expert, so by owner
        expert_N = ids_Tk.flatten()[order]
        out = torch.bincount(expert_N // mine, minlength=self.ranks.expert)
        come = torch.empty_like(out)
        dist.all_to_all_single(come, out, group=group)
        sends, gets = out.tolist(), come.tolist()
        arrived_ND = _exchange(x_TD[order // k], gets, sends, group)
        ids_N = _exchange(expert_N[:, None], gets, sends, group) - self.ranks.mesh["expert"].get_local_rank() * mine
        y_ND = ops.experts(arrived_ND, ids_N, torch.ones_like(ids_N, dtype=weights_Tk.dtype), gate_up, down)
        self.ranks.sent += (sum(sends) - sends[self.ranks.mesh["expert"].get_local_rank()]) * x_TD[:1].nbytes
        back_ND = _exchange(y_ND, sends, gets, group)
        y_TkD = back_ND.new_zeros(back_ND.shape).index_copy(0, order, back_ND).unflatten(0, (-1, k))
        return (ops.wide(y_TkD) * weights_Tk[..., None]).sum(1).to(x_TD.dtype)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _exchange(rows: Tensor, gets: Sequence[int], sends: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Rows to other ranks, and theirs to this one; gradients travel back."""
    if rows.is_floating_point():
        return all_to_all_single_autograd(rows.contiguous(), list(gets), list(sends), group)
    out = rows.new_empty(sum(gets), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(gets), list(sends), group=group)
    return out


def check_pipeline(pattern: str, layers: Sequence[int]) -> None:
    """The rule that a pipeline stage begins with a Full layer: Selections do not travel between stages.

    Args:
        pattern: the schedule in letters, such as FFSSS. layers: of each stage.

    Raises:
        InputError: the stages are not all layers together, or one begins with a Shared layer.
    """
    if sum(layers) != len(pattern) or min(layers, default=0) < 1:
        raise InputError(f"stages have {', '.join(map(str, layers))} layers; expected {len(pattern)} together")
    first = 0
    for stage, n in enumerate(layers):
        if pattern[first] != "F":
            raise InputError(f"stage {stage} begins with layer {first}, which is Shared; expected a Full one")
        first += n
