"""Shared by all training stages: data-parallel processes, optimizer with float32 masters, checkpoints, log.

Weights of matrix products are bfloat16 copies of float32 masters. With `fake_quant` they are copies of the masters
quantized to the shipped format, so that gradients are taken at the quantized weights (straight-through estimator).
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.train.muon import Muon

FakeQuantize = Callable[[Sequence[str], Sequence[Tensor]], list[Tensor]]
MOMENTS = "optimizer/"  # prefix in files of `save_resumable`, as in optimizer/exp_avg/layers.0…
KEEP_FLOAT32 = ("A_log", ".D", "dt_proj.bias")


class Cluster:
    """The process group of data-parallel training; a single process unless started by torchrun."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            on_gpu = self.device.type == "cuda"
            dist.init_process_group("nccl" if on_gpu else "gloo", device_id=self.device if on_gpu else None)

    def mean_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Average the gradients over the processes, with one all-reduce per dtype."""
        if self.size == 1:
            return
        for dtype in (torch.bfloat16, torch.float32):  # same order in all processes, or they would deadlock
            grads = [p.grad for p in parameters if p.dtype == dtype]
            if not grads:
                continue
            flat = torch._utils._flatten_dense_tensors(grads)
            self._average(flat)
            torch._foreach_copy_(grads, list(torch._utils._unflatten_dense_tensors(flat, grads)))

    def mean(self, value: Tensor) -> Tensor:
        if self.size > 1:
            self._average(value)
        return value

    def of_first(self, value: float) -> float:
        """The value of the first process, in all processes."""
        told = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.broadcast(told, 0)
        return told.item()

    def _average(self, value: Tensor) -> None:
        dist.all_reduce(value)  # gloo, for CPUs, has no mean
        value /= self.size

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


class Clock:
    """Seconds since the first tick, equal in all processes. Updated only every few ticks, because averaging the clocks
    synchronizes the processes, and the host with its device."""

    def __init__(self, cluster: Cluster, every: int = 10) -> None:
        self.cluster, self.every, self.ticks, self.start, self.seconds = cluster, every, 0, 0.0, 0.0

    def tick(self) -> float:
        """Call once per step; returns `seconds`."""
        if self.ticks == 0:
            self.start = time.monotonic()
        elif self.ticks % self.every == 0:
            passed = torch.tensor(time.monotonic() - self.start, dtype=torch.float64, device=self.cluster.device)
            self.seconds = self.cluster.mean(passed).item()
        self.ticks += 1
        return self.seconds


class MasterOptimizer:
    """AdamW on float32 masters of a model's parameters; the parameters are updated from them, in their own dtype.

    With `muon`, Muon updates the matrices between hidden states and AdamW the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        rate_of: Callable[[str], float],
        weight_decay: float = 0.05,
        dtype: torch.dtype = torch.bfloat16,
        muon: bool = False,
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        for name, p in named:
            p.data = p.data.to(torch.float32 if name.endswith(KEEP_FLOAT32) else dtype)
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        groups: tuple[list[dict], list[dict]] = ([], [])
        for name, p, master in zip(self.names, self.parameters, self.masters, strict=True):
            parts = matrices_in(name) if muon else 0
            group = {
                "params": [master],
                "lr": 0.0,
                "factor": rate_of(name),
                "weight_decay": weight_decay * (p.ndim > 1),
            }
            groups[parts > 0].append(group | ({"parts": parts} if parts else {}))
        self.owners = {name: int(muon and matrices_in(name) > 0) for name in self.names}
        self.optimizers = [torch.optim.AdamW(_merge(groups[0]), betas=(0.9, 0.95), eps=1e-8, fused=True)]
        if groups[1]:
            self.optimizers.append(Muon(_merge(groups[1])))

    def step(self, rate: float, clip: float = 1.0, fake_quant: FakeQuantize | None = None) -> Tensor:
        """Apply the gradients with learning rate `rate`, clear them, and return their norm before clipping."""
        grads = [master.grad for master in self.masters]
        given = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        torch._foreach_copy_(grads, given)
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_mul_(grads, (clip / (norm + 1e-6)).clamp(max=1.0))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            optimizer.step()
        self.publish(fake_quant)
        return norm

    @torch.no_grad()
    def publish(self, fake_quant: FakeQuantize | None = None) -> None:
        """Copy the masters into the parameters, through `fake_quant` if given."""
        source = self.masters if fake_quant is None else fake_quant(self.names, self.masters)
        torch._foreach_copy_([p.data for p in self.parameters], source)
        for p in self.parameters:
            p.grad = None

    def save(self, path: Path) -> None:
        """Write the masters in the dtype of the parameters, atomically; enough to start another stage from."""
        tensors = {
            name: master.to(p.dtype).contiguous()
            for name, p, master in zip(self.names, self.parameters, self.masters, strict=True)
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def load(self, path: Path) -> None:
        for name, tensor in load_file(path).items():
            self.masters[self.names.index(name)].copy_(tensor)
        self.publish()

    def save_resumable(self, path: Path, step: int) -> None:
        """Write float32 masters and optimizer moments, to resume training exactly."""
        tensors = dict(zip(self.names, self.masters, strict=True))
        for name, master in list(tensors.items()):
            kept = self._optimizer_of(name).state[master]
            tensors |= {f"{MOMENTS}{key}/{name}": value for key, value in kept.items() if key != "step"}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path.with_suffix(".part"), metadata={"step": str(step)})
        path.with_suffix(".part").rename(path)

    def load_resumable(self, path: Path) -> int:
        """Load the output of `save_resumable`; returns its step."""
        masters = dict(zip(self.names, self.masters, strict=True))
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
            for entry in file.keys():  # noqa: SIM118 - a file, not a mapping
                name = entry.removeprefix(MOMENTS).partition("/")[2] if entry.startswith(MOMENTS) else entry
                master, tensor = masters[name], file.get_tensor(entry).to(masters[name])
                if entry == name:
                    master.copy_(tensor)
                    continue
                state = self._optimizer_of(name).state[master]
                state[entry.removeprefix(MOMENTS).partition("/")[0]] = tensor
                if isinstance(self._optimizer_of(name), torch.optim.AdamW):
                    state["step"] = torch.tensor(float(step), device=master.device)
        self.publish()
        return step

    def _optimizer_of(self, name: str) -> torch.optim.Optimizer:
        return self.optimizers[self.owners[name]]


def matrices_in(name: str) -> int:
    """How many matrices between hidden states are stacked in a parameter; 0 for other parameters."""
    stem = name.removesuffix(".weight")
    if stem.endswith(("in_proj", "gate_up_proj")):
        return 2
    return int(stem.endswith(("out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")))


def _merge(groups: list[dict]) -> list[dict]:
    merged: dict[tuple, dict] = {}
    for group in groups:
        key = group["factor"], group["weight_decay"], group.get("parts")
        same = merged.setdefault(key, {**group, "params": []})
        same["params"] += group["params"]
    return list(merged.values())


def cosine(peak: float, step: int, share: float, warmup: int) -> float:
    """Learning rate: linear warm-up over `warmup` steps, cosine decay over the whole schedule to 3% of the peak."""
    return peak * min(1.0, (step + 1) / warmup) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def load_into(model: nn.Module, path: Path) -> None:
    """Load the output of `MasterOptimizer.save` or `save_resumable` into a model; other parameters stay unchanged."""
    parameters = dict(model.named_parameters())
    for name, tensor in load_file(path).items():
        if not name.startswith(MOMENTS):
            parameters[name].data.copy_(tensor)


class Log:
    """Prints each record and appends it as JSON to a file, in the first process only."""

    def __init__(self, path: Path, cluster: Cluster) -> None:
        self.path, self.silent, self.start = path, cluster.rank != 0, time.monotonic()
        if not self.silent:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **fields: float | int | str) -> None:
        if self.silent:
            return
        fields = {"seconds": round(time.monotonic() - self.start, 1)} | fields
        with self.path.open("a") as file:
            file.write(json.dumps(fields) + "\n")
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items()), flush=True)


def worker_random(seed: int, rank: int, worker: int) -> random.Random:
    """The random generator of one data worker, for reproducible runs."""
    return random.Random(seed * 1_000_003 + rank * 1009 + worker)
