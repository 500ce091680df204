"""Rewrites a checkpoint in another number format, a tensor at a time; what it writes, weights.py reads."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.int4 import GROUP_SIZE, pack_int4
from model.int8 import swap_linears
from model.jamba import Jamba
from model.weights import INDEX_NAME, SINGLE_NAME, CheckpointReader, Slot, StoredTensor, find_slots

Format = Literal["int8", "int4", "bf16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def convert_checkpoint(
    src: Path | str,
    dst: Path | str,
    to: Format = "int8",
    progress: Callable[[int, int], None] | None = None,
    max_shard_bytes: int = 16 << 20,
) -> None:
    """Write the checkpoint `src` to the new directory `dst`; the tokenizer and other files go along.

    bf16, fp32: what `transformers` loads too (A_log and D stay float32). int8: every matrix that int8.py computes in
    int8. int4: MLPs, experts and in_proj of the Mamba in int4, the other of these matrices and the embedding in int8.
    What is left alone keeps its dtype. A shard grows past `max_shard_bytes` only for a single larger tensor.
    progress: called with (tensors done, tensors in all). An interrupted conversion leaves no `dst`.
    Raises UnsupportedWeights for a bad `src`, ValueError for an unknown format, FileExistsError if `dst` is there.
    """
    src, dst = Path(src), Path(dst)
    if to not in ("int8", "int4", *_DTYPES):
        raise ValueError(f"to is {to!r}, must be int8, int4, bf16 or fp32")
    if dst.exists():
        raise FileExistsError(f"{dst} is already there; remove it or choose another directory")
    reader = CheckpointReader(src)
    with torch.device("meta"):
        model = Jamba(reader.config)
    swap_linears(model)
    slots = find_slots(model)
    reader.check({name: tuple(slot.values.shape) for name, slot in slots.items()})
    dst.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=dst.parent, prefix=f".{dst.name}."))
    try:
        writer = _ShardWriter(work, max_shard_bytes)
        for done, (name, stored) in enumerate(reader, start=1):
            writer.add(_encode(name, stored, slots[name], to))
            if progress:
                progress(done, len(reader))
        writer.finish()
        _copy_other_files(src, work)
        (work / "config.json").write_text(json.dumps(_config_for(reader.raw_config, to), indent=2) + "\n")
        work.chmod(0o755)  # mkdtemp's are private
        work.rename(dst)
    except BaseException:
        shutil.rmtree(work)
        raise


def _encode(name: str, stored: StoredTensor, slot: Slot, to: Format) -> dict[str, Tensor]:
    """The tensors that hold `stored` in format `to`."""
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
    """Collects tensors into files of at most `max_bytes`, and their index."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self._max_bytes = directory, max_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[tuple[str, ...]] = []
        self._total_bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if self._pending and sum(t.nbytes for t in self._pending.values()) + tensor.nbytes > self._max_bytes:
                self._flush()
            self._pending[name] = tensor.contiguous()
            self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is pending, give the files their final names, write the index."""
        self._flush()
        if len(self._shards) == 1:
            self._part(0).rename(self._directory / SINGLE_NAME)
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._part(i).rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(tuple(self._pending))
        self._pending = {}

    def _part(self, i: int) -> Path:
        return self._directory / f"part-{i}.safetensors"
