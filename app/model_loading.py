"""Loads the answering model of a deployment and builds its engine, prefix cache and answer format.

The only place that chooses implementations of `Engine` and `StateStore`, and divides GPU memory. Start at
`build_model`.
"""

import json
import logging
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from app.advice import take_advice
from app.context_room import check_room
from app.prompting import AnswerFormat, QuoteFormat
from app.quotes import TokenBytes
from app.settings import ModelSettings, RedisSettings, Settings, SettingsError
from app.text_format import TextFormat
from app.unloaded_engine import UnloadedEngine
from model import load_model
from model.admission import measure_state_bytes
from model.chat_format import speaks_chat_format
from model.device_store import DeviceStateStore, PinnedStateStore
from model.engine import JambaEngine
from model.engine_request import Engine
from model.engine_times import EngineTimes
from model.jamba import MAX_GPU_BATCH
from model.kernels import cpu
from model.prefix_cache import PrefixCache
from model.prefix_plan import PlanSettings, state_fingerprint
from model.redis_store import RedisStateStore
from model.state import HybridState, StateLayout
from model.state_store import StateStore
from model.tokenizer import Tokenizer
from model.w8a8 import UnsupportedDevice
from model.weights import Quantization

log = logging.getLogger(__name__)

_DEFAULT_CONTEXT_TOKENS = 262_144
_CPU_QUESTION_TOKENS = 8192


@dataclass(frozen=True)
class LoadedModel:
    """The answering model with tokenizer, engine, cache and answer format."""

    engine: Engine
    cache: PrefixCache
    tokenizer: Tokenizer
    format: AnswerFormat
    name: str
    times: EngineTimes = field(default_factory=EngineTimes)


def build_model(settings: Settings, stack: ExitStack, answering: bool, nonce: str) -> LoadedModel:
    """Load the checkpoint and build engine and prefix cache, which `stack` closes. `nonce` fences documents."""
    path = check_checkpoint(settings.model.path)
    tokenizer = Tokenizer.load(path)
    max_context_tokens = settings.model.max_context_tokens or _read_context_length(path)
    device = choose_device(settings.model) if answering else None
    stores = _state_stores(settings, device, stack)
    if device is None:
        cache = PrefixCache(stores)
        stack.callback(cache.close)
        prompt_format = _choose_format(path, tokenizer, nonce, max_context_tokens)
        check_room(prompt_format, settings)
        return LoadedModel(UnloadedEngine(), cache, tokenizer, prompt_format, path.resolve().name)
    if settings.model.threads:
        torch.set_num_threads(settings.model.threads)
    quantize = choose_quantization(settings.model, device)
    try:
        model = load_model(path, device, choose_dtype(settings.model, device), quantize)
    except UnsupportedDevice as error:
        raise SettingsError(f"JAMBA_RAG_MODEL__QUANTIZE: {error}") from error
    on_cpu = (quantize, device.type) == ("w8a8", "cpu")  # numerically different from a GPU's
    scheme = "w8a8 on a CPU, int4 as stored" if on_cpu else quantize
    fingerprint = state_fingerprint(path, scheme, model.new_state().layout.fingerprint())
    plan_settings = _plan_settings(settings, device)
    state_max_bytes = settings.model.state_max_bytes or None
    if (free_bytes := measure_state_bytes(model, plan_settings.segment_tokens)) is not None:
        kept_bytes = gpu_cache_bytes(settings, free_bytes, model.state_layout, max_context_tokens)
        if kept_bytes:  # an eighth is left for states being saved, or waiting to be written to other tiers
            stores.insert(0, DeviceStateStore(kept_bytes - kept_bytes // 8, device))
        state_max_bytes = state_max_bytes or max(0, free_bytes - kept_bytes)
    cache = PrefixCache(stores, fingerprint, plan_settings)
    stack.callback(cache.close)
    engine = JambaEngine(
        model,
        tokenizer,
        cache,
        max_context_tokens=max_context_tokens,
        max_batch=settings.model.max_batch or (8 if device.type == "cpu" else MAX_GPU_BATCH),
        # The queue has room for every admitted answer with all its candidate quotes, and for the prefetch.
        max_waiting=settings.answers.max_pending * take_advice(path, settings.answers).quote_beginnings + 1,
        state_max_bytes=state_max_bytes,
        draft_tokens=settings.model.draft_tokens,
    )
    stack.callback(engine.close)
    if not engine.max_context_tokens and not settings.model.state_max_bytes:
        raise SettingsError(f"{device} has no memory left for a question beside the weights of {path}")
    prompt_format = _choose_format(path, tokenizer, nonce, engine.max_context_tokens)
    check_room(prompt_format, settings)
    return LoadedModel(engine, cache, tokenizer, prompt_format, path.resolve().name, engine.times)


def longest_question(settings: Settings) -> int:
    """Maximum length of a question in tokens; 0: limited only by the context."""
    on_cpu = choose_device(settings.model).type == "cpu"
    return settings.answers.max_question_tokens or (_CPU_QUESTION_TOKENS if on_cpu else 0)


def gpu_cache_bytes(settings: Settings, free_bytes: int, layout: StateLayout, max_context_tokens: int) -> int:
    """How much free GPU memory prefix states may use; by default at most half, leaving room for one full context."""
    if settings.cache.gpu_max_bytes is not None:
        return settings.cache.gpu_max_bytes
    longest = HybridState(layout, "meta")
    longest.reserve(max_context_tokens)
    return max(0, min(free_bytes // 2, free_bytes - (settings.model.state_max_bytes or longest.nbytes)))


def main_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Main memory of the machine, or the memory limit of the container."""
    machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no such file, or "max"
        return min(machine_bytes, int((cgroup / "memory.max").read_text()))
    return machine_bytes


def _choose_format(path: Path, tokenizer: Tokenizer, nonce: str, max_context_tokens: int) -> AnswerFormat:
    """Constrained quotes if the tokenizer has the quote tokens, otherwise quotes in plain text."""
    if speaks_chat_format(tokenizer):
        return QuoteFormat(tokenizer, TokenBytes.read(path), max_context_tokens)
    log.info("%s has no tokens for quotes: it is asked through its chat template", path)
    return TextFormat.load(path, tokenizer, nonce, max_context_tokens)


def _plan_settings(settings: Settings, device: torch.device) -> PlanSettings:
    """A GPU needs long segments to amortize reading the weights, and every snapshot ends a segment."""
    segment, distance, sparse = (512, 512, 16) if device.type == "cpu" else (16_384, 2048, 2)
    cache = settings.cache
    segment = settings.model.segment_tokens or segment
    distance = distance if cache.snapshot_tokens is None else cache.snapshot_tokens
    sparse = sparse if cache.sparse_snapshots is None else cache.sparse_snapshots
    int8 = cache.snapshot_dtype == "int8"
    return PlanSettings(cache.block_tokens, segment, distance, segment * sparse, int8)


def check_checkpoint(path: Path) -> Path:
    """Raises SettingsError unless `path` looks like a checkpoint directory."""
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise SettingsError(
            f"{path} holds no checkpoint (config.json and *.safetensors); set JAMBA_RAG_MODEL__PATH to one"
        )
    return path


def choose_device(settings: ModelSettings) -> torch.device:
    """The device of the model. Raises SettingsError if the GPU does not exist."""
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(settings.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"JAMBA_RAG_MODEL__DEVICE={device}: {torch.cuda.device_count()} CUDA devices are here")
    return device


def choose_dtype(settings: ModelSettings, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where it is fast, on GPUs and on CPUs with AVX512_BF16 or AMX, else float32."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()  # implied by AMX
    return torch.bfloat16 if fast else torch.float32


def choose_quantization(settings: ModelSettings, device: torch.device) -> Quantization | None:
    """`auto` is `w8a8` on CPUs where that is faster; else `int8`."""
    if settings.quantize == "auto":
        return "w8a8" if device.type == "cpu" and cpu.rounds_rows() else "int8"
    return None if settings.quantize == "none" else settings.quantize


def chosen(settings: ModelSettings) -> dict[str, str]:
    """The values of `auto` settings on this machine, by name."""
    device = choose_device(settings)
    dtype = str(choose_dtype(settings, device)).removeprefix("torch.")
    return {"device": str(device), "dtype": dtype, "quantize": choose_quantization(settings, device) or "none"}


def _read_context_length(path: Path) -> int:
    return json.loads((path / "config.json").read_text()).get("max_position_embeddings", _DEFAULT_CONTEXT_TOKENS)


def _state_stores(settings: Settings, device: torch.device | None, stack: ExitStack) -> list[StateStore]:
    """Tiers of prefix states below GPU memory, fastest first; without a device only the persistent ones."""
    stores: list[StateStore] = []
    if device is not None:
        on_gpu, host_bytes = device.type == "cuda", settings.cache.host_max_bytes
        if host_bytes is None:
            host_bytes = main_memory_bytes() // 4 if on_gpu else 1 << 30
        if host_bytes:
            stores.append(PinnedStateStore(host_bytes) if on_gpu else DeviceStateStore(host_bytes))
    if settings.redis.url is not None:
        stores.append(_open_redis(settings.redis, settings.redis.url.get_secret_value(), settings.data_dir))
        stack.callback(stores[-1].close)
    return stores


def _open_redis(settings: RedisSettings, url: str, data_dir: Path) -> RedisStateStore:
    """Raises SettingsError for an invalid URL; an unusable server is only logged."""
    try:
        owed = data_dir / "owed-deletes.json"
        store = RedisStateStore(url, settings.key_prefix, settings.ttl_s, timeout_s=settings.timeout_s, owed_file=owed)
    except ValueError as error:
        raise SettingsError(f"JAMBA_RAG_REDIS__URL is {error}") from None
    store.open()
    return store
