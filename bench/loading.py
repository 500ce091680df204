"""Speed of converting and loading a checkpoint, compared with a plain read from the disk in the same run.

The checkpoint has the Hub layout (one tensor per expert, bf16, several shards) and layers of the real size, but few
layers and experts, with repeating values; with `--int8` it is written in converted form, at full size if desired, and
only loaded. `cold` runs start with the files dropped from the page cache, `cached` ones follow a read. `gb_per_s`
refers to the size of the files; `anonymous_gib` is the peak increase of the process's anonymous memory, without mapped
files. The files need up to 6 GB (49 GB: `--int8 --layers 32 --experts 16`) and are removed at the end.
    python -m bench.loading [--layers 2] [--experts 4] [--directory /tmp] [--int8]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.gpu_kit import synchronize
from bench.runs import BenchRun
from bench.shapes import SHAPES
from model import Jamba, JambaConfig, convert_checkpoint, load_model
from model.int8 import swap_linears
from model.weights import INDEX_NAME, find_slots

SHARD_BYTES = 1 << 30
READ_BYTES = 16 << 20
PROMPT_TOKENS = 16


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="jamba-52b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--directory", type=Path, help="folder for temporary files; on a disk, not in memory")
    arguments = parser.parse_args(argv)
    config = replace(SHAPES[arguments.shape], num_hidden_layers=arguments.layers, num_experts=arguments.experts)
    device = torch.device(arguments.device)
    run = BenchRun("loading", argv=sys.argv if argv is None else ["loading", *argv])
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        source, target = Path(directory) / "bf16", Path(directory) / "int8"
        if arguments.int8:
            write_checkpoint(target, config, int8=True)
        else:
            write_checkpoint(source, config)
            add_read_rows(run, source, "bf16")
            add_row(run, "convert bf16 to int8, cached", source, lambda: convert_checkpoint(source, target))
            os.sync()
            add_load_rows(run, source, "bf16, rounded to int8", device)
        add_read_rows(run, target, "int8")
        add_load_rows(run, target, "int8", device)
        run.finish()


def add_load_rows(run: BenchRun, path: Path, name: str, device: torch.device) -> None:
    drop_from_page_cache(path)
    for state in ("cold", "cached"):
        load = lambda: answer(load_model(path, device, quantize="int8"), device)
        add_row(run, f"load {name}, {state}, and a first token", path, load)


def write_checkpoint(path: Path, config: JambaConfig, int8: bool = False) -> None:
    """Write a checkpoint in Hub layout, or as from convert.py; plausible values that repeat every few million."""
    path.mkdir()
    with torch.device("meta"):
        model = Jamba(config)
    if int8:
        swap_linears(model)
    slots = find_slots(model)
    numbers = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(split_by_size({name: slot.values for name, slot in slots.items()}), start=1):
        file = f"model-{i:05d}.safetensors"
        tensors = {name: repeat(numbers, slots[name].values.shape) for name in names if slots[name].scale is None}
        for name in names:
            if (scale := slots[name].scale) is not None:
                tensors[name] = repeat(numbers.mul(40).to(torch.int8), slots[name].values.shape)
                tensors[f"{name}.scale"] = torch.full(scale.shape, slots[name].values.shape[-1] ** -0.5 / 40)
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    quantized = {"quantization_config": {"quant_method": "jamba_rag_int8"}} if int8 else {}
    (path / "config.json").write_text(json.dumps(config.to_dict() | quantized))
    os.sync()


def split_by_size(tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    """Groups of names, in order, with at most SHARD_BYTES / 2 elements each."""
    names, elements = [], 0
    for name, tensor in tensors.items():
        if names and elements + tensor.numel() > SHARD_BYTES / 2:
            yield names
            names, elements = [], 0
        names.append(name)
        elements += tensor.numel()
    yield names


def repeat(numbers: Tensor, shape: torch.Size) -> Tensor:
    count = shape.numel()
    scaled = numbers[:count] * (shape[-1] ** -0.5 if numbers.is_floating_point() else 1)
    return scaled.repeat(-(-count // len(scaled)))[:count].reshape(shape)


def add_read_rows(run: BenchRun, path: Path, name: str) -> None:
    """Add rows for reading the files sequentially, like dd."""
    drop_from_page_cache(path)
    for state in ("cold", "cached"):
        add_row(run, f"plain read of the {name} files, {state}", path, lambda: read_files(path))


def read_files(path: Path) -> None:
    buffer = bytearray(READ_BYTES)
    for file in weight_files(path):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def answer(model: Jamba, device: torch.device) -> None:
    with torch.inference_mode():
        tokens = torch.arange(PROMPT_TOKENS, device=device)
        model.forward_packed(tokens, [PROMPT_TOKENS], [model.new_state()]).argmax().item()


def add_row(run: BenchRun, what: str, path: Path, call: Callable[[], object]) -> None:
    nbytes = sum(file.stat().st_size for file in weight_files(path))
    gc.collect()
    with watch_memory() as memory:
        start = time.perf_counter()
        call()
        synchronize(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        seconds = time.perf_counter() - start
    run.add(
        what=what, file_gb=nbytes / 1e9, s=seconds, gb_per_s=nbytes / seconds / 1e9, anonymous_gib=memory.peak / 2**30
    )


class Memory:
    peak = 0  # bytes above what there was at the beginning


@contextmanager
def watch_memory() -> Iterator[Memory]:
    """Sample the anonymous memory of the process every few milliseconds."""
    memory, before, done = Memory(), anonymous_bytes(), threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            memory.peak = max(memory.peak, anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()


def anonymous_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # no Linux
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def drop_from_page_cache(path: Path) -> None:
    """Drop a file from the page cache, if supported; mapped and dirty pages stay."""
    for file in weight_files(path) if hasattr(os, "posix_fadvise") else ():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


if __name__ == "__main__":
    main()
