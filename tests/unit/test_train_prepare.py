"""What a training run starts from: questions that know their gold passage, and an archive that comes back whole."""

import json
import random
import subprocess
from pathlib import Path

import pytest

from model.train import items, prepare


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    near = [{"id": i, "source": "s", "doc": "d", "title": f"t{i}", "text": f"near {i}"} for i in range(12)]
    write_lines(tmp_path / "passages_dev.jsonl", near)
    pair = {"source": "s", "doc": "a/b.html", "title": "", "negatives": list(range(12))}
    rows = [pair | {"question": f"Q{i}?", "answer": f"gold {i}", "passage": f"It is gold {i}."} for i in range(5)]
    return write_lines(tmp_path / "pairs_dev.jsonl", rows)


def test_made_questions_know_where_their_answer_stands(pairs: Path) -> None:
    made = list(items.made_items(pairs, 3, seed=1))
    assert {item["set"] for item in made} == {"dev1", "dev3", "dev8", "devnone3", "devnone8"}
    for item in made:
        family, size = item["set"].rstrip("0123456789"), int(item["set"][-1])
        assert len(item["passages"]) == size == len({text for _, text in item["passages"]})
        if family == "dev":
            assert item["answer"] in item["passages"][item["gold"]][1]
        else:
            assert item["answer"] is None and item["gold"] is None
            assert all(text.startswith("near") for _, text in item["passages"])


def test_a_near_miss_keeps_the_passage_it_was_written_on(tmp_path: Path) -> None:
    others = [{"title": "", "doc": "o", "text": f"other {i}"} for i in range(11)]
    row = {"question": "Q?", "title": "T", "doc": "d", "passage": "written on", "distractors": others}
    hand = write_lines(tmp_path / "hand.jsonl", [row | {"answer": None}, row | {"answer": "written"}])
    for item in items.hand_items(hand, seed=2):
        assert item["set"].startswith("handnone" if item["answer"] is None else "hand")
        assert ["T", "written on"] in [list(passage) for passage in item["passages"]]


def test_what_is_sent_comes_back_whole_and_without_what_it_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "PIECE_BYTES", 30_000)
    content = random.Random(0).randbytes(100_000)
    made = tmp_path / "made"
    names = ("teacher/part-0", "tokenizer/tokenizer.json", "corpora/corpus-00.jsonl.xz", "corpora/parts/a.jsonl",
             "corpora/held_out/b.jsonl", "pairs/pairs_train.jsonl", "pairs/pairs_dev.jsonl", "items.jsonl")  # fmt: skip
    for name in names:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content if name == "teacher/part-0" else name.encode())
    prepare.Preparation(made, tmp_path / "pairs.jsonl", workers=1).pack()
    pieces = sorted((made / "send").glob("*/bundle.*"))
    assert len(pieces) > 3 and all(piece.stat().st_size <= 30_000 for piece in pieces)
    there = tmp_path / "there"
    there.mkdir()
    joined = b"".join(piece.read_bytes() for piece in pieces)
    subprocess.run(["tar", "xJ"], cwd=there, input=joined, check=True)
    assert (there / "teacher/part-0").read_bytes() == content
    back = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert back == {name for name in names if not name.startswith(("corpora/parts", "corpora/held", "pairs/pairs_dev"))}


def test_a_step_whose_output_is_there_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for written, _ in prepare.STEPS[:-1]:
        (tmp_path / written).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / written).write_text("kept")
    (tmp_path / "teacher" / "part-0.safetensors").write_text("kept")
    monkeypatch.setattr("sys.argv", ["prepare", "--out", str(tmp_path), "--pairs", "nowhere.jsonl"])
    prepare.main()
    assert (tmp_path / "send" / "complete").exists()
    assert capsys.readouterr().out.count("there already") == len(prepare.STEPS) - 1
