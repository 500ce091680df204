"""Converts a checkpoint to another number format, tensor by tensor. weights.py reads the result."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.int4 import GROUP_SIZE, pack_int4
from model.int8 import swap_linears
from model.jamba import Jamba
from model.rotation import RotatedReader
from model.weights import INDEX_NAME, SINGLE_NAME, CheckpointReader, Slot, StoredTensor, find_slots

Format = Literal["int8", "int4", "bf16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_THREADS = 4
_WORK_FILE = "conversion.json"  # describes an unfinished conversion
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class ConversionRunning(RuntimeError):
    """Another process is converting to the same directory."""


def convert_checkpoint(
    src: Path | str,
    dst: Path | str,
    to: Format = "int8",
    progress: Callable[[int, int], None] | None = None,
    max_shard_bytes: int | None = None,
    rotate: bool = False,
) -> None:
    """Write the checkpoint `src` to the new directory `dst`, and copy the tokenizer and other files.

    to: bf16 and fp32 can also be loaded by `transformers` (A_log and D stay float32); int8 quantizes every matrix that
    int8.py computes in int8; int4 stores MLPs, experts and Mamba's in_proj in int4, the rest of those matrices and the
    embedding in int8. Other tensors keep their dtype.
    max_shard_bytes: None chooses 16 MiB to 1 GiB by the size of `src`; only a single larger tensor exceeds it. Memory
    use is about one shard and a few tensors.
    rotate: rotate the residual stream, so that activations can be quantized with little error, see rotation.py.
    progress: called with (tensors done, including those of an interrupted run; total tensors).

    Works in the directory `.<name of dst>.partial` beside `dst` and renames it to `dst` at the end. After an
    interruption, the same conversion resumes after the last complete shard; a different one, or one whose source files
    have changed, starts over.

    Raises UnsupportedWeights for a bad `src`, ValueError for an unknown format, FileExistsError if `dst` exists,
    ConversionRunning.
    """
    src, dst = Path(src), Path(dst)
    if to not in ("int8", "int4", *_DTYPES):
        raise ValueError(f"to is {to!r}, must be int8, int4, bf16 or fp32")
    if dst.exists():
        raise FileExistsError(f"{dst} is already there; remove it or choose another directory")
    reader = RotatedReader(src) if rotate else CheckpointReader(src)
    slots = _int8_slots(reader)
    max_shard_bytes = max_shard_bytes or _choose_shard_bytes(src)
    work = dst.parent / f".{dst.name}.partial"
    with _locked(work) as lock:
        finished = _resume(work, _describe_work(src, to, max_shard_bytes, rotate))
        writer = _ShardWriter(work, max_shard_bytes, len(finished))
        written = set(itertools.chain.from_iterable(finished))
        left = [name for name in reader.names if name not in written and f"{name}.qweight" not in written]
        for done, tensors in enumerate(_encode_all(reader, left, slots, to), start=len(slots) - len(left) + 1):
            writer.add(tensors)
            if progress:
                progress(done, len(slots))
        writer.finish()
        _copy_other_files(src, work)
        (work / "config.json").write_text(json.dumps(_config_for(reader.raw_config, to), indent=2) + "\n")
        (work / _WORK_FILE).unlink()
        lock.unlink()
        work.rename(dst)


def _int8_slots(reader: CheckpointReader) -> dict[str, Slot]:
    """The tensors the checkpoint must hold, with a scale where int8.py quantizes. Raises UnsupportedWeights."""
    with torch.device("meta"):
        model = Jamba(reader.config)
    swap_linears(model)
    slots = find_slots(model)
    reader.check({name: tuple(slot.values.shape) for name, slot in slots.items()})
    return slots


def _choose_shard_bytes(src: Path) -> int:
    total = sum(path.stat().st_size for path in src.glob("*.safetensors"))
    return min(max(total // 64, 16 << 20), 1 << 30)


@contextmanager
def _locked(work: Path) -> Iterator[Path]:
    """Create the directory and lock it against other processes; yields the lock file."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionRunning(f"another process is writing {work}; wait for it or stop it") from None
        yield path


def _describe_work(src: Path, to: Format, max_shard_bytes: int, rotate: bool) -> dict[str, Any]:
    """Everything that must be equal for a run to continue the shards of another."""
    stats = {path.name: path.stat() for path in [*src.glob("*.safetensors"), *src.glob("*.json")]}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())}
    return {"version": 2, "to": to, "rotate": rotate, "max_shard_bytes": max_shard_bytes, "files": files}


def _resume(work: Path, description: dict[str, Any]) -> list[list[str]]:
    """Tensor names in each complete shard of an interrupted run of the same work; all other files are removed."""
    marker = work / _WORK_FILE
    try:
        same = json.loads(marker.read_text()) == description
    except (OSError, ValueError):
        same = False
    finished: list[list[str]] = []
    while same and (path := _part(work, len(finished))).exists():
        finished.append(_names_in(path))
    keep = {"lock", *(_part(work, i).name for i in range(len(finished)))}
    for path in work.iterdir():
        if path.name not in keep:
            path.unlink()
    marker.write_text(json.dumps(description))
    return finished


def _encode_all(
    reader: CheckpointReader, names: Sequence[str], slots: Mapping[str, Slot], to: Format
) -> Iterator[dict[str, Tensor]]:
    """`_encode` of each tensor, in order, computed a few tensors ahead."""
    pending: deque[Future[dict[str, Tensor]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for name in names:
            pending.append(pool.submit(lambda name=name: _encode(name, reader[name], slots[name], to)))
            if len(pending) > _THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _encode(name: str, stored: StoredTensor, slot: Slot, to: Format) -> dict[str, Tensor]:
    """The tensors that represent `stored` in format `to`."""
    if to in _DTYPES:
        keep = name.endswith((".A_log", ".D"))
        return {name: stored.dense().to(torch.float32 if keep else _DTYPES[to])}
    embedding = to == "int4" and name in ("model.embed_tokens.weight", "lm_head.weight")
    if slot.scale is None and not embedding:
        return {name: stored.dense()}
    if to == "int4" and _takes_int4(name) and slot.values.shape[-1] % GROUP_SIZE == 0:
        packed, scales = pack_int4(stored.dense())
        return {f"{name}.qweight": packed, f"{name}.scales": scales}
    values, scale = stored.int8()
    return {name: values, f"{name}.scale": scale}


def _takes_int4(name: str) -> bool:
    return ".feed_forward." in name or name.endswith(".mamba.in_proj.weight")


def _config_for(raw: dict[str, Any], to: Format) -> dict[str, Any]:
    config = {name: value for name, value in raw.items() if name != "quantization_config"}
    if to in _DTYPES:
        return config | {"dtype": str(_DTYPES[to]).removeprefix("torch.")}
    group = {"group_size": GROUP_SIZE} if to == "int4" else {}
    return config | {"quantization_config": {"quant_method": f"jamba_rag_{to}"} | group}


def _copy_other_files(src: Path, work: Path) -> None:
    for path in src.iterdir():
        if path.is_file() and path.suffix not in _WEIGHT_SUFFIXES and path.name not in ("config.json", INDEX_NAME):
            shutil.copyfile(path, work / path.name)


class _ShardWriter:
    """Collects tensors into files of at most `max_bytes`, and writes their index. `finished` files exist already."""

    def __init__(self, directory: Path, max_bytes: int, finished: int) -> None:
        self._directory, self._max_bytes, self._finished = directory, max_bytes, finished
        self._pending: dict[str, Tensor] = {}

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Tensors of one call go into the same shard."""
        nbytes = sum(tensor.nbytes for tensor in (*self._pending.values(), *tensors.values()))
        if self._pending and nbytes > self._max_bytes:
            self._flush()
        self._pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}

    def finish(self) -> None:
        """Write pending tensors, give the files their final names, write the index."""
        if self._pending:
            self._flush()
        parts = [_part(self._directory, i) for i in range(self._finished)]
        if len(parts) == 1:
            parts[0].rename(self._directory / SINGLE_NAME)
            return
        weight_map, total_bytes = {}, 0
        for i, part in enumerate(parts, start=1):
            file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
            weight_map |= dict.fromkeys(_names_in(part), file)
            total_bytes += _payload_bytes(part)
            part.rename(self._directory / file)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        """Write a shard; it gets its name only when it is complete and synced to disk."""
        path = _part(self._directory, self._finished)
        unfinished = path.with_suffix(".unfinished")
        save_file(self._pending, unfinished, metadata={"format": "pt"})
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.rename(path)
        self._pending, self._finished = {}, self._finished + 1


def _part(directory: Path, i: int) -> Path:
    return directory / f"part-{i}.safetensors"


def _names_in(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _payload_bytes(path: Path) -> int:
    """Bytes of tensor data in a safetensors file: without the header and the 8 bytes of its length."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
