"""Long-context retrieval of a checkpoint: tasks modelled on RULER, from 4K to 256K tokens.

Tasks: `single` needle at a depth, `multi_value` (several needles of one key), `multi_key` (one among look-alikes),
`variables` (a chain of assignments), `aggregation` (the most frequent words), `qa` (a fact among facts of its kind).
The score is RULER's: the share of the expected strings that occur in the answer. Texts are generated from a seed.
Run: `python -m bench.ruler --lengths 4096 8192 --picture depth.png`. Source: Hsieh et al., RULER, 2404.06654.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from app.setting_groups import SHIPPED_CHECKPOINT
from bench.asking import Asker, open_asker
from bench.runs import BenchRun

LENGTHS = (4_096, 8_192, 16_384, 32_768, 65_536, 131_072, 262_144)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_PROMPT_TOKENS = 1024  # for everything except the text: question, format and answer
_SUBJECTS = [
    "river",
    "harbour",
    "market",
    "garden",
    "museum",
    "bridge",
    "station",
    "library",
    "orchard",
    "valley",
    "tower",
    "canal",
]
_VERBS = [
    "opens",
    "closes",
    "rests",
    "waits",
    "changes",
    "shines",
    "fills",
    "empties",
    "grows",
    "turns",
    "settles",
    "returns",
]
_TIMES = [
    "at dawn",
    "in spring",
    "after the rain",
    "before the feast",
    "on quiet days",
    "when the wind falls",
    "every autumn",
]
_WORDS = [
    "amber",
    "cobalt",
    "walnut",
    "pepper",
    "marble",
    "velvet",
    "copper",
    "saffron",
    "thistle",
    "juniper",
    "falcon",
    "heron",
]
_PLACES = [
    "Torvald",
    "Hestholm",
    "Mireaux",
    "Kalsund",
    "Ardnish",
    "Bellavia",
    "Ostrova",
    "Lindmark",
    "Queral",
    "Vasteria",
    "Nyborg",
    "Falkirk",
]
_NAMES = [
    "Mina Osei",
    "Arno Pietsch",
    "Lucia Ferrand",
    "Tomas Vik",
    "Hana Sato",
    "Piet Maas",
    "Rosa Ilves",
    "Ivo Kern",
    "Ada Blom",
]


@dataclass(frozen=True, slots=True)
class Sample:
    """`expected` strings occur in `text`; `depth`: relative position of the needle, 0 to 1, None for several."""

    task: str
    text: str
    question: str
    expected: tuple[str, ...]
    depth: float | None = None


def score(answer: str, expected: Sequence[str]) -> float:
    """Share of the expected strings that occur in the answer, ignoring case."""
    return sum(one.lower() in answer.lower() for one in expected) / len(expected)


def fill(rng: random.Random, needles: Sequence[tuple[float, str]], tokens: int, count: Callable[[str], int]) -> str:
    """At most about `tokens` tokens of filler, with each needle (depth, sentence) inserted at its depth."""
    per_sentence = count(" ".join(_idle(rng) for _ in range(200))) / 200
    room = tokens - count(" ".join(text for _, text in needles))
    idle = [_idle(rng) for _ in range(max(1, int(0.97 * room / per_sentence)))]
    while True:
        sentences = list(idle)
        places = [(round(depth * len(idle)), i, text) for i, (depth, text) in enumerate(needles)]
        for place, _, text in sorted(places, reverse=True):
            sentences.insert(place, text)
        filled = "\n\n".join(" ".join(sentences[i : i + 8]) for i in range(0, len(sentences), 8))
        if (extra := count(filled) - tokens) <= 0 or not idle:
            return filled
        del idle[-1 - int(extra / per_sentence) :]


def _idle(rng: random.Random) -> str:
    return f"The {rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_TIMES)}."


def _needle(key: str, value: int) -> str:
    return f"The special magic number for {key} is {value}."


def make_single(rng: random.Random, tokens: int, count: Callable[[str], int], depth: float) -> Sample:
    key, value = rng.choice(_WORDS), rng.randint(1_000_000, 9_999_999)
    text = fill(rng, [(depth, _needle(key, value))], tokens, count)
    return Sample("single", text, f"What is the special magic number for {key}?", (str(value),), depth)


def make_multi_value(rng: random.Random, tokens: int, count: Callable[[str], int]) -> Sample:
    key, values = rng.choice(_WORDS), rng.sample(range(1_000_000, 9_999_999), 4)
    text = fill(rng, [(rng.random(), _needle(key, value)) for value in values], tokens, count)
    return Sample("multi_value", text, f"What are all the special magic numbers for {key}?", tuple(map(str, values)))


def make_multi_key(rng: random.Random, tokens: int, count: Callable[[str], int]) -> Sample:
    keys = [f"{one}-{other}" for one in _WORDS for other in _WORDS if one != other]
    chosen = rng.sample(keys, min(len(keys), max(4, tokens // 512)))
    values = rng.sample(range(1_000_000, 9_999_999), len(chosen))
    needles = [(rng.random(), _needle(key, value)) for key, value in zip(chosen, values, strict=True)]
    text = fill(rng, needles, tokens, count)
    return Sample("multi_key", text, f"What is the special magic number for {chosen[0]}?", (str(values[0]),))


def make_variables(rng: random.Random, tokens: int, count: Callable[[str], int]) -> Sample:
    names = [f"VAR{number}" for number in rng.sample(range(10_000, 99_999), 5)]
    value = rng.randint(10_000, 99_999)
    said = [f"{names[0]} = {value}."] + [f"{new} = {old}." for old, new in pairwise(names)]
    depths = sorted(rng.random() for _ in said)  # each assignment comes after the one it depends on
    text = fill(rng, list(zip(depths, said, strict=True)), tokens, count)
    return Sample("variables", text, f"Which variables have the value {value}?", tuple(names))


def make_aggregation(rng: random.Random, tokens: int, count: Callable[[str], int]) -> Sample:
    words = rng.sample(_WORDS, len(_WORDS))
    common, rare = words[:3], words[3:]

    def draw_words(number: int) -> list[str]:
        return [rng.choice(common) if rng.random() < 0.75 else rng.choice(rare) for _ in range(number)]

    per_word = max(1.0, count(" ".join(draw_words(300))) / 300)  # of these three: all others may be shorter
    listed = draw_words(int(0.95 * tokens / per_word))
    while True:
        text = "\n".join(" ".join(listed[i : i + 20]) for i in range(0, len(listed), 20))
        if (size := count(text)) <= tokens or not listed:
            break
        del listed[int(len(listed) * tokens / size) :]
    return Sample("aggregation", text, "Which three words stand here most often?", tuple(common))


def make_qa(rng: random.Random, tokens: int, count: Callable[[str], int]) -> Sample:
    places = [f"{one} {other}" for one in _PLACES for other in ("archive", "school", "museum", "mill")]
    chosen = rng.sample(places, min(len(places), max(4, tokens // 1024)))
    heads = [f"{rng.choice(_NAMES)} {rng.choice('ABCDEFGHIJKLM')}{i}" for i in range(len(chosen))]
    said = [f"Since last year the {place} has been led by {head}." for place, head in zip(chosen, heads, strict=True)]
    text = fill(rng, [(rng.random(), one) for one in said], tokens, count)
    return Sample("qa", text, f"Who leads the {chosen[0]}?", (heads[0],))


TASKS: dict[str, Callable[[random.Random, int, Callable[[str], int]], Sample]] = {
    "multi_value": make_multi_value,
    "multi_key": make_multi_key,
    "variables": make_variables,
    "aggregation": make_aggregation,
    "qa": make_qa,
}


def make_samples(tasks: Sequence[str], length: int, repeats: int, count: Callable[[str], int]) -> list[Sample]:
    """Samples whose prompts have at most `length` tokens; `single` once for each depth and repeat."""
    tokens, samples = length - _PROMPT_TOKENS, []
    for repeat in range(repeats):
        for task in tasks:
            rng = random.Random(f"{task} {length} {repeat}")
            if task == "single":
                samples += [make_single(rng, tokens, count, depth) for depth in DEPTHS]
            else:
                samples.append(TASKS[task](rng, tokens, count))
    return samples


def draw(rows: Sequence[dict], path: Path) -> None:
    """Plot the score of `single` by depth and length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({row["length"] for row in rows})
    cells = {(row["depth"], row["length"]): row["score"] for row in rows}
    figure, axes = pyplot.subplots(figsize=(1.2 + len(lengths), 3.6), layout="constrained")
    image = axes.imshow(
        [[cells.get((depth, length), float("nan")) for length in lengths] for depth in DEPTHS],
        cmap="RdYlGn",
        vmin=0,
        vmax=1,
        aspect="auto",
    )
    axes.set_xticks(range(len(lengths)), [f"{length // 1024}K" for length in lengths])
    axes.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
    axes.set(xlabel="tokens of the prompt", ylabel="depth of the needle", title="A single needle: found")
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def measure(asker: Asker, tasks: Sequence[str], lengths: Sequence[int], repeats: int, run: BenchRun) -> None:
    """Ask all questions; one row per task, length and depth."""
    for length in lengths:
        found: dict[tuple[str, float | None], list[tuple[float, float]]] = {}
        for sample in make_samples(tasks, length, repeats, asker.count_tokens):
            reply = asker.ask(sample.question, sample.text, max_new_tokens=128)
            result = (score(reply.text, sample.expected), reply.seconds)
            found.setdefault((sample.task, sample.depth), []).append(result)
        for (task, depth), results in found.items():
            scores, seconds = zip(*results, strict=True)
            run.add(
                **{"task": task, "length": length, "depth": depth, "samples": len(results)},
                **{"score": sum(scores) / len(scores), "seconds": sum(seconds) / len(seconds)},
            )
            print(run.rows[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SHIPPED_CHECKPOINT)
    parser.add_argument("--quantize", choices=("auto", "none", "int8", "w8a8"), default="auto")
    parser.add_argument("--tasks", nargs="+", choices=("single", *TASKS), default=["single", *TASKS])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=5, help="samples of each task, length and depth")
    parser.add_argument("--picture", type=Path, help="PNG of depth and length")
    args = parser.parse_args()
    run = BenchRun("ruler", sys.argv)
    with open_asker(args.model, max(args.lengths), args.quantize, max_quotes=5) as asker:
        measure(asker, args.tasks, args.lengths, args.repeats, run)
    if args.picture:
        draw([row for row in run.rows if row["task"] == "single"], args.picture)
    run.finish()


if __name__ == "__main__":
    main()
