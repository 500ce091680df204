"""Loads a safetensors checkpoint into modules: memory-mapped, tensor by tensor, quantized on the fly if asked for.

A checkpoint may store experts separately (as on the Hub) or fused (as `transformers` 5 holds them in memory); this
module presents both as separate experts. Matrices may be stored as float, as int8 (`<name>`, and `<name>.scale` with
one float32 per row) or as int4 (`<name>.qweight` and `<name>.scales`, see int4.py). Every missing, unknown or
misshapen tensor is reported by name. Start at `load_model`; convert.py writes checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.config import JambaConfig, UnsupportedWeights
from model.int4 import GROUP_SIZE, unpack_int4
from model.int8 import Int8Experts, Int8Head, Int8Linear, PackedExperts, PackedLinear, quantize_rows, swap_linears
from model.jamba import Jamba
from model.kernels import cpu
from model.moe import Experts
from model.w8a8 import check_device, round_activations

Quantization = Literal["int8", "w8a8"]
INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
QUANT_METHODS = ("jamba_rag_int8", "jamba_rag_int4")
_READERS = 4
_FEW_PACKED = 96  # with packed weights, two kernel calls per layer are faster than its modules up to this many tokens
_ROUND_ELEMENTS = {"cpu": 1 << 18, "gpu": 1 << 24}  # quantized at a time; on a CPU their float copy must fit the cache
_ALWAYS_FLOAT32 = ("A_log", "D", "scale")
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


@torch.inference_mode(False)  # inference mode is per thread, and the weights are filled by worker threads
def load_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantize: Quantization | None = None,
) -> Jamba:
    """Load a checkpoint directory into a model on `device`, in evaluation mode.

    dtype: of weights and activations; None means float32 on a CPU and bfloat16 elsewhere. A and D stay float32.
    quantize: "int8" keeps linear layers and experts in int8 (int8.py). "w8a8" also quantizes activations: on a GPU
    during prefill (w8a8.py), on a CPU always, where weights stored as int4 also stay int4.
    Raises UnsupportedWeights, naming every bad field or tensor, before anything large is read; UnsupportedDevice if
    the device has no kernels for "w8a8".
    """
    if quantize not in (None, "int8", "w8a8"):
        raise ValueError(f"quantize is {quantize!r}, must be 'int8', 'w8a8' or None")
    reader, device = CheckpointReader(Path(path)), torch.device(device)
    if quantize == "w8a8":
        check_device(device)
    if device.type == "cuda":
        from torch.nn.attention import bias  # noqa: F401 - takes seconds; import it now, not in the first request
    with torch.device("meta"):
        model = Jamba(reader.config)
    if quantize:
        swap_linears(model)
    reader.check({name: tuple(slot.values.shape) for name, slot in find_slots(model).items()})
    if quantize == "w8a8" and device.type == "cpu":
        _pack(model, reader)
    allocate(model, dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16), device)
    _fill(model, reader)
    if quantize == "w8a8" and device.type != "cpu":
        round_activations(model)
    if quantize and device.type == "cpu" and model.config.tie_word_embeddings:
        _share_int8(model, reader["model.embed_tokens.weight"])
    return model.eval()


def _fill(model: Jamba, reader: CheckpointReader) -> None:
    slots = find_slots(model)
    names = [name for name in reader.names if name in slots]  # packed layers are already loaded
    with ThreadPoolExecutor(_READERS) as pool:  # overlaps disk reads, quantization and copies
        for _ in pool.map(lambda name: slots[name].fill(reader[name]), names):
            pass


def _pack(model: Jamba, reader: CheckpointReader) -> None:
    """Replace the int8 layers of a model on "meta", except x_proj, with packed ones that quantize their inputs."""
    for path, module in list(model.layers.named_modules()):
        for name, child in list(module.named_children()):
            stored = f"model.layers.{path}.{name}"
            if isinstance(child, Int8Experts):
                experts = [f"{stored}.{i}" for i in range(len(child.down_proj))]
                gate_up = [_packed(reader, f"{one}.gate_proj.weight", f"{one}.up_proj.weight") for one in experts]
                down = [_packed(reader, f"{one}.down_proj.weight") for one in experts]
                setattr(module, name, PackedExperts(gate_up, down))
            elif isinstance(child, Int8Linear) and name != "x_proj":
                setattr(module, name, PackedLinear(_packed(reader, f"{stored}.weight"), child.bias))
    model.few_tokens = _FEW_PACKED


def _share_int8(model: Jamba, embedding: StoredTensor) -> None:
    """If the embedding is stored as int8, let the tied head compute with its int8 values."""
    if embedding.values.dtype == torch.int8:
        model.lm_head = Int8Head(embedding.values.clone(), embedding.scale.clone())  # the mapped file may change


def _packed(reader: CheckpointReader, *names: str) -> cpu.Packed:
    """The named matrices, concatenated along the output dimension: int4 if all are stored as int4, otherwise int8."""
    stored = [reader[name] for name in names]
    if all(one.values.dtype == torch.uint8 for one in stored):
        return cpu.Packed.of_int4(torch.cat([one.values for one in stored]), torch.cat([one.scale for one in stored]))
    values, scales = zip(*(one.int8() for one in stored), strict=True)
    return cpu.Packed.of_int8(torch.cat(values), torch.cat(scales))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the checkpoint stores it: float, int8 with a scale per row, or int4 with a scale per group."""

    values: Tensor
    scale: Tensor | None = None

    def dense(self) -> Tensor:
        """The weights as floats: in the stored dtype, or dequantized to float32."""
        if self.scale is None:
            return self.values
        if self.values.dtype == torch.uint8:
            return unpack_int4(self.values, self.scale)
        return self.values.float() * self.scale[:, None]

    def int8(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """int8 values and a scale per row: as stored, or quantized on `device`, a few rows at a time."""
        if self.scale is not None and self.values.dtype == torch.int8:
            return self.values, self.scale
        device = torch.device(device)
        values = torch.empty(self.shape, dtype=torch.int8, device=device)
        scale = torch.empty(self.shape[0], device=device)
        step = max(1, _ROUND_ELEMENTS["cpu" if device.type == "cpu" else "gpu"] // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            part = StoredTensor(self.values[rows], None if self.scale is None else self.scale[rows])
            values[rows], scale[rows] = quantize_rows(part.dense().to(device))
        return values, scale

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.values.shape)
        return (*shape[:-1], 2 * shape[-1]) if self.values.dtype == torch.uint8 else shape


@dataclass(frozen=True, slots=True)
class Slot:
    """The destination of a checkpoint tensor in the model."""

    values: Tensor
    scale: Tensor | None = None  # for int8 layers

    def fill(self, stored: StoredTensor) -> None:
        if self.scale is None:
            self.values.copy_(stored.dense())
        else:
            values, scale = stored.int8(self.values.device)
            self.values.copy_(values)
            self.scale.data.copy_(scale)


def find_slots(model: Jamba) -> dict[str, Slot]:
    """The destination of every tensor of a checkpoint of this model, by Hub name, experts separate."""
    slots: dict[str, Slot] = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts | Int8Experts):
            slots |= {f"{path}.{name}": slot for name, slot in _expert_slots(module)}
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if leaf != "scale":
                scale = getattr(module, "scale", None) if leaf == "weight" else None
                slots[f"{path}.{leaf}"] = Slot(parameter.data, scale)
    if model.config.tie_word_embeddings:
        del slots["lm_head.weight"]
    return {name if name == "lm_head.weight" else f"model.{name}": slot for name, slot in slots.items()}


def _expert_slots(experts: Experts | Int8Experts) -> Iterator[tuple[str, Slot]]:
    gate_up, down = experts.gate_up_proj.data, experts.down_proj.data
    gate_up_scale = getattr(experts, "gate_up_scale", None)
    down_scale = getattr(experts, "down_scale", None)
    f = down.shape[-1]
    for i in range(len(down)):
        for name, rows in (("gate_proj", slice(0, f)), ("up_proj", slice(f, 2 * f))):
            scale = None if gate_up_scale is None else gate_up_scale.data[i, rows]
            yield f"{i}.{name}.weight", Slot(gate_up[i, rows], scale)
        yield f"{i}.down_proj.weight", Slot(down[i], None if down_scale is None else down_scale.data[i])


def allocate(model: Jamba, dtype: torch.dtype, device: torch.device) -> None:
    """Allocate uninitialised memory for the parameters of a model on "meta"."""
    for name, parameter in list(model.named_parameters()):
        own = torch.float32 if name.endswith(_ALWAYS_FLOAT32) else dtype
        own = own if parameter.is_floating_point() else parameter.dtype
        path, _, leaf = name.rpartition(".")
        memory = torch.empty(parameter.shape, dtype=own, device=device)
        setattr(model.get_submodule(path), leaf, nn.Parameter(memory, requires_grad=parameter.requires_grad))
    model.tie_weights()


@dataclass(frozen=True, slots=True)
class _Entry:
    file: str
    stored_name: str  # without the suffixes of int4
    shape: tuple[int, ...]
    part: tuple[int, slice] | None = None  # (expert, rows) in a fused tensor


class CheckpointReader:
    """Reads the tensors of a checkpoint directory by their Hub names. Thread safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw_config: dict[str, Any] = _read_json(path / "config.json")
        self.config = JambaConfig.from_dict(self.raw_config, source=str(path / "config.json"))
        method = (self.raw_config.get("quantization_config") or {}).get("quant_method")
        if method not in (None, *QUANT_METHODS):
            raise UnsupportedWeights(f"{path} is quantized by {method!r}, supported are {', '.join(QUANT_METHODS)}")
        self._open_shards: dict[str, Any] = {}
        self._file_of = self._find_files()
        self._entries = dict(self._find_entries())
        self._drop_tied_head()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, in file order."""
        return tuple(self._entries)

    def __getitem__(self, name: str) -> StoredTensor:
        entry = self._entries[name]
        stored = entry.stored_name
        if f"{stored}.qweight" in self._file_of:
            return StoredTensor(self._read(f"{stored}.qweight"), self._read(f"{stored}.scales"))
        scale = self._read(f"{stored}.scale") if f"{stored}.scale" in self._file_of else None
        return StoredTensor(self._read(stored, entry.part), scale)

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UnsupportedWeights, naming every tensor that is missing, unknown or of the wrong shape."""
        found = {name: entry.shape for name, entry in self._entries.items()}
        problems = [f"missing {name}" for name in wanted if name not in found]
        problems += [f"unknown {name}" for name in found if name not in wanted]
        problems += [
            f"{name} is {shape}, config.json says {wanted[name]}"
            for name, shape in found.items()
            if wanted.get(name, shape) != shape
        ]
        if problems:
            raise UnsupportedWeights(f"{self.path} does not fit its config.json: {'; '.join(problems)}")

    def _find_files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index = self.path / INDEX_NAME
        if index.exists():
            file_of = _read_json(index).get("weight_map", {})
            if strangers := {file for file in file_of.values() if Path(file).name != file}:
                raise UnsupportedWeights(f"{index} points out of its directory: {', '.join(sorted(strangers))}")
            return dict(sorted(file_of.items(), key=lambda item: item[::-1]))
        if not (self.path / SINGLE_NAME).exists():
            raise UnsupportedWeights(f"{self.path} holds neither {SINGLE_NAME} nor {INDEX_NAME}")
        return dict.fromkeys(sorted(self._shard(SINGLE_NAME).keys()), SINGLE_NAME)

    def _find_entries(self) -> Iterator[tuple[str, _Entry]]:
        """Names and shapes, from the shard headers alone. Scales have no entry of their own."""
        for name, file in self._file_of.items():
            is_scale = name.endswith(".scale") and name.removesuffix(".scale") in self._file_of
            is_scale |= name.endswith(".scales") and f"{name.removesuffix('.scales')}.qweight" in self._file_of
            if is_scale:
                continue
            view = self._view(name)
            shape, stored = tuple(view.get_shape()), name.removesuffix(".qweight")
            if name != stored:
                shape = (*shape[:-1], 2 * shape[-1])
                self._check_scale(f"{stored}.scales", (shape[0], shape[1] // GROUP_SIZE), stored)
            elif view.get_dtype() == "I8":
                self._check_scale(f"{stored}.scale", shape[:1], stored)
            elif view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise UnsupportedWeights(f"{self.path}: {name} is {view.get_dtype()}, neither float nor a known format")
            yield from _split_fused(_Entry(file, stored, shape))

    def _check_scale(self, name: str, shape: tuple[int, ...], owner: str) -> None:
        if name not in self._file_of:
            raise UnsupportedWeights(f"{self.path}: {owner} is quantized but {name} is missing")
        if (found := tuple(self._view(name).get_shape())) != shape:
            raise UnsupportedWeights(f"{self.path}: {name} is {found}, {owner} needs {shape}")

    def _drop_tied_head(self) -> None:
        """Ignore a stored copy of a tied head. Raises UnsupportedWeights if it differs from the embedding."""
        if self.config.tie_word_embeddings and "lm_head.weight" in self._entries:
            if not torch.equal(self["lm_head.weight"].dense(), self["model.embed_tokens.weight"].dense()):
                raise UnsupportedWeights(f"{self.path}: lm_head.weight is tied by config.json but is not the embedding")
            del self._entries["lm_head.weight"]

    def _read(self, name: str, part: tuple[int, slice] | None = None) -> Tensor:
        return self._view(name)[part or slice(None)]

    def _view(self, name: str) -> Any:
        try:
            return self._shard(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise UnsupportedWeights(f"{self.path / self._file_of[name]}: {error}") from error

    def _shard(self, file: str) -> Any:
        """The memory-mapped shard, opened on first use."""
        if file not in self._open_shards:
            try:
                self._open_shards[file] = safe_open(self.path / file, framework="pt")
            except (SafetensorError, FileNotFoundError) as error:
                raise UnsupportedWeights(f"{self.path / file} cannot be read: {error}") from error
        return self._open_shards[file]


def _split_fused(entry: _Entry) -> Iterator[tuple[str, _Entry]]:
    match = _FUSED.fullmatch(entry.stored_name)
    if match is None or len(entry.shape) != 3:
        yield entry.stored_name, entry
        return
    (base, kind), (m, rows, columns) = match.groups(), entry.shape
    names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    step = rows // len(names)
    for i in range(m):
        for j, name in enumerate(names):
            part = (i, slice(j * step, (j + 1) * step))
            yield f"{base}.{i}.{name}.weight", _Entry(entry.file, entry.stored_name, (step, columns), part)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UnsupportedWeights(f"{path.parent} holds no {path.name}: not a checkpoint of Hugging Face") from error
    except (OSError, ValueError) as error:
        raise UnsupportedWeights(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedWeights(f"{path} holds no JSON object")
    return value
