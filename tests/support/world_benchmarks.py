"""Held-out scenes of the procedural world as benchmarks, in the layouts of VLMEvalKit's TSV files
and of the Hugging Face datasets that other harnesses read."""

import random
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from flashvl.data import synthetic
from flashvl.data.synthetic.scenes import COLORS, TextScene, start_of
from flashvl.eval.tasks.catalogue import TASKS
from flashvl.eval.tasks.tsv import read_list
from tests.support.benchmarks import items_of, write_tsv
from tests.support.images import base64_of, encode

READING: tuple[synthetic.Task, ...] = ("read", "count", "chart", "arithmetic")
KINDS = {"read": "a sign", "count": "shapes", "chart": "a bar chart", "arithmetic": "a board"}
"""What a scene of each task shows, in words that `tiny` knows."""
CATEGORIES = {
    "read": "Regular Text Recognition",
    "count": "Key Information Extraction",
    "chart": "Doc-oriented VQA",
    "arithmetic": "Handwritten Mathematical Expression Recognition",
}
LETTERS = "ABCD"


def picture_of(sample: synthetic.Sample) -> str:
    """The PNG as base64."""
    return base64_of(encode(sample.image()))


def write_ocrbench(path: Path, count: int) -> Path:
    """`count` questions whose answers stand in the picture, or are one step away."""
    rows = []
    for index, drawn in enumerate(synthetic.samples("heldout", 14, count, READING)):
        turn = random.Random(index).choice(drawn.turns)
        row = {
            "index": index,
            "question": turn.question,
            "answer": str([turn.answer, f"no {turn.answer}"]),
            "category": CATEGORIES[turn.task],
            "dataset": "HME100k" if turn.task == "arithmetic" else "world",
            "image": picture_of(drawn),
        }
        rows.append(row)
    return write_tsv(path, rows)


def rotations(index: int, options: list[str], right: str, **row: Any) -> list[dict[str, Any]]:
    """A question once for each rotation of its options; all but the first refer to its image."""
    found = []
    for turn in range(len(options)):
        turned = options[turn:] + options[:turn]
        new = row | {"index": index + 1_000_000 * turn, "answer": LETTERS[turned.index(right)]}
        if turn:
            new["image"] = str(index)
        found.append(new | dict(zip(LETTERS, turned, strict=False)))
    return found


def write_mmbench(path: Path, count: int) -> Path:
    """Two questions about each of `count` scenes: what it is, with options whose words are those of
    `tiny`, and a question of the world, which `tiny` sometimes answers with nothing at all when
    options come with it."""
    rows = []
    for number, drawn in enumerate(synthetic.samples("heldout", 15, count, READING)):
        rng = random.Random(number)
        turn = rng.choice(drawn.turns)
        row = {"category": turn.task, "l2-category": "world", "split": "dev"}
        row["image"] = picture_of(drawn)
        kinds = rng.sample([*KINDS.values()], 4)
        kind = row | {"question": "What is in the picture?", "hint": "It is a drawing."}
        rows += rotations(2 * number, kinds, KINDS[turn.task], **kind)
        others = [digit for digit in "0123456" if digit != turn.answer]
        answers = rng.sample([turn.answer, *rng.sample(others, 3)], 4)
        rows += rotations(2 * number + 1, answers, turn.answer, **row, question=turn.question)
    # As in MMBench, all questions come before their rotations.
    return write_tsv(path, sorted(rows, key=lambda row: row["index"]))


def write_letters(path: Path, count: int) -> Path:
    """Signs with one letter, which is one of the options' letters in each rotation: the model
    answers a letter, though it does not know what options are."""
    rng = random.Random(16)
    rows = []
    for index in range(count):
        letter = LETTERS[index % 4]
        sign = TextScene("sign", letter, start_of(1, rng), rng.choice([*COLORS]))
        size = rng.randrange(96, 161, 8)
        drawn = synthetic.Sample(sign, (), style_seed=rng.getrandbits(32), size=size)
        row = {"question": "What does the sign say?", "image": picture_of(drawn)}
        options = ["of a cat", "of a dog", "of a fish", "of a bird"]
        rows += rotations(index, options, options[0], category="letters", split="dev", **row)
    return write_tsv(path, rows)


def write_dataset(name: str, tsv: Path, folder: Path) -> Path:
    """A benchmark's TSV as the folder of a Hugging Face dataset."""
    folder.mkdir()
    items, dead = items_of(TASKS[name], tsv)
    assert not dead
    image = [{"bytes": item.images[0], "path": None} for item in items]
    if name == "ocrbench":
        split, columns = "test", ("question", "dataset", "category", "answer")
    else:
        split, columns = "dev", ("index", "question", "category", "answer", *LETTERS)
    table: dict[str, list[Any]] = {
        column: [item.fields[column] for item in items] for column in columns
    }
    if name == "ocrbench":
        table["question_type"] = table.pop("category")
        table["answer"] = [read_list(answer) for answer in table["answer"]]
    dataset = Dataset.from_dict(table | {"image": image}).cast_column("image", Image())
    dataset.to_parquet(folder / f"{split}.parquet")
    files = f"  data_files:\n  - split: {split}\n    path: {split}.parquet\n"
    config = "default" if name == "ocrbench" else "en"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n{files}---\n")
    return folder
