"""The command `doctor`: checks everything a service needs, and says what is wrong and how to fix it."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from app.client import CommandFailed, connect
from app.datadir import DataDir, DataDirInUse, find_unwritable
from app.embedding import has_untuned, open_embedder, open_reranker
from app.model_loading import check_checkpoint, choose_device
from app.serving import check_address
from app.settings import Settings, hide_password
from ingest.parse import ocr
from ingest.parse.cage import find_way_out, parse_in_child
from ingest.parse.child import ParseLimits
from model import JambaConfig
from model.kernels.cpu_build import load_library
from model.redis_store import RedisStateStore, StateServerFault
from model.tokenizer import Tokenizer
from retrieval.index import FaissIndex, IndexDamaged
from retrieval.store import DocumentStore
from retrieval.types import Document
from retrieval.words import WordIndex

_MIN_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    detail: str


def examine(settings: Settings) -> list[Finding]:
    """All findings, in the order in which a service needs the checked parts."""
    if settings.url is not None:
        return _examine_service(settings)
    checks: dict[str, Callable[[Settings], str]] = {
        "device": _check_device,
        "kernels": _check_kernels,
        "checkpoint": _check_checkpoint,
        "memory": _check_memory,
        "embedder": _check_embedder,
        "reranker": _check_reranker,
        "parsers": _check_parsers,
        "redis": _check_redis,
        "disk": _check_disk,
        "data dir": _check_writable,
        "port": _check_port,
    }
    findings = [_run(name, partial(check, settings)) for name, check in checks.items()]
    return findings + _examine_data(settings)


def _run(name: str, check: Callable[[], str]) -> Finding:
    """Run a check; an exception is a fault, whose message says what to do."""
    try:
        return Finding(name, True, check())
    except Exception as error:
        return Finding(name, False, str(error) or type(error).__name__)


def _examine_service(settings: Settings) -> list[Finding]:
    def check_ready() -> str:
        with connect(settings) as service:
            return str(service.request("GET", "/readyz")["status"])

    def check_key() -> str:
        with connect(settings) as service:
            return f"valid; collections to be seen: {len(service.request('GET', '/v1/collections')['data'])}"

    return [_run("service", check_ready), _run("key", check_key)]


def _check_device(settings: Settings) -> str:
    device = choose_device(settings.model)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{torch.cuda.get_device_name(device)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return f"{device}, {torch.get_num_threads()} threads"


def _check_kernels(settings: Settings) -> str:
    """Run a random Jamba with one layer of each kind, to exercise every kernel of this device."""
    from model.jamba import Jamba

    device = choose_device(settings.model)
    if device.type == "cpu" and load_library() is None:
        raise CommandFailed(
            "no C compiler that works: answers are right, but several times slower; install gcc and the C headers"
        )
    config = JambaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        expert_layer_period=4,
        expert_layer_offset=0,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=8,
        mamba_conv_bias=True,
        mamba_proj_bias=False,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Jamba(config).to(device).eval()
    start = time.perf_counter()
    with torch.inference_mode():
        state = model.new_state()
        model.forward(torch.arange(48, device=device)[None], state)
        logits = model.forward(torch.tensor([[1]], device=device), state)
    if not torch.isfinite(logits).all():
        raise RuntimeError("a random model gives logits that are not finite on this device")
    return f"attention, Mamba and experts run on {device} ({1000 * (time.perf_counter() - start):.0f} ms)"


def _check_checkpoint(settings: Settings) -> str:
    path = check_checkpoint(settings.model.path)
    _check_shards(path)
    config = JambaConfig.from_json(path / "config.json")
    tokenizer = Tokenizer.load(path)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return f"{path}: {config.num_hidden_layers} layers, a vocabulary of {tokenizer.vocab_size}, {size / 2**20:.0f} MiB"


def _check_shards(path: Path) -> None:
    """Check that all shards exist and are complete, to detect broken downloads."""
    index = path / "model.safetensors.index.json"
    shards = {file.name for file in path.glob("*.safetensors")}
    if index.is_file() and (missing := sorted(set(json.loads(index.read_text())["weight_map"].values()) - shards)):
        raise CommandFailed(f"{path} lacks {len(missing)} shards ({', '.join(missing[:3])}); download it again")
    for name in sorted(shards):
        try:
            with safe_open(path / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise CommandFailed(f"{path / name} is cut off or damaged ({error}); download it again") from error


def _check_memory(settings: Settings) -> str:
    """Compare the size of the weights in memory, estimated for the worst case, with the free memory of the device."""
    path, device = check_checkpoint(settings.model.path), choose_device(settings.model)
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if device.type == "cuda":
        free, place = torch.cuda.mem_get_info(device)[0], str(device)
    else:
        free, place = _available_bytes(), "this machine"
    quantized = "quantization_config" in json.loads((path / "config.json").read_text())
    needed = stored // 2 if settings.model.quantize != "none" and not quantized else stored
    if needed > free:
        raise CommandFailed(
            f"the weights take {needed / 2**30:.1f} GiB, {place} has {free / 2**30:.1f} GiB free; "
            "quantize them, or take a smaller checkpoint or a larger machine"
        )
    return f"{needed / 2**30:.2f} GiB for the weights, {free / 2**30:.1f} GiB free"


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_parsers(settings: Settings) -> str:
    """Run a parser in its child process, under the configured limits."""
    limits = ParseLimits(wall_s=settings.ingest.parse_timeout_s, memory_bytes=settings.ingest.parse_max_bytes)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "test.html"
        file.write_text("<h1>Test</h1><p>It works.</p>")
        parse_in_child(file, "text/html", limits)
    scans = "scans are read with tesseract" if ocr.find_program() else "scans are not read: there is no tesseract"
    way_out = find_way_out(limits)
    network = "without a network" if way_out is None else f"but not kept off the network ({way_out})"
    return f"child processes start, with up to {settings.ingest.parse_max_bytes >> 20} MiB, {network}; {scans}"


def _check_embedder(settings: Settings) -> str:
    embedder = open_embedder(settings.retrieval)
    return f"{embedder.name}, {len(embedder.embed_query('test'))} numbers a passage"


def _check_reranker(settings: Settings) -> str:
    reranker = open_reranker(settings.retrieval)
    if reranker is None:
        return "switched off: hits keep the order of the search"
    reranker.score("test", ["test"])
    return f"{settings.retrieval.reranker_path or 'the one that ships'} can be used"


def _check_redis(settings: Settings) -> str:
    if settings.redis.url is None:
        return "none is set: prefix states do not survive a restart"
    url, prefix = settings.redis.url.get_secret_value(), f"{settings.redis.key_prefix}doctor:"
    try:
        with closing(RedisStateStore(url, prefix, ttl_s=60, timeout_s=2)) as store:
            servers = store.probe()
    except ValueError as error:
        raise CommandFailed(f"JAMBA_RAG_REDIS__URL is {error}") from error
    except StateServerFault as error:
        raise CommandFailed(f"{hide_password(url)} cannot be used: {error}") from error
    full = [server for server in servers if server.get("maxmemory") and server["maxmemory_policy"] == "noeviction"]
    if full:
        raise CommandFailed(
            f"{hide_password(url)} refuses new states once it is full; set maxmemory-policy to allkeys-lru"
        )
    used, limits = sum(server["used_memory"] for server in servers), [server["maxmemory"] for server in servers]
    size = f"{sum(limits) >> 20} MiB" if all(limits) else "all that is there"
    cluster = f", a cluster of {len(servers)}" if len(servers) > 1 else ""
    return f"{hide_password(url)}{cluster}, {used >> 20} MiB used of {size}"


def _check_disk(settings: Settings) -> str:
    place = settings.data_dir
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < _MIN_FREE_BYTES:
        raise CommandFailed(f"{place} has {free >> 20} MiB left, less than {_MIN_FREE_BYTES >> 20}; free some")
    return f"{free >> 30} GiB free at {place}"


def _check_writable(settings: Settings) -> str:
    """Check that this user can write the data directory and its contents, or the folder it would be created in."""
    place = settings.data_dir
    while not place.exists():
        place = place.parent
    if (fault := find_unwritable(place)) is not None:
        raise CommandFailed(fault)
    if not place.is_dir():
        raise CommandFailed(f"{place} is no folder; take another with --data-dir")
    return f"{place} can be written"


def _check_port(settings: Settings) -> str:
    """Check that the service's address is free, or in use by the service of this data directory."""
    host, port = settings.server.host, settings.server.port
    try:
        check_address(host, port)
    except OSError:
        if settings.data_dir.is_dir() and "runs" in _check_lock(settings.data_dir):
            return f"{host}:{port} is in use, as by the service that runs"
        raise
    return f"{host}:{port} is free"


def _examine_data(settings: Settings) -> list[Finding]:
    findings = [_run("lock", lambda: _check_lock(settings.data_dir))] if settings.data_dir.is_dir() else []
    database = DataDir.database_in(settings.data_dir)
    if not database.is_file():
        return [*findings, Finding("database", True, f"{settings.data_dir} has none: the first start makes it")]
    opened = _run("database", lambda: DocumentStore(database).close() or "")
    if not opened.ok:
        return [*findings, opened]
    with closing(DocumentStore(database)) as store:
        findings.append(_run("database", lambda: _check_database(store)))
        findings.append(_run("ingestion", lambda: _check_ingestion(store)))
        findings.append(_run("originals", lambda: _check_originals(store, settings.data_dir)))
        findings.append(_run("index", lambda: _check_index(store, settings)))
        findings.append(_run("words", lambda: _check_words(store, settings.data_dir / "words")))
    return findings


def _check_lock(data_dir: Path) -> str:
    try:
        with DataDir(data_dir):
            return "nobody has the data directory open"
    except DataDirInUse as error:
        return f"a service runs: {error}"


def _check_database(store: DocumentStore) -> str:
    if problems := store.check():
        raise CommandFailed(f"{'; '.join(problems[:3])}; restore a backup")
    collections = store.list_collections()
    return f"{sum(c.documents for c in collections)} documents in {len(collections)} collections"


def _check_ingestion(store: DocumentStore) -> str:
    collections = store.list_collections()
    pending, failed = (sum(getattr(c, name) for c in collections) for name in ("pending", "failed"))
    if failed:
        documents = store.list_documents(None, "failed", 3, None)
        names = "; ".join(f"{d.filename}: {d.last_error.code}" for d in documents if d.last_error)
        return f"{failed} documents have failed ({names}); `jamba-rag documents list --status failed` says why"
    return f"{pending} documents are waiting"


def _check_originals(store: DocumentStore, data_dir: Path) -> str:
    missing = [document for document in _all(store) if not (data_dir / "files" / document.sha256).is_file()]
    if missing:
        names = ", ".join(document.filename for document in missing[:3])
        raise CommandFailed(f"{len(missing)} originals are missing ({names}); upload them again")
    return "every document has its original"


def _all(store: DocumentStore) -> Iterator[Document]:
    after = None
    while page := store.list_documents(None, None, 1000, after):
        yield from page
        after = page[-1].id


def _check_index(store: DocumentStore, settings: Settings) -> str:
    embedder, directory = open_embedder(settings.retrieval), settings.data_dir / "faiss"
    if has_untuned(store, embedder):
        return f"vectors of an older version; `jamba-rag reembed` makes those of {embedder.name}, which find more"
    if not store.adopts(embedder.name, embedder.dim):
        store.require_embedder(embedder.name, embedder.dim)
    elif missing := store.count_to_embed(embedder.name, embedder.dim):
        return f"{missing} chunks have no vector of {embedder.name} yet: `jamba-rag reembed` goes on"
    if not directory.is_dir():
        return "to be made at the next start"
    try:
        index = FaissIndex.load(directory, embedder.dim, embedder.name)
    except IndexDamaged as error:
        return f"to be rebuilt at the next start ({error})"
    behind = index.catch_up(store)
    if index.is_filling:
        index.close()
        return "to be rebuilt at the next start (it is of another history than the database)"
    if index.count != store.count_chunks():
        raise CommandFailed(
            f"the index has {index.count} chunks, the database {store.count_chunks()}; delete {directory}"
        )
    return f"{index.count} chunks" + (", brought up to date" if behind else "")


def _check_words(store: DocumentStore, directory: Path) -> str:
    if not directory.is_dir():
        return "to be made at the next start"
    try:
        words = WordIndex(directory)
    except IndexDamaged as error:
        return f"to be rebuilt at the next start ({error})"
    if words.generation != store.generation():
        return "behind the database; the next search brings it up to date"
    if words.missing:
        return f"{words.count} of {store.count_chunks()} chunks; a running service adds the others"
    if words.count != store.count_chunks():
        raise CommandFailed(
            f"the word index has {words.count} chunks, the database {store.count_chunks()}; stop the service and "
            f"delete {directory}"
        )
    return f"{words.count} chunks"
