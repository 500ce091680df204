"""Ablation on one CPU core: trains four ratios of attention to Mamba layers on the same data, to compare their copying.

The models differ only in which of their eight layers are attention; no positional encoding, no experts, float32. Row
lengths grow up to `--length`, because copying emerges early only with few candidates. An interrupted run resumes at its
last save and draws the same rows. Purpose and results: docs/small-model.md.
Run: `python -m model.train.ablation 1:7 --out DIR`. Source: Jamba (arXiv 2403.19887), section 6.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor

from model.config import JambaConfig
from model.jamba import Jamba
from model.train.forward import forward_hidden
from model.train.lookups import Language
from model.train.losses import vocabulary_loss
from model.train.trainer import Cluster, Log, MasterOptimizer, cosine

LAYERS = 8
ATTENTION = {"mamba": (LAYERS + 1, LAYERS), "1:7": (8, 4), "1:3": (4, 2), "attention": (1, 0)}  # period, offset
SHORTEST = 64
QUESTIONS = 12  # per row, if they fit
TEXT_WEIGHT = 0.02  # loss weight of documents and questions; answers have 1


def build(mixture: str, vocab_size: int) -> Jamba:
    """About 0.36 million parameters for every mixture: attention and Mamba layers are of equal size here."""
    period, offset = ATTENTION[mixture]
    config = JambaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, attn_layer_period=period, attn_layer_offset=offset, num_experts=1, num_experts_per_tok=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_d_conv=4, mamba_expand=1, mamba_dt_rank=8,
        mamba_conv_bias=True, mamba_proj_bias=False, rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Jamba(config)
    start_weights(model)
    return model


@torch.no_grad()
def start_weights(model: Jamba) -> None:
    """Initialize output projections small relative to the embedding, so that token identity survives to be copied."""
    model.embed_tokens.weight.normal_(std=model.config.hidden_size**-0.5)
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            parameter.normal_(std=0.02 / (2 * LAYERS) ** 0.5)


def saved_masters(folder: Path, mixture: str) -> Path:
    return folder / f"{mixture.replace(':', '-')}.safetensors"


def draw_batch(language: Language, step: int, share: float, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Rows of one length for this step, the same in every run: ids (b, t) and their loss weights (b, t)."""
    rng = random.Random(args.seed * 1_000_003 + step)
    longest = SHORTEST * (args.length / SHORTEST) ** min(1.0, share / args.grow_until)
    length = max(SHORTEST, int(longest * rng.choice((0.5, 1.0, 1.0))))
    ids = torch.zeros(max(1, args.tokens_a_step // length), length, dtype=torch.int64)
    weights = torch.zeros(ids.shape)
    for line, weight in zip(ids, weights, strict=True):
        row = language.draw(rng, length, idle=rng.choice((0.0, 0.3, 0.6, 0.9)), questions=min(QUESTIONS, length // 28))
        line[: len(row.ids)] = torch.tensor(row.ids)
        weight[: len(row.ids)] = TEXT_WEIGHT
        for start, end in row.answers:
            weight[start:end] = 1.0
    return ids, weights


def loss_of(model: Jamba, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The training loss, and the mean cross entropy of answer tokens in nats, detached."""
    hidden, _ = forward_hidden(model, ids[:, :-1])
    targets, weights = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    none = torch.zeros_like(weights)
    loss, _, ce = vocabulary_loss(hidden, model.lm_head.weight, None, None, targets, none, weights)
    return loss / weights.sum(), ce[weights == 1].mean()


def train(mixture: str, args: argparse.Namespace, stop_at: int | None = None) -> None:
    """Train one mixture on `args.tokens` tokens, resuming from its last save; `stop_at`: step to stop at early."""
    language, cluster = Language(), Cluster()
    model = build(mixture, len(language.words))
    optimizer = MasterOptimizer(model, lambda name: 1.0, weight_decay=0.05, dtype=torch.float32, muon=True)
    saved = saved_masters(args.out, mixture)
    log = Log(saved.with_suffix(".jsonl"), cluster)
    step = optimizer.load_resumable(saved) if saved.exists() else 0
    losses, steps = [], args.tokens // args.tokens_a_step
    while step < min(steps, stop_at or steps):
        share = step / steps
        loss, answers = loss_of(model, *draw_batch(language, step, share, args))
        loss.backward()
        norm = optimizer.step(cosine(args.rate, step, share, warmup=50))
        losses.append(answers)
        step += 1
        if step % 50 == 0 or step == steps:
            recent, losses = torch.stack(losses).mean().item(), []
            log.write(stage="ablation", mixture=mixture, step=step, tokens=step * args.tokens_a_step, answer=recent,
                      norm=norm.item())  # fmt: skip
        if step % args.save_every == 0 or step == steps:
            optimizer.save_resumable(saved, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mixtures", nargs="+", choices=list(ATTENTION))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--tokens-a-step", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512, help="tokens in the longest rows")
    parser.add_argument("--grow-until", type=float, default=0.7, help="share of steps until rows reach --length")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for mixture in args.mixtures:
        train(mixture, args)


if __name__ == "__main__":
    main()
