"""Answers of a prescribed form have that form, and do not depend on their batch."""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from flashvl.data import synthetic
from flashvl.data.features import make_tiles
from flashvl.engine import AsyncEngine, Completion, Engine, Request, StructuredOutputs
from flashvl.engine.grammar_check import GrammarError, checked
from flashvl.errors import DataError

QUESTION = [{"role": "user", "content": "<image>\nDescribe the image."}]
FIELDS = {
    "type": "object",
    "properties": {
        "size": {"enum": ["small", "large"]},
        "color": {"type": "string", "maxLength": 9},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "is_round": {"type": "boolean"},
    },
    "required": ["size", "color", "count", "is_round"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    """An engine in float32, in which no answer depends on the other requests in its batch."""
    return Engine.from_pretrained("tiny", "float32", max_num_seqs=16)


@pytest.fixture(scope="module")
def pictures(engine: Engine) -> list[Any]:
    drawn = [synthetic.sample("heldout", number, 1, tasks=("caption",)) for number in range(8)]
    return [make_tiles([each.image()], engine.processor) for each in drawn]


def ask(picture: Any, **options: Any) -> Request:
    return Request(messages=QUESTION, images=picture, **options)


def under(schema: Any) -> StructuredOutputs:
    return StructuredOutputs(json=json.dumps(schema))


def test_a_grammar_is_checked_where_packages_come_from_pythonpath(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on clusters whose administrators install packages beside Python."""
    (tmp_path / "llguidance").mkdir()
    (tmp_path / "llguidance" / "__init__.py").write_text("raise SystemExit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(GrammarError):
        checked("regex", "only here")


# Schemas, each of which bounds the length of its answers

NAMES = st.sampled_from(["a", "size", "is it?", 'quo"te', "caf\u00e9", "x_1"])
STRINGS = st.one_of(
    st.builds(
        lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
        st.integers(0, 3),
        st.integers(0, 6),
    ),
    st.sampled_from(
        [
            {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
            {"type": "string", "pattern": "^(red|green|blue)( (circle|cross))?$"},
            {"type": "string", "format": "date"},
        ]
    ),
)
NUMBERS = st.one_of(
    st.builds(
        lambda least, more: {"type": "integer", "minimum": least, "maximum": least + more},
        st.integers(-99, 99),
        st.integers(0, 1000),
    ),
    st.builds(
        lambda least: {"type": "integer", "exclusiveMinimum": least, "maximum": least + 5},
        st.integers(-9, 9),
    ),
)
PLAIN = st.sampled_from([None, True, False, 0, 7, -3, "", "red", "caf\u00e9", 'a "b"'])
LEAVES = st.one_of(
    STRINGS,
    NUMBERS,
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]),
    st.lists(PLAIN, min_size=1, max_size=4, unique_by=repr).map(lambda some: {"enum": some}),
    st.one_of(PLAIN, st.just({"k": [1, None]})).map(lambda one: {"const": one}),
)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    @st.composite
    def build(draw: st.DrawFn) -> Any:
        properties = draw(st.dictionaries(NAMES, inner, max_size=4))
        required = [name for name in properties if draw(st.booleans())]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    return build()


def _arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.builds(
            lambda items, least, more: {
                "type": "array",
                "items": items,
                "minItems": least,
                "maxItems": least + more,
            },
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.lists(inner, min_size=1, max_size=3).map(
            lambda some: {
                "type": "array",
                "prefixItems": some,
                "items": False,
                "minItems": len(some),
            }
        ),
    )


INNER = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        _objects(inner),
        _arrays(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
    ),
    max_leaves=6,
)


@st.composite
def schemas(draw: st.DrawFn) -> Any:
    """Strategy for schemas; half of them have a definition that is used once or twice."""
    schema = draw(INNER)
    if draw(st.booleans()):
        shared = {"$ref": "#/$defs/shared"}
        schema = {
            "$defs": {"shared": draw(INNER)},
            "type": "object",
            "properties": {"first": shared, "rest": schema, "last": {"anyOf": [shared, schema]}},
            "required": draw(st.lists(st.sampled_from(["first", "rest"]), unique=True)),
            "additionalProperties": False,
        }
    return schema


def draw_schemas(count: int) -> list[Any]:
    drawn: list[Any] = []

    @seed(0)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(schemas())
    def collect(schema: Any) -> None:
        drawn.append(schema)

    collect()
    return drawn


@pytest.mark.parametrize(
    "count", [pytest.param(25, marks=pytest.mark.long), pytest.param(500, marks=pytest.mark.slow)]
)
def test_answers_are_valid_and_nobody_else_is_changed(
    engine: Engine, pictures: list[Any], count: int
) -> None:
    """Constrained requests, greedy and sampled, in a batch with free ones."""
    found = draw_schemas(count)
    assert len(found) >= 0.9 * count
    rng = random.Random(0)
    free, constrained = [], []
    for number, schema in enumerate(found):
        options: dict[str, Any] = {"seed": number}
        if number % 2:
            options |= {"temperature": rng.choice([0.7, 2.0]), "top_p": rng.choice([0.9, 1.0])}
        picture = rng.choice(pictures)
        free.append(ask(picture, max_new_tokens=24, **options))
        # The tokens of an answer are bounded by its bytes.
        constrained.append(
            ask(picture, max_new_tokens=900, structured_outputs=under(schema), **options)
        )
    alone = engine.generate(free)
    mixed = [request for pair in zip(free, constrained, strict=True) for request in pair]
    answers = engine.generate(mixed)
    assert answers[::2] == alone
    for schema, answer in zip(found, answers[1::2], strict=True):
        assert answer.finish_reason == "stop", (schema, answer.text)
        value = json.loads(answer.text)
        jsonschema.Draft202012Validator(schema).validate(value)
    for request, answer in rng.sample(list(zip(constrained, answers[1::2], strict=True)), 5):
        assert engine.generate([request]) == [answer]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.5, "seed": 3},
        {"min_new_tokens": 200},
        {"ignore_eos": True},
        {"temperature": 1.0, "ignore_eos": True, "min_new_tokens": 5},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 3},
        {"logit_bias": {3: 100.0, 2: 100.0, 5: -100.0}},
    ],
    ids=str,
)
def test_an_answer_under_a_schema_is_complete_whatever_else_is_asked(
    engine: Engine, pictures: list[Any], options: dict[str, Any]
) -> None:
    request = ask(pictures[0], structured_outputs=under(FIELDS), max_new_tokens=200, **options)
    (answer,) = engine.generate([request])
    value = json.loads(answer.text)
    jsonschema.validate(value, FIELDS)
    assert answer.text == json.dumps(value, ensure_ascii=False)
    assert answer.finish_reason == "stop"
    assert "".join(delta.text for delta in engine.stream(request)) == answer.text
    assert answer.logprobs is None or len(answer.logprobs) == len(answer.token_ids)


def test_too_few_tokens_leave_an_answer_incomplete(engine: Engine, pictures: list[Any]) -> None:
    whole, part, stopped = engine.generate(
        [
            ask(pictures[0], structured_outputs=under(FIELDS), max_new_tokens=200),
            ask(pictures[0], structured_outputs=under(FIELDS), max_new_tokens=9),
            ask(pictures[0], structured_outputs=under(FIELDS), max_new_tokens=200, stop=["color"]),
        ]
    )
    assert part.finish_reason == "length"
    assert len(part.token_ids) == 9
    assert whole.text.startswith(part.text)
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index("color")]


def complete(engine: Engine, picture: Any, **outputs: Any) -> list[Completion]:
    """Sampling parameters: greedy, and at a high temperature."""
    made = StructuredOutputs(**outputs)
    options: list[dict[str, Any]] = [{}, {"temperature": 2.0}, {"temperature": 2.0, "seed": 1}]
    return engine.generate(
        [ask(picture, structured_outputs=made, max_new_tokens=400, **each) for each in options]
    )


@pytest.mark.parametrize(
    "regex",
    [
        r"[A-Z]{3}-\d{1,4}",
        r"(small|large) (red|blue) (circle|cross)s?",
        r"[a-z]{2,5}@[a-z]{1,4}\.(com|org)",
        r"[\u4e00-\u9fff]{1,3}",
        r"a?b?c?",
        r"(.|\n){0,20}!",
        r"<\|im_end\|> <\|image_pad\|>|<\|endoftext\|>",
    ],
)
def test_an_answer_matches_the_whole_regex(engine: Engine, pictures: list[Any], regex: str) -> None:
    for answer in complete(engine, pictures[0], regex=regex):
        assert re.fullmatch(regex, answer.text), answer.text
        assert answer.finish_reason == "stop"


@settings(deadline=None, max_examples=10)
@given(choice=st.lists(st.text(max_size=12), min_size=1, max_size=5))
def test_an_answer_is_one_of_the_choices(
    engine: Engine, pictures: list[Any], choice: list[str]
) -> None:
    for answer in complete(engine, pictures[0], choice=choice):
        assert answer.text in choice


def test_a_choice_that_begins_another_can_end_there(engine: Engine, pictures: list[Any]) -> None:
    answers = [
        engine.generate(
            [
                ask(
                    pictures[0],
                    structured_outputs=StructuredOutputs(choice=["a", "ab", "abc"]),
                    temperature=1000.0,
                    seed=number,
                )
            ]
        )[0].text
        for number in range(40)
    ]
    assert set(answers) == {"a", "ab", "abc"}


@pytest.mark.parametrize(
    ("grammar", "regex"),
    [
        ('root ::= pair ("," pair){0,2}\npair ::= [a-c] "=" [0-9]', r"[a-c]=\d(,[a-c]=\d){0,2}"),
        ('start: pair ("," pair)? \npair: /[a-c]/ "=" /[0-9]{2}/', r"[a-c]=\d\d(,[a-c]=\d\d)?"),
        ('start: "<|im_end|>" "x"', r"<\|im_end\|>x"),
    ],
)
def test_an_answer_is_a_sentence_of_the_grammar(
    engine: Engine, pictures: list[Any], grammar: str, regex: str
) -> None:
    for answer in complete(engine, pictures[0], grammar=grammar):
        assert re.fullmatch(regex, answer.text)


@pytest.mark.parametrize("grammar", ["start: <[1]> | <[3]> | /x+/", "start: (<[3]> | <[70]>){3}"])
def test_control_tokens_that_a_grammar_names_are_none_of_an_answer(
    engine: Engine, pictures: list[Any], grammar: str
) -> None:
    control = set(engine.processor.tokenizer.added_tokens_decoder)
    for answer in complete(engine, pictures[0], grammar=grammar):
        assert answer.token_ids
        assert not control & set(answer.token_ids)


def test_a_nested_grammar_is_balanced(engine: Engine, pictures: list[Any]) -> None:
    grammar = 'start: a\na: "(" a ")" | "x"'
    for answer in complete(engine, pictures[0], grammar=grammar):
        if answer.finish_reason == "stop":
            depth = answer.text.count("(")
            assert answer.text == "(" * depth + "x" + ")" * depth


def test_any_json_object(engine: Engine, pictures: list[Any]) -> None:
    for answer in complete(engine, pictures[0], json_object=True):
        assert answer.text.startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)


# Refusals

BAD = [
    {"json": "nope"},
    {"json": '{"type": "string"} x'},
    {"json": "[]"},
    {"json": '{"type": "objekt"}'},
    {"json": '{"minimum": NaN}'},
    {"json": '{"$ref": "#/$defs/missing"}'},
    {"json": '{"$ref": "https://example.com/schema"}'},
    {"json": '{"type": "string", "pattern": "("}'},
    {"json": '{"not": {"type": "string"}}'},
    {"json": '{"type": "integer", "minimum": 3, "maximum": 2}'},
    {"json": "false"},
    {"json": '{"items":' * 5000 + "{}" + "}" * 5000},
    {"json": '{"type": "string", "pattern": "\\ud800"}'},
    {"regex": "("},
    {"regex": "(?=a)b"},
    {"regex": "\ud800"},
    {"grammar": "start: missing"},
    {"grammar": 'start: start "a"'},
    {"grammar": "root ::= ("},
    {"grammar": ""},
    {"grammar": "start: <|im_start|>"},
    {"grammar": "start: <[300]>"},
    {"grammar": "\ud800"},
    {"choice": ["\ud800"]},
]


@pytest.mark.parametrize("outputs", BAD, ids=lambda outputs: str(outputs)[:60])
def test_what_cannot_be_compiled_is_refused_in_one_line(
    engine: Engine, outputs: dict[str, Any]
) -> None:
    request = Request(prompt="a", structured_outputs=StructuredOutputs(**outputs))
    (name,) = outputs
    with pytest.raises(DataError, match=rf"^structured_outputs\.{name} ") as caught:
        engine.add(request)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert engine.is_idle


HOSTILE = {
    "an intersection of many states": {
        "grammar": "start: A\nA: "
        + " & ".join(f"/(.{{{length}}})*/" for length in (7, 11, 13, 17, 19, 23))
    },
    "the same in a schema": {
        "json": json.dumps(
            {
                "allOf": [
                    {"type": "string", "pattern": f"^(.{{{length}}})*$"}
                    for length in (7, 11, 13, 17, 19, 23)
                ]
            }
        )
    },
    "a chain of rules": {
        "grammar": "start: a0\n"
        + "\n".join(f'a{number}: a{number + 1} | "x"' for number in range(5000))
        + '\na5000: "y"'
    },
    "deep brackets": {"grammar": "start: " + "(" * 40_000 + '"a"' + ")" * 40_000},
    "a deep regex": {"regex": "(" * 40_000 + "a" + ")" * 40_000},
    "many spaces": {"grammar": "root ::=" + " " * 99_000 + '"a"'},
    "too long": {"regex": "a" * 1_000_000},
    "many values": {"json": json.dumps({"enum": [f"value {number}" for number in range(9000)]})},
    "repeated repetitions": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "many states": {"regex": "(a|b)*a(a|b){2000}"},
    "long arrays": {
        "json": json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 10**9})
    },
    "an ambiguous grammar": {"grammar": 'start: s\ns: s s | s s s | "x" | "xx"'},
}


SERVER = """
import json, os, resource, sys
from flashvl.engine import Engine, Request, StructuredOutputs
from flashvl.errors import DataError

def answer(outputs):
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        request = Request(prompt="a", structured_outputs=outputs, temperature=1.0)
        engine.generate([request])
    except DataError as error:
        assert "structured_outputs" in str(error)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

engine = Engine.from_pretrained("tiny", "float32", max_num_seqs=2)
for line in sys.stdin:
    child = os.fork()
    if not child:
        grown = answer(StructuredOutputs(**json.loads(line)))
        print("grown", grown, flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print("ended", os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """A process that has loaded an engine, and forks for every line of JSON."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        # A child of a process with OpenMP's threads would wait for them for ever.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process


@pytest.mark.long
@pytest.mark.parametrize("outputs", HOSTILE.values(), ids=HOSTILE)
def test_what_is_hostile_is_answered_or_refused_before_long(
    server: subprocess.Popen[str], outputs: dict[str, Any]
) -> None:
    """In a process of its own, which lives, whose CPU time and memory are bounded."""
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(outputs) + "\n")
    server.stdin.flush()
    said = server.stdout.readline().split()
    assert said[0] == "grown", said
    assert int(said[1]) < 200 * 1024  # KiB
    assert server.stdout.readline().split() == ["ended", "0"]


def test_who_becomes_too_complex_within_an_answer_fails_alone(engine: Engine) -> None:
    """The limit is met only after the first token."""
    hostile = StructuredOutputs(
        grammar="start: A\nA: ~/(.*a.{30}b.*)/ & ~/(.*b.{37}a.*)/ & ~/(.*c.{41}.*e.*)/"
        " & /.{50,800}/"
    )
    free = Request(prompt="a large", max_new_tokens=12)
    expected = engine.generate([free])
    bad = Request(prompt="a", structured_outputs=hostile, temperature=2.0)

    async def both(asynchronous: AsyncEngine) -> list[Any]:
        asked = (asynchronous.generate(each) for each in (free, bad, free))
        return await asyncio.gather(*asked, return_exceptions=True)

    with pytest.raises(DataError, match="too complex"):
        engine.generate([free, bad])
    assert engine.is_idle
    with AsyncEngine(engine) as asynchronous:
        first, error, last = asyncio.run(both(asynchronous))
    assert [first] == [last] == expected
    assert isinstance(error, DataError)
    assert not engine._sequences
    assert not engine._outbox
    assert not engine._errors


@pytest.mark.parametrize(
    "outputs", [{}, {"json": "{}", "regex": "a"}, {"choice": []}, {"json_object": False}], ids=str
)
def test_exactly_one_form_is_prescribed(outputs: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="^structured_outputs"):
        StructuredOutputs(**outputs)
