"""The command `doctor`: looks at everything a service needs and says what is wrong and what to do."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from app.client import CommandFailed, connect
from app.datadir import DataDir, DataDirInUse
from app.main import check_checkpoint, choose_device
from app.settings import Settings, hide_password
from model import JambaConfig
from model.tokenizer import Tokenizer
from retrieval.embedder import MiniLMEmbedder
from retrieval.index import FaissIndex, IndexDamaged
from retrieval.store import DocumentStore
from retrieval.types import Document

_MIN_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    detail: str


def examine(settings: Settings) -> list[Finding]:
    """All findings, in the order in which things are needed."""
    if settings.url is not None:
        return _examine_service(settings)
    checks: dict[str, Callable[[Settings], str]] = {
        "device": _check_device,
        "kernels": _check_kernels,
        "checkpoint": _check_checkpoint,
        "embedder": _check_embedder,
        "redis": _check_redis,
        "disk": _check_disk,
    }
    findings = [_run(name, partial(check, settings)) for name, check in checks.items()]
    return findings + _examine_data(settings)


def _run(name: str, check: Callable[[], str]) -> Finding:
    """A fault is whatever a check raises: its message says what to do."""
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
            return f"{len(service.request('GET', '/v1/collections')['data'])} collections to be seen"

    return [_run("service", check_ready), _run("key", check_key)]


def _check_device(settings: Settings) -> str:
    device = choose_device(settings.model)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{torch.cuda.get_device_name(device)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return f"{device}, {torch.get_num_threads()} threads"


def _check_kernels(settings: Settings) -> str:
    """Runs a step of a random Jamba of one layer of each kind, so that every kernel of this device is used."""
    from model.jamba import Jamba

    device = choose_device(settings.model)
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
    config = JambaConfig.from_json(path / "config.json")
    tokenizer = Tokenizer.load(path)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return f"{path}: {config.num_hidden_layers} layers, {tokenizer.vocab_size} tokens, {size / 2**20:.0f} MiB"


def _check_embedder(settings: Settings) -> str:
    embedder = MiniLMEmbedder()
    return f"{embedder.name}, {len(embedder.embed_query('test'))} numbers a passage"


def _check_redis(settings: Settings) -> str:
    if settings.redis.url is None:
        return "none is set: prefix states do not survive a restart"
    import redis

    url = settings.redis.url.get_secret_value()
    client = redis.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=2)
    try:
        memory = client.info("memory")
    except redis.RedisError as error:
        raise CommandFailed(f"{hide_password(url)} does not answer ({error}); start it or correct the URL") from error
    finally:
        client.close()
    limit = memory.get("maxmemory", 0)
    return f"{hide_password(url)}, {memory['used_memory_human']} used of {limit or 'all'} bytes"


def _check_disk(settings: Settings) -> str:
    place = settings.data_dir
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < _MIN_FREE_BYTES:
        raise CommandFailed(f"{place} has {free >> 20} MiB left, less than {_MIN_FREE_BYTES >> 20}; free some")
    return f"{free >> 30} GiB free at {place}"


def _examine_data(settings: Settings) -> list[Finding]:
    if not (settings.data_dir / "rag.sqlite3").is_file():
        return [Finding("data", True, f"{settings.data_dir} is empty: the first start fills it")]
    findings = [_run("lock", lambda: _check_lock(settings.data_dir))]
    with _open_store(settings.data_dir) as store:
        findings.append(_run("database", lambda: _check_database(store)))
        findings.append(_run("originals", lambda: _check_originals(store, settings.data_dir)))
        findings.append(_run("index", lambda: _check_index(store, settings.data_dir)))
    return findings


@contextmanager
def _open_store(data_dir: Path) -> Iterator[DocumentStore]:
    store = DocumentStore(data_dir / "rag.sqlite3")
    try:
        yield store
    finally:
        store.close()


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


def _check_index(store: DocumentStore, data_dir: Path) -> str:
    embedder = MiniLMEmbedder()
    try:
        index = FaissIndex.load(data_dir / "faiss", embedder.dim, embedder.name)
    except IndexDamaged as error:
        return f"to be rebuilt at the next start ({error})"
    behind = index.catch_up(store)
    if index.count != store.count_chunks():
        raise CommandFailed(
            f"the index has {index.count} chunks, the database {store.count_chunks()}; delete {data_dir / 'faiss'}"
        )
    return f"{index.count} chunks" + (", brought up to date" if behind else "")
