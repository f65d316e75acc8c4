"""A language model that marks answers: any that is served by an API like OpenAI's.

Its replies are kept on a disk as they come, so that no question is ever paid for twice.
"""

import asyncio
import hashlib
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from flashvl.data.answers import final_answer
from flashvl.errors import FlashVLError, one_line
from flashvl.eval.tasks.task import NO_ANSWER, JudgedTask, Marked, Task
from flashvl.eval.tasks.tsv import Fields
from flashvl.progress import ShowProgress, ignore_progress

KEY_VARIABLE = "OPENAI_API_KEY"
"""Variable of the environment that holds the key of the judge's API, if it needs one."""
MAX_AT_ONCE = 16
"""Questions that a judge is asked at once."""
MAX_TOKENS = 256
TIMEOUT_S = 120.0
"""Seconds in which a judge must reply."""
PAUSES_S = (1.0, 4.0, 16.0)
"""Seconds between attempts where a judge may reply later; jittered."""


class Judge:
    """A judge model; a context, in which its connections are open.

    `url` is the API's base, such as `http://localhost:8000/v1`. The file `kept` holds the replies,
    an object in each line, and may be shared by benchmarks and by judges.
    """

    def __init__(self, url: str, model: str, kept: Path):
        self.url, self.model, self.kept = url.rstrip("/"), model, kept
        self.num_asked = 0
        """Questions that were sent, attempts not counted."""
        self._replies = _read_kept(kept)
        self._at_once = asyncio.Semaphore(MAX_AT_ONCE)

    async def __aenter__(self) -> "Judge":
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session = aiohttp.ClientSession(
            headers=headers, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def ask(self, question: str) -> str:
        """The judge's reply, kept or new, without its reasoning.

        Raises:
            FlashVLError: the judge does not reply.
        """
        text = json.dumps([self.model, question])
        name = hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()
        if name not in self._replies:
            async with self._at_once:
                reply = await self._ask_patiently(question)
            self._replies[name] = reply
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            with self.kept.open("a") as file:
                # A line of its own, even after one that was cut off.
                file.write("\n" + json.dumps({"question": name, "reply": reply}))
        return final_answer(self._replies[name])

    async def _ask_patiently(self, question: str) -> str:
        self.num_asked += 1
        for pause_s in (*PAUSES_S, None):
            try:
                return await self._ask(question)
            except (
                aiohttp.ClientConnectionError,
                aiohttp.ClientPayloadError,
                TimeoutError,
            ) as error:
                reason = one_line(error)
            except aiohttp.ClientResponseError as error:
                reason = f"status {error.status}, {one_line(error.message)}"
                if error.status not in (408, 429) and error.status < 500:
                    break
            except (aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
                reason = f"not as OpenAI's API does, {type(error).__name__}: {one_line(error)}"
                break
            if pause_s is not None:
                await asyncio.sleep(random.uniform(0.5, 1.0) * pause_s)
        raise FlashVLError(
            f"judge {self.model} at {self.url} does not reply ({reason}); correct its URL, name or"
            f" key, or leave the judge out; {len(self._replies)} replies are kept in {self.kept}"
        )

    async def _ask(self, question: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        async with self._session.post(f"{self.url}/chat/completions", json=body) as response:
            response.raise_for_status()
            found: Any = await response.json(content_type=None)
        return str(found["choices"][0]["message"]["content"] or "")


async def mark_answers(
    task: Task,
    answers: Sequence[tuple[Fields, str | None]],
    judge: Judge | None = None,
    on_progress: ShowProgress = ignore_progress,
) -> list[Marked]:
    """The verdict on each answer, in their order; an answer of None, which failed, is wrong.

    Args:
        judge: judge that is asked where the rule leaves it open; None: the mark is 0 there.

    Raises:
        FlashVLError: the judge does not reply.
    """
    num_done = 0

    async def mark(fields: Fields, answer: str | None) -> Marked:
        nonlocal num_done
        verdict = NO_ANSWER if answer is None else task.verdict(fields, answer)
        if answer is not None and verdict.by == "nobody" and judge is not None:
            assert isinstance(task, JudgedTask)
            reply = await judge.ask(task.question(fields, answer))
            verdict = task.judged(fields, answer, reply)
        num_done += 1
        on_progress(num_done, len(answers), task.name)
        return Marked(fields=fields, verdict=verdict)

    return list(await asyncio.gather(*(mark(fields, answer) for fields, answer in answers)))


def _read_kept(path: Path) -> dict[str, str]:
    """The replies in a file, whose last line may have been cut off."""
    replies = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
            replies[found["question"]] = found["reply"]
        except (ValueError, LookupError, TypeError):
            continue
    return replies
