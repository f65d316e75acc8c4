"""Small data sets in the layouts of the published ones, with rows that cannot be used among them.

Each function writes one, and tells what a conversion must say of each row: the reason of a dead
letter, or the first question and answer.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flashvl.data.convert.problems import INSTRUCTION
from tests.support.jobs import picture, write_tar

JPEG = [picture(seed, "JPEG") for seed in range(8)]
CUT = JPEG[0][: len(JPEG[0]) // 2]
"""A JPEG whose pixels are cut off."""

Expected = dict[int, str | tuple[str, ...]]
"""By row: a part of a dead letter's step and reason, or the contents of all messages."""


def turns(*texts: str, roles: tuple[str, str] = ("human", "gpt")) -> list[dict[str, str]]:
    return [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]


def write_infinity(folder: Path) -> Expected:
    """Infinity-MM: tars of N.json, with N.jpg where the JSON has the key `image`."""
    rows: list[tuple[dict[str, Any] | bytes | None, bytes | None, Any]] = [
        (
            {"image": "0.jpg", "conversations": turns("<image>\nWhat?", "A cat.")},
            JPEG[0],
            ("<image>\nWhat?", "A cat."),
        ),
        (
            {"image": "1.jpg", "conversations": turns("See <image> here", "Yes.", "And?", "No.")},
            JPEG[1],
            ("See <image> here", "Yes.", "And?", "No."),
        ),
        ({"conversations": turns("2+2?", "4")}, None, ("2+2?", "4")),
        (
            {
                "conversations": [{"from": "gpt", "value": "Hello."}, *turns("Who?", "I.")],
                "source": "greetings",
            },
            None,
            ("Who?", "I."),
        ),
        (
            {"conversations": [{"from": "system", "value": "Be kind."}, *turns("Hi", "Hi.")]},
            None,
            ("Be kind.", "Hi", "Hi."),
        ),
        ({"image": "5.jpg", "conversations": turns("<image>", "B")}, None, "convert: row names an"),
        ({"conversations": turns("<image>\nstray", "C")}, None, "convert: conversation holds 1"),
        ({"conversations": turns("What?", "D")}, JPEG[2], "convert: conversation holds 0"),
        ({"conversations": turns("<image>", "E")}, CUT, "decode: image cannot be decoded"),
        ({"conversations": turns("<image>", "F")}, b"no image", "decode: image is in no known"),
        (b'{"conversations": [', None, "read: record is not JSON"),
        (None, JPEG[3], "read: sample stage2/part/000000011 has an image and no JSON"),
        ({"conversations": turns("Only a question")}, None, "convert: conversation has no answer"),
        ({"conversations": [turns("a", "b")[1]]}, None, "convert: conversation has no answer"),
        (
            {"conversations": [*turns("a", "b"), {"from": "gpt", "value": "c"}]},
            None,
            "convert: turn 2 is the assistant's",
        ),
        ({"conversations": turns("a", " ")}, None, "convert: turn of the assistant is empty"),
        ({"conversations": turns("a", "b", roles=("human", "bot"))}, None, "convert: turn is from"),
        ({"conversations": "text"}, None, "convert: conversation is 'text'"),
        ({"conversations": turns("a", "<image>")}, None, "convert: <image> is in a turn that is"),
    ]
    members: dict[str, bytes] = {}
    for number, (fields, image, _) in enumerate(rows):
        key = f"stage2/part/{number:09d}"
        if isinstance(fields, dict):
            fields = json.dumps({"id": str(number), **fields}, ensure_ascii=False).encode()
        if fields is not None:
            members[f"{key}.json"] = fields
        if image is not None:
            members[f"{key}.jpg"] = image
    names = list(members)
    middle = len(names) // 2
    while names[middle].partition(".")[0] == names[middle - 1].partition(".")[0]:
        middle += 1  # a sample is in one tar
    folder.mkdir(parents=True, exist_ok=True)
    write_tar(folder / "000000.tar", {name: members[name] for name in names[:middle]})
    write_tar(folder / "000001.tar", {name: members[name] for name in names[middle:]})
    return {number: expected for number, (_, _, expected) in enumerate(rows)}


def write_llava(folder: Path) -> Expected:
    """LLaVA-1.5-665K and its kin: one JSON array, images beside it; MMDU with lists of images."""
    (folder / "images" / "coco").mkdir(parents=True)
    for number, data in enumerate([*JPEG[:3], CUT]):
        (folder / "images" / "coco" / f"{number}.jpg").write_bytes(data)
    mmdu = ("user", "assistant")
    rows: list[tuple[Any, Any]] = [
        (
            {"id": "a", "image": "coco/0.jpg", "conversations": turns("<image>\nWhat?", "\u00e9!")},
            ("<image>\nWhat?", "\u00e9!"),
        ),
        (
            {"id": "b", "conversations": turns("Poem, please.", 'A "\\] rose')},
            ("Poem, please.", 'A "\\] rose'),
        ),
        (
            {
                "id": 7,
                "image": ["/mnt/x/coco/1.jpg", "/mnt/x/coco/2.jpg"],
                "conversations": turns("<ImageHere> <ImageHere> alike?", "No.", roles=mmdu),
            },
            "read: file '",  # by its last part alone, such a path is not found below coco/
        ),
        (
            {
                "id": 8,
                "image": ["coco/1.jpg", "coco/2.jpg"],
                "conversations": turns("<ImageHere> <ImageHere> alike?", "No.", roles=mmdu),
            },
            ("<image> <image> alike?", "No."),
        ),
        (
            {"id": "c", "image": "coco/9.jpg", "conversations": turns("<image>", "x")},
            "read: file '",
        ),
        (
            {"id": "d", "image": "coco/3.jpg", "conversations": turns("<image>", "x")},
            "decode: image cannot be decoded",
        ),
        ({"id": "e", "image": 5, "conversations": turns("<image>", "x")}, "convert: image is of"),
        (
            {
                "id": "f",
                "image": ["coco/1.jpg", None],
                "conversations": turns("<image><image>", "x"),
            },
            "convert: image is null",
        ),
        ({"id": "g", "image": "coco/1.jpg"}, "convert: conversation is missing"),
        (["no", "object"], "read: record is not a JSON object"),
    ]
    (folder / "mix.json").write_text(json.dumps([row for row, _ in rows], indent=2))
    return {number: expected for number, (_, expected) in enumerate(rows)}


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""Type of Hugging Face's feature `Image`."""


def write_onevision(folder: Path) -> Expected:
    """LLaVA-OneVision: Parquet files of a configuration's folder, `image` null for text."""
    rows: list[tuple[bytes | None, list[dict[str, str]] | None, Any]] = [
        (JPEG[0], turns("<image>\nWhat?", "A."), ("<image>\nWhat?", "A.")),
        (None, turns("Text", "B."), ("Text", "B.")),
        (None, turns("<image> stray", "C."), "convert: conversation holds 1"),
        (CUT, turns("<image>", "D."), "decode: image cannot be decoded"),
        (JPEG[1], turns("What <image>?", "E."), ("What <image>?", "E.")),
        (JPEG[2], None, "convert: conversation is missing"),
    ]
    folder.mkdir(parents=True)
    table = pa.table(
        {
            "id": [f"{n}.png" for n in range(len(rows))],
            "image": pa.array(
                [None if data is None else {"bytes": data, "path": "x.png"} for data, _, _ in rows],
                IMAGE,
            ),
            "conversations": [conversation for _, conversation, _ in rows],
            "data_source": ["ai2d(gpt4v)"] * len(rows),
        }
    )
    for part in range(2):
        pq.write_table(
            table.slice(part * 3, 3),
            folder / f"train-{part:05d}-of-00002.parquet",
            row_group_size=2,
        )
    return {number: expected for number, (_, _, expected) in enumerate(rows)}


MAPPING = """
image: image
question: query
answer: label
prompt: "{question}\\nAnswer with a word."
source: chartqa
"""


def write_chartqa(folder: Path) -> Expected:
    """ChartQA as on the hub: `image`, `query`, `label` (a list), `human_or_machine`."""
    rows: list[tuple[bytes | None, str | None, list[str] | None, Any]] = [
        (
            JPEG[0],
            "How many {bars}?",
            ["4"],
            ("<image>\nHow many {bars}?\nAnswer with a word.", "4"),
        ),
        (JPEG[1], "Who?", ["B", "A", "A"], ("<image>\nWho?\nAnswer with a word.", "A")),
        (JPEG[1], "Who?", ["B", "A"], ("<image>\nWho?\nAnswer with a word.", "B")),
        (None, "Who?", ["A"], "convert: row has no image in image"),
        (JPEG[2], None, ["A"], "convert: query is missing"),
        (JPEG[2], "Who?", [], "convert: label is empty"),
        (JPEG[2], "Who?", None, "convert: label is empty"),
        (b"", "Who?", ["A"], "decode: image is empty"),
    ]
    folder.mkdir(parents=True)
    pq.write_table(
        pa.table(
            {
                "image": pa.array(
                    [None if data is None else {"bytes": data, "path": None} for data, *_ in rows],
                    IMAGE,
                ),
                "query": [query for _, query, _, _ in rows],
                "label": pa.array([label for _, _, label, _ in rows], pa.list_(pa.string())),
                "human_or_machine": [0] * len(rows),
            }
        ),
        folder / "train-00000-of-00001.parquet",
    )
    (folder / "_chartqa.yaml").write_text(MAPPING)
    return {number: expected for number, (*_, expected) in enumerate(rows)}


def write_reasoning(folder: Path) -> Expected:
    """distill_r1_110k.jsonl: only `input` and `content` are read."""
    long = {"reasoning_content": "hmm " * 50, "repo_name": "gsm8k", "score": 10}
    rows: list[tuple[Any, Any]] = [
        ({"input": "1+1?", "content": "2", **long}, ("1+1?", "2")),
        ({"input": "", "content": "2", **long}, "convert: turn of the user is empty"),
        ({"input": "1+1?", "content": None, **long}, "convert: content is missing"),
        ({"input": "Is <image> a tag?", "content": "Yes", **long}, "convert: conversation holds 1"),
        ("{broken", "read: record is not JSON"),
        ({"input": "half \ud83d", "content": "3", **long}, ("half ?", "3")),
    ]
    folder.mkdir(parents=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row, _ in rows]
    (folder / "distill_r1_110k.jsonl").write_text("\n".join(lines) + "\n\n")
    return {number: expected for number, (_, expected) in enumerate(rows)}


def rated(response: str, *ratings: str) -> dict[str, Any]:
    """An answer of VLFeedback."""
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    annotations = {
        aspect: {"Rating": rating, "Rationale": "because"}
        for aspect, rating in zip(aspects, ratings, strict=True)
    }
    return {"annotations": annotations, "model": "m", "response": response}


def write_feedback(folder: Path) -> Expected:
    """VLFeedback: vlfeedback_80k.jsonl, its images in merged_images/."""
    (folder / "merged_images").mkdir(parents=True)
    (folder / "merged_images" / "0.jpg").write_bytes(JPEG[0])
    good, bad = (
        rated("Good\u30103\u2020source\u3011.", "5", "5", "4"),
        rated("Bad.", "1", "N/A", "2"),
    )
    middle, unrated = rated("So so.", "3", "3", "3"), rated("?", "N/A", "", "high")
    rows: list[tuple[Any, Any]] = [
        (
            {"prompt": "What?", "completions": [middle, good, bad], "img_path": "0.jpg"},
            ("<image>\nWhat?", "Good.", "Bad."),
        ),
        (
            {"prompt": "What?", "completions": [unrated, middle, bad], "img_path": "0.jpg"},
            ("<image>\nWhat?", "So so.", "Bad."),
        ),
        (
            {"prompt": "What?", "completions": [middle, middle], "img_path": "0.jpg"},
            "convert: all answers are rated 3",
        ),
        (
            {"prompt": "What?", "completions": [unrated, bad], "img_path": "0.jpg"},
            "convert: 1 answers have numeric ratings",
        ),
        (
            {"prompt": "What?", "completions": [good, bad], "img_path": "9.jpg"},
            "read: file '",
        ),
        ({"prompt": "What?", "completions": "x", "img_path": "0.jpg"}, "convert: completions must"),
        ({"prompt": "What?", "completions": [good, bad]}, "convert: row has no image"),
    ]
    lines = [
        json.dumps({"id": f"v-{n}", "models": ["m"], **row}) for n, (row, _) in enumerate(rows)
    ]
    (folder / "vlfeedback_80k.jsonl").write_text("\n".join(lines))
    return {number: expected for number, (_, expected) in enumerate(rows)}


def write_problems(folder: Path) -> Expected:
    """multimodal-open-r1-8k-verified: `image, problem, solution, original_question, ...`."""
    rows: list[tuple[bytes | None, str, str, Any]] = [
        (
            JPEG[0],
            "Find x.",
            "<think>Is it <answer>?</think>\n\n<answer>x = 3\n</answer>",
            (f"<image>\nFind x.\n{INSTRUCTION}", "x = 3"),
        ),
        (JPEG[1], "Find y.", "<think>none</think> 4", "convert: solution has no <answer>"),
        (None, "Find z.", "<answer>5</answer>", "convert: row has no image"),
        (CUT, "Find z.", "<answer>5</answer>", "decode: image cannot be decoded"),
    ]
    folder.mkdir(parents=True)
    pq.write_table(
        pa.table(
            {
                "image": pa.array(
                    [data and {"bytes": data, "path": "a"} for data, *_ in rows], IMAGE
                ),
                "problem": [problem for _, problem, _, _ in rows],
                "solution": [solution for _, _, solution, _ in rows],
                "original_question": ["q"] * len(rows),
                "original_answer": ["a"] * len(rows),
            }
        ),
        folder / "train-00000-of-00001.parquet",
    )
    return {number: expected for number, (*_, expected) in enumerate(rows)}
