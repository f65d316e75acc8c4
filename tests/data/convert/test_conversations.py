"""The rules of a conversation, on turns that no published set has."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashvl.data.convert import llava, preferences, reasoning, tables
from flashvl.data.convert.conversations import ROLES, build_conversation
from flashvl.data.convert.family import Record
from flashvl.data.convert.tables import TableMapping
from flashvl.data.schema import IMAGE_MARKER
from flashvl.errors import DataError
from tests.support.sets import rated, turns

QUICK = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)  # as a busy machine draws slowly

NAMES = st.sampled_from([*ROLES, "bot", None])
TEXTS = st.lists(st.sampled_from([IMAGE_MARKER, "a", " ", "\n", "\ud800", "\u00e9"]), max_size=4)
TURNS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"from": NAMES, "value": TEXTS.map("".join)}),
        st.fixed_dictionaries({"role": NAMES, "content": st.none() | st.just("b")}),
        st.sampled_from([None, "x", []]),
    ),
    max_size=6,
)


@QUICK
@given(conversation=st.none() | st.just("x") | TURNS, num_images=st.integers(0, 2))
def test_what_is_taken_can_be_trained_on(conversation: Any, num_images: int) -> None:
    try:
        row = build_conversation(conversation, [b"x"] * num_images, None)
    except DataError as error:
        assert "\n" not in str(error)
        return
    roles = [message["role"] for message in row["messages"]]
    if roles[0] == "system":
        roles = roles[1:]
    assert roles == ["user", "assistant"] * (len(roles) // 2) != []
    contents = [message["content"] for message in row["messages"]]
    assert all(content.strip() for content in contents)
    assert sum(content.count(IMAGE_MARKER) for content in contents) == num_images
    for content in contents:
        content.encode()  # as a file needs it


@QUICK
@given(st.lists(st.sampled_from(["a", "b c", "d\n"]), min_size=2, max_size=6))
def test_sensible_turns_are_taken_as_they_are(texts: list[str]) -> None:
    texts = texts[: len(texts) // 2 * 2]
    row = build_conversation(turns(*texts), [], "set")
    assert [message["content"] for message in row["messages"]] == texts
    assert row["source"] == "set"


@QUICK
@given(
    fields=st.dictionaries(
        st.sampled_from(["conversations", "image", "source"]),
        st.none()
        | st.integers()
        | st.sampled_from(["", "x"])
        | st.lists(st.integers(), max_size=2),
    )
)
def test_fields_of_any_type_are_refused_and_nothing_else(fields: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        llava.convert(Record(fields=fields, attached=[]))
    with pytest.raises(DataError):
        reasoning.convert(Record(fields=fields, attached=[]))


@QUICK
@given(
    completions=st.recursive(
        st.none() | st.integers() | st.sampled_from(["", "3"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["annotations", "response", "Rating"]), inner, max_size=3
            )
        ),
        max_leaves=8,
    )
)
def test_completions_of_any_shape_are_refused_and_nothing_else(completions: Any) -> None:
    fields = {"prompt": "a", "img_path": "b", "completions": completions}
    with pytest.raises(DataError):
        preferences.convert(Record(fields=fields, attached=[]))


def test_completions_as_an_object_of_lists_are_the_same() -> None:
    """The library `datasets` turns a list of objects into an object of lists, at every level."""
    answers = [
        rated("good", "5", "5", "4"),
        rated("bad", "1", "N/A", "2"),
        rated("mid", "3", "3", "3"),
    ]
    aspects = answers[0]["annotations"]
    columns = {
        "annotations": {
            aspect: {
                "Rating": [answer["annotations"][aspect]["Rating"] for answer in answers],
                "Rationale": ["because"] * 3,
            }
            for aspect in aspects
        },
        "model": ["m"] * 3,
        "response": [answer["response"] for answer in answers],
    }
    rows = [
        preferences.convert(
            Record(fields={"prompt": "a", "img_path": "b", "completions": each}, attached=[])
        )
        for each in (answers, columns)
    ]
    assert rows[0] == rows[1]
    assert rows[0]["chosen"][0]["content"] == "good" and rows[0]["rejected"][0]["content"] == "bad"


CHOICES = {"id": 5, "image": b"x", "question": "Which?", "options": ["cat", "dog", "2"]}
AI2D = TableMapping(choices="options", prompt="{question}\n{choices}\nAnswer with a letter.")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("dog", "B"), ("b", "B"), ("1", "B"), (1, "B"), ("2", "C"), (["cat"], "A"), (0, "A")],
)
def test_an_answer_becomes_the_letter_of_its_choice(answer: Any, letter: str) -> None:
    record = Record(fields=CHOICES | {"answer": answer}, attached=[])
    row = tables.convert(record, mapping=AI2D)
    question, told = row["messages"]
    assert told["content"] == letter
    assert question["content"] == "<image>\nWhich?\nA. cat\nB. dog\nC. 2\nAnswer with a letter."
    assert row["id"] == 5


@pytest.mark.parametrize("answer", ["bird", 3, -1, None, [], "D", True and "3"])
def test_an_answer_that_is_no_choice_is_refused(answer: Any) -> None:
    record = Record(fields=CHOICES | {"answer": answer}, attached=[])
    with pytest.raises(DataError, match="answer is none of the 3 choices"):
        tables.convert(record, mapping=AI2D)


def test_images_of_several_columns_come_in_their_order() -> None:
    mapping = TableMapping(image=("image_1", "image_2", "image_3"), is_image_optional=True)
    fields = {"image_1": b"1", "image_2": None, "image_3": b"3", "question": "q", "answer": 7.5}
    row = tables.convert(Record(fields=fields, attached=[]), mapping=mapping)
    assert row["images"] == [b"1", b"3"]
    assert row["messages"][0]["content"] == "<image>\n<image>\nq"
    assert row["messages"][1]["content"] == "7.5"
    text = tables.convert(
        Record(fields={"question": "q", "answer": "a"}, attached=[]), mapping=mapping
    )
    assert text["images"] == [] and text["messages"][0]["content"] == "q"


MAPPINGS = sorted((Path(__file__).parents[3] / "ray_jobs" / "mappings").glob("*.yaml"))


@pytest.mark.parametrize("path", MAPPINGS, ids=lambda path: path.stem)
def test_every_mapping_in_the_repository_can_be_used(path: Path) -> None:
    family = tables.build_family(str(path))
    fields = dict.fromkeys(family.needed, "a") | {"image": b"x", "options": ["a", "b"]}
    row = family.convert(Record(fields=fields | {"choices": ["a", "b"]}, attached=[]))
    assert row["messages"][1]["content"] in ("a", "A") and row["source"] == path.stem


def test_turns_as_an_object_of_lists_are_the_same() -> None:
    rows = turns("a", "b", "c", "d")
    columns = {name: [turn[name] for turn in rows] for name in ("from", "value")}
    assert build_conversation(columns, [], None) == build_conversation(rows, [], None)
