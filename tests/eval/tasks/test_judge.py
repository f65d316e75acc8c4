"""A judge: asked only what the rule leaves open, once, and patiently."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from flashvl.errors import FlashVLError
from flashvl.eval.tasks import judge as judging
from flashvl.eval.tasks.catalogue import TASKS
from flashvl.eval.tasks.judge import Judge, mark_answers
from flashvl.eval.tasks.score import score
from flashvl.eval.tasks.task import Marked
from flashvl.eval.tasks.tsv import Fields

PETS: Fields = {"question": "What is it?", "A": "a cat", "B": "a dog", "answer": "B"}
SAID = ["B", "A puppy, I think", "something that barks", "it meows a lot", "who knows", None]
ANSWERS: list[tuple[Fields, str | None]] = [
    (PETS | {"index": str(index)}, said) for index, said in enumerate(SAID)
]
REPLIES = {"barks": "B", "meows": " A.", "knows": "well ..."}


class Service:
    """Replies as OpenAI's API does, by what is in the question, after some failures."""

    def __init__(self, failures: int = 0, status: int = 503):
        self.asked: list[dict[str, object]] = []
        self.failures, self.status = failures, status

    async def reply(self, request: web.Request) -> web.Response:
        if self.failures:
            self.failures -= 1
            return web.Response(status=self.status)
        body = await request.json()
        self.asked.append(body | {"key": request.headers.get("Authorization")})
        question = body["messages"][0]["content"]
        text = next(reply for word, reply in REPLIES.items() if word in question)
        return web.json_response({"choices": [{"message": {"content": f"<think>?</think>{text}"}}]})


def use(service: Service, do: Callable[[str], Awaitable[list[Marked]]]) -> list[Marked]:
    async def run() -> list[Marked]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", service.reply)
        async with TestServer(app) as server:
            return await do(str(server.make_url("/v1/")))

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")


def test_only_open_answers_are_asked_about_and_only_once(tmp_path: Path) -> None:
    kept, service = tmp_path / "replies.jsonl", Service(failures=2)

    async def mark(url: str) -> list[Marked]:
        async with Judge(url, "wise", kept) as judge:
            return await mark_answers(TASKS["ai2d"], ANSWERS, judge)

    marked = use(service, mark)
    found = [(each.verdict.mark, each.verdict.by) for each in marked]
    assert found == [
        (1, "rule"),
        (0, "rule"),  # its article is a letter
        (1, "judge"),
        (0, "judge"),
        (0, "judge"),
        (0, "rule"),
    ]
    assert len(service.asked) == 3
    assert service.asked[0]["model"] == "wise" and service.asked[0]["temperature"] == 0
    assert service.asked[0]["key"] == "Bearer secret"
    with kept.open("a") as file:
        file.write('\n{"question": "cut o')
    assert use(service, mark) == marked and len(service.asked) == 3
    found_score = score(TASKS["ai2d"], marked, num_lost=0, num_left_out=0, judge="wise")
    assert "3 answers judged by wise" in found_score.rule and found_score.num_judged == 3

    async def mark_by_another(url: str) -> list[Marked]:
        async with Judge(url, "wiser", kept) as judge:
            return await mark_answers(TASKS["ai2d"], ANSWERS, judge)

    assert use(service, mark_by_another) == marked and len(service.asked) == 6
    lines = [line for line in kept.read_text().splitlines() if line]
    assert len(lines) == 7 and sum(line.endswith("}") for line in lines) == 6
    assert json.loads(lines[-1]).keys() == {"question", "reply"}


def test_without_a_judge_open_answers_are_wrong() -> None:
    marked = asyncio.run(mark_answers(TASKS["ai2d"], ANSWERS))
    assert [each.verdict.by for each in marked].count("nobody") == 3
    found = score(TASKS["ai2d"], marked, num_lost=0, num_left_out=0, judge=None)
    assert found.figure == pytest.approx(100 / 6)
    assert found.rule.endswith("no judge: 3 answers that this leaves open count as wrong")


@pytest.mark.parametrize(
    ("service", "reason"),
    [
        (Service(failures=99), "status 503"),
        (Service(failures=1, status=401), "status 401"),
        (Service(failures=1, status=200), "not as OpenAI's API does"),
    ],
)
def test_a_judge_that_does_not_reply_is_one_line(
    service: Service, reason: str, tmp_path: Path
) -> None:
    async def mark(url: str) -> list[Marked]:
        async with Judge(url, "wise", tmp_path / "kept") as judge:
            return await mark_answers(TASKS["ai2d"], [ANSWERS[2]], judge)

    with pytest.raises(FlashVLError, match=reason) as raised:
        use(service, mark)
    assert "\n" not in str(raised.value) and "0 replies are kept" in str(raised.value)


def test_no_service_at_all_is_one_line(tmp_path: Path) -> None:
    async def mark() -> list[Marked]:
        async with Judge("http://127.0.0.1:9/v1", "wise", tmp_path / "kept") as judge:
            return await mark_answers(TASKS["ai2d"], [ANSWERS[2]], judge)

    with pytest.raises(FlashVLError, match="judge wise at http://127.0.0.1:9/v1 does not reply"):
        asyncio.run(mark())


def test_a_judge_gives_mmvet_parts_of_a_mark() -> None:
    task = TASKS["mmvet"]
    fields = {"question": "x?", "answer": "-1<AND>-5", "category": "math"}

    class Fixed(Judge):
        async def ask(self, question: str) -> str:
            assert "-1<AND>-5" in question
            return self.model

    for reply, mark in (("0.4", 0.4), ("1", 1), ("1.5", 0), ("good", 0)):
        judge = Fixed("http://127.0.0.1:9", reply, Path("none"))
        (marked,) = asyncio.run(mark_answers(task, [(fields, "x = -1")], judge))
        assert marked.verdict.mark == mark and marked.verdict.by == "judge"
