"""Fine-tunes the retrieval models: LoRA adapters of all-MiniLM-L6-v2, as embedder and as reranker.

    python -m model.train.search_adapters --base DIR --data DIR --out DIR --seconds 40 50

`--base` holds config.json, tokenizer.json and model.safetensors (or .safetensors.xz), `--data` the output of
model.train.pairs (.jsonl or .jsonl.xz). The embedder is trained with InfoNCE, with in-batch and hard negatives; the
reranker, a cross-encoder, with cross entropy over a passage and its negatives. The learning rate decays with elapsed
time. Sources: LoRA (arXiv 2106.09685); sentence-transformers, MultipleNegativesRankingLoss. Start at `main`.
"""

from __future__ import annotations

import argparse
import functools
import json
import lzma
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import BertConfig, BertModel

from model.train.search_data import QUESTION_TOKENS, SearchData

SCALE = 20.0  # of cosines: 1 / temperature, as all-MiniLM-L6-v2 was trained
GROUP_TOKENS = 65_536  # padded tokens per forward pass
WARM_UP = 0.05  # share of the time
NDCG_DEPTH = 10
MINED = 24  # nearest passages by the tuned embedder; those without the answer become negatives


@dataclass(frozen=True, slots=True)
class Plan:
    """Training plan of one adapter; ends after `seconds` or `steps`, whichever comes first."""

    rank: int
    rate: float
    seconds: float
    steps: int
    batch: int  # questions per step
    negatives: int  # hard negatives per question and step
    share: float = 1.0  # of the update that is kept, see `shrink`


class LowRank(nn.Module):
    """Adds B·A to a weight matrix, in float32, rounded to the weight's dtype."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(torch.randn(rank, columns, device=weight.device) / math.sqrt(columns))
        self.B = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight.float() + self.B @ self.A).to(weight.dtype)


def add_low_rank(model: nn.Module, rank: int) -> None:
    """Freeze the model and add a trainable update of that rank to every linear layer of its encoder, in place."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "encoder.layer." in name:
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank), unsafe=True)


@torch.no_grad()
def shrink(model: nn.Module, share: float) -> None:
    """Scale the update by `share`, interpolating with the base weights to forget less. Source: arXiv 2109.01903."""
    for module in model.modules():
        if isinstance(module, LowRank):
            module.B *= share


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`WEIGHT.A` and `WEIGHT.B` by checkpoint name, and all other trained parameters, in bfloat16."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.replace("parametrizations.weight.0.", "weight.").removeprefix("bert.")
            found[name] = parameter.detach().to("cpu", torch.bfloat16).contiguous()
    return found


class CrossEncoder(nn.Module):
    """A BERT over question and passage together, with a score from the [CLS] state.

    Like `BertForSequenceClassification`, but with the head always in float32.
    """

    def __init__(self, bert: BertModel, head: nn.Linear) -> None:
        super().__init__()
        self.bert, self.pooler, self.classifier = bert, nn.ModuleDict({"dense": head}), nn.Linear(head.out_features, 1)

    def forward(self, **inputs: Tensor) -> Tensor:
        """(n,) float32."""
        first = self.bert(**inputs).last_hidden_state[:, 0].float()
        return self.classifier(self.pooler["dense"](first).tanh())[:, 0]


@functools.cache
def read_weights(base: Path) -> dict[str, Tensor]:
    packed = base / "model.safetensors.xz"
    return load(lzma.decompress(packed.read_bytes()) if packed.exists() else (base / packed.stem).read_bytes())


def load_base(folder: Path, device: torch.device, scores: bool = False) -> BertModel | CrossEncoder:
    """The model, bfloat16 on a GPU, else float32; `scores`: as a cross-encoder with the checkpoint's pooler as head."""
    config = BertConfig.from_json_file(folder / "config.json")
    config._attn_implementation = "sdpa"
    weights = dict(read_weights(folder))
    head = nn.Linear(config.hidden_size, config.hidden_size)
    for name, tensor in head.state_dict().items():
        tensor.copy_(weights.pop(f"pooler.dense.{name}", tensor))
    weights.pop("embeddings.position_ids", None)
    bert = BertModel(config, add_pooling_layer=False)
    bert.load_state_dict(weights)
    bert.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = CrossEncoder(bert, head).to(device) if scores else bert
    return model.eval()  # no dropout


def in_groups(rows: Sequence[Sequence[int]], limit: int = GROUP_TOKENS) -> Iterator[list[int]]:
    """Indices of the rows, longest first, in groups of at most `limit` padded tokens."""
    group: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: -len(rows[place])):
        if group and (len(group) + 1) * len(rows[group[0]]) > limit:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def run_groups(
    rows: Sequence[Sequence[int]], forward: Callable[[list[int], Tensor], Tensor], device: torch.device
) -> Tensor:
    """Results of `forward(indices, ids)` in the order of the rows; ids (n, longest) are zero-padded on the right."""
    groups, parts = list(in_groups(rows)), []
    for group in groups:
        longest = len(rows[group[0]])
        ids = torch.tensor([[*rows[place], *[0] * (longest - len(rows[place]))] for place in group])
        parts.append(forward(group, ids.to(device)))
    places = torch.tensor([place for group in groups for place in group], device=device)
    return torch.cat(parts)[torch.argsort(places)]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def embed(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """Mean-pooled embeddings (n, hidden), float32, unit length."""

    def forward(_: list[int], ids: Tensor) -> Tensor:
        mask = (ids != 0).long()
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weights = mask[:, :, None].float()
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    return run_groups(rows, forward, device_of(model))


def score(model: nn.Module, questions: Sequence[list[int]], passages: Sequence[list[int]]) -> Tensor:
    """(n,) float32: how well passage i answers question i."""
    rows = [question + passage[1:] for question, passage in zip(questions, passages, strict=True)]

    def forward(places: list[int], ids: Tensor) -> Tensor:
        lengths = torch.tensor([len(questions[place]) for place in places], device=ids.device)
        second = (torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]) & (ids != 0)
        return model(input_ids=ids, attention_mask=(ids != 0).long(), token_type_ids=second.long())

    return run_groups(rows, forward, device_of(model))


Loss = Callable[[nn.Module, SearchData, list[int], int, random.Random], tuple[Tensor, Tensor]]


def embedder_loss(
    model: nn.Module, data: SearchData, chosen: list[int], negatives: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """InfoNCE over in-batch and hard negatives, duplicates of the gold passage masked; and the accuracy."""
    near = [place for i in chosen for place in rng.sample(data.near[i], min(negatives, len(data.near[i])))]
    places = [*(data.gold[i][0] for i in chosen), *near]
    vectors = embed(model, [*data.ask(chosen, rng), *(data.passage(place, rng) for place in places)])
    scores = SCALE * vectors[: len(chosen)] @ vectors[len(chosen) :].T
    target = torch.arange(len(chosen), device=scores.device)
    column = torch.tensor(places, device=scores.device)
    copy = column[None] == column[: len(chosen), None]
    copy[target, target] = False
    scores = scores.masked_fill(copy, -torch.inf)
    return F.cross_entropy(scores, target), (scores.argmax(1) == target).float().mean()


def reranker_loss(
    model: nn.Module, data: SearchData, chosen: list[int], negatives: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the gold passage among hard negatives and another question's passage; and the accuracy."""
    questions, passages = [], []
    for asked, i, other in zip(data.ask(chosen, rng), chosen, [*chosen[1:], chosen[0]], strict=True):
        near = rng.choices(data.near[i] or data.gold[other], k=negatives)
        places = [data.gold[i][0], *near, data.gold[other][0]]
        questions += [asked] * len(places)
        passages += [data.passage(place, rng) for place in places]
    scores = score(model, questions, passages).view(len(chosen), -1)
    target = torch.zeros(len(chosen), dtype=torch.long, device=scores.device)
    return F.cross_entropy(scores, target), (scores.argmax(1) == target).float().mean()


def train(model: nn.Module, data: SearchData, loss_of: Loss, plan: Plan) -> None:
    """Train the parameters that are not frozen, in place; prints a line every ten steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, weight_decay=0.01, betas=(0.9, 0.98))
    rng = random.Random(0)
    batches = data.batches(plan.batch, rng)
    start = time.monotonic()
    for step in range(1, plan.steps + 1):
        share = max((time.monotonic() - start) / plan.seconds, (step - 1) / plan.steps)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * min(1.0, (share + 1e-3) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))
        with parametrize.cached():
            loss, right = loss_of(model, data, next(batches), plan.negatives, rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 10 == 0 or step <= 3:
            print(f"step {step}, {time.monotonic() - start:.1f} s: loss {loss:.4f}, {right:.1%} right", flush=True)


@torch.inference_mode()
def embed_all(model: nn.Module, data: SearchData) -> tuple[Tensor, Tensor]:
    """Vectors of the original questions, and of the passages."""
    with parametrize.cached():
        return embed(model, data.encode(data.questions, QUESTION_TOKENS)), embed(model, data.passages)


def measure_embedder(model: nn.Module, data: SearchData) -> dict[str, float]:
    """nDCG@10 over all passages of the split, also per kind of question if there are at most four."""
    questions, passages = embed_all(model, data)
    best = (questions @ passages.T).topk(min(NDCG_DEPTH, len(passages)), dim=1).indices.tolist()
    gains = [ndcg(ranking, gold) for ranking, gold in zip(best, data.gold, strict=True)]
    found = {"ndcg": sum(gains) / len(gains)}
    if len(kinds := sorted(set(data.kinds))) <= 4:
        for kind in kinds:
            of_kind = [gain for gain, its in zip(gains, data.kinds, strict=True) if its == kind]
            found[kind] = sum(of_kind) / len(of_kind)
    return {key: round(value, 4) for key, value in found.items()}


def ndcg(ranking: Sequence[int], gold: Sequence[int]) -> float:
    """nDCG@10 of a ranking, best first, with binary relevance."""
    gain = sum(1 / math.log2(rank + 2) for rank, place in enumerate(ranking) if place in gold)
    return gain / sum(1 / math.log2(rank + 2) for rank in range(min(NDCG_DEPTH, len(gold))))


@torch.inference_mode()
def measure_reranker(model: nn.Module, data: SearchData) -> dict[str, float]:
    """Accuracy at 1 and mean reciprocal rank of the gold passage among its hard negatives."""
    asked = data.encode(data.questions, QUESTION_TOKENS)
    groups = [[data.gold[i][0], *data.near[i]] for i in range(len(asked))]
    questions = [question for question, group in zip(asked, groups, strict=True) for _ in group]
    with parametrize.cached():
        scores = score(model, questions, [data.passages[place] for group in groups for place in group])
    ranks = [1 + int((part[1:] >= part[0]).sum()) for part in scores.cpu().split([len(group) for group in groups])]
    first = sum(rank == 1 for rank in ranks) / len(ranks)
    return {"first": round(first, 4), "mrr": round(sum(1 / rank for rank in ranks) / len(ranks), 4)}


def add_nearest(model: nn.Module, data: SearchData) -> None:
    """Add the embedder's nearest passages that do not contain the answer to each question's hard negatives."""
    questions, passages = embed_all(model, data)
    lower = [text.lower() for text in data.texts]
    for start in range(0, len(questions), 4096):
        scores = questions[start : start + 4096] @ passages.T
        for i, places in enumerate(scores.topk(min(MINED, len(passages)), dim=1).indices.tolist(), start):
            answer, known = data.answers[i].lower(), {*data.near[i], *data.gold[i]}
            data.near[i] += [place for place in places if place not in known and answer not in lower[place]]


def tune_embedder(
    base: Path, device: torch.device, data: SearchData, tests: dict[str, SearchData], plans: Sequence[Plan], out: Path
) -> nn.Module:
    """Train an adapter for each plan; returns the model that is best on the first of `tests`, possibly the base."""
    models = {"base": load_base(base, device)}
    found = {"base": {name: measure_embedder(models["base"], test) for name, test in tests.items()}}
    print(json.dumps({"embedder": "base", **found["base"]}), flush=True)
    for plan in plans:
        name = f"embedder-{plan.rate:g}"
        models[name] = load_base(base, device)
        torch.manual_seed(0)
        add_low_rank(models[name], plan.rank)
        train(models[name], data, embedder_loss, plan)
        shrink(models[name], plan.share)
        save_file(adapter_tensors(models[name]), out / f"{name}.safetensors")
        found[name] = {test: measure_embedder(models[name], split) for test, split in tests.items()}
        print(json.dumps({"embedder": name, **found[name]}), flush=True)
    return models[max(found, key=lambda name: next(iter(found[name].values()))["ndcg"])]


def tune_reranker(
    base: Path, device: torch.device, data: SearchData, tests: dict[str, SearchData], plan: Plan, out: Path
) -> None:
    torch.manual_seed(0)
    model = load_base(base, device, scores=True)
    add_low_rank(model, plan.rank)
    for module in (model.pooler, model.classifier):
        module.requires_grad_(True)
    train(model, data, reranker_loss, plan)
    save_file(adapter_tensors(model), out / "reranker.safetensors")
    found = {name: measure_reranker(model, test) for name, test in tests.items() if any(test.near)}
    print(json.dumps({"reranker": plan.rate, **found}), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--splits", nargs="+", default=["dev"], help="to evaluate on; the first selects the embedder")
    parser.add_argument("--seconds", type=float, nargs=2, default=[40, 50], help="for the embedders, for the reranker")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3], help="of the embedders, one adapter each")
    parser.add_argument("--share", type=float, default=0.5, help="of an embedder's update that is kept")
    parser.add_argument("--reranker-rate", type=float, default=1e-3)
    parser.add_argument("--ranks", type=int, nargs=2, default=[32, 64], help="of the embedders, of the reranker")
    parser.add_argument("--batches", type=int, nargs=2, default=[512, 64], help="questions per step, likewise")
    parser.add_argument("--negatives", type=int, nargs=2, default=[2, 6], help="hard negatives per question, likewise")
    parser.add_argument("--steps", type=int, default=100_000, help="maximum steps of each")
    parser.add_argument("--limit", type=int, help="use only this many pairs, for a trial")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(args.base / "tokenizer.json"))
    data = SearchData(args.data, "train", tokenizer, args.limit)
    tests = {split: SearchData(args.data, split, tokenizer, args.limit) for split in args.splits}
    print(f"{len(data.questions)} questions, {len(data.passages)} passages, on {device}", flush=True)
    options = list(zip(args.ranks, args.batches, args.negatives, strict=True))
    plans = [
        Plan(rank, rate, seconds, args.steps, batch, negatives, share)
        for (rank, batch, negatives), rate, seconds, share in [
            *((options[0], rate, args.seconds[0] / len(args.rates), args.share) for rate in args.rates),
            (options[1], args.reranker_rate, args.seconds[1], 1.0),
        ]
    ]
    embedder = tune_embedder(args.base, device, data, tests, plans[:-1], args.out)
    add_nearest(embedder, data)
    tune_reranker(args.base, device, data, tests, plans[-1], args.out)


if __name__ == "__main__":
    main()
