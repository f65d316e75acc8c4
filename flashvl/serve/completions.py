"""Texts to continue: requests -> the engines' answers in OpenAI's older form."""

import codecs
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response

from flashvl.engine import Completion, Request, TokenLogprobs
from flashvl.serve.answers import Served, log_answers
from flashvl.serve.protocol.answers import Timings, TopLogprob, Usage, new_id, now
from flashvl.serve.protocol.completions import (
    CompletionRequest,
    TextChoice,
    TextCompletion,
    TextLogprobs,
)
from flashvl.serve.protocol.errors import RequestError
from flashvl.serve.streaming import DONE, Answers, EventStream, answer_whole, event


class TextHandler:
    """Answers `/v1/completions`."""

    def __init__(self, served: Served):
        self.served = served

    async def complete(self, request: CompletionRequest) -> Response:
        """The response to a text completion request: JSON, or a stream of events.

        Raises:
            RequestError: the request cannot be answered.
        """
        if request.echo and request.logprobs is not None:
            raise RequestError(
                400,
                "logprobs are those of the answer, not of its prompt; leave out logprobs or echo",
                param="logprobs",
            )
        wanted = await self.served.prompts.read_texts(request)
        asked = [each for prompt in wanted for each in prompt.requests]
        echoes = [self._echo(each) if request.echo else "" for each in asked]
        if request.stream:
            answers = Answers(self.served.engines, wanted)
            await answers.begin()
            return EventStream(self._events(request, answers, echoes), answers)
        completions = await answer_whole(self.served.engines, wanted)
        answer = TextCompletion(
            model=self.served.name,
            choices=[
                TextChoice(
                    index=index,
                    text=echo + completion.text,
                    logprobs=self._logprobs(completion.logprobs, Offsets()),
                    finish_reason=completion.finish_reason,
                )
                for index, (echo, completion) in enumerate(zip(echoes, completions, strict=True))
            ],
            usage=Usage.of(completions, len(request.prompts)),
            timing=Timings.of(completions[0]) if request.include_timing else None,
        )
        log_answers(completions)
        return JSONResponse(answer.model_dump(exclude=None if answer.timing else {"timing"}))

    def _echo(self, asked: Request) -> str:
        text: str = self.served.prompts.tokenizer.decode(asked.prompt)
        return text

    async def _events(
        self, request: CompletionRequest, answers: Answers, echoes: list[str]
    ) -> AsyncIterator[str]:
        """OpenAI's `text_completion` events, and then the end mark or an error."""
        common = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": now(),
            "model": self.served.name,
        }
        offsets = [Offsets() for _ in echoes]
        completions: dict[int, Completion] = {}
        try:
            for index, echo in enumerate(echoes):
                if echo:
                    piece = TextChoice(index=index, text=echo, finish_reason=None)
                    yield event(common | {"choices": [piece.model_dump()]})
            async for index, delta in answers:
                completion = delta.completion
                new = None if delta.logprobs is None else [delta.logprobs]
                piece = TextChoice(
                    index=index,
                    text=delta.text,
                    logprobs=self._logprobs(new, offsets[index]),
                    finish_reason=None if completion is None else completion.finish_reason,
                )
                if delta.text or new or completion is not None:
                    yield event(common | {"choices": [piece.model_dump()]})
                if completion is not None:
                    completions[index] = completion
        except RequestError as error:
            yield event(error.body)
            return
        in_order = [completions[index] for index in range(len(echoes))]
        log_answers(in_order)
        last: dict[str, Any] = {}
        if request.stream_options.include_usage:
            last["usage"] = Usage.of(in_order, len(request.prompts)).model_dump()
        if request.include_timing:
            last["timing"] = Timings.of(in_order[0]).model_dump()
        if last:
            yield event(common | {"choices": []} | last)
        yield DONE

    def _logprobs(
        self, logprobs: Sequence[TokenLogprobs] | None, offsets: "Offsets"
    ) -> TextLogprobs | None:
        if logprobs is None:
            return None
        tokenizer = self.served.prompts.tokenizer
        told = [TopLogprob.of(each.token_id, each.logprob, tokenizer) for each in logprobs]
        tops = [[TopLogprob.of(*top, tokenizer) for top in each.top.items()] for each in logprobs]
        return TextLogprobs(
            tokens=[each.token for each in told],
            token_logprobs=[each.logprob for each in told],
            top_logprobs=[{top.token: top.logprob for top in each} for each in tops],
            text_offset=[offsets.add(bytes(each.bytes)) for each in told],
        )


class Offsets:
    """Where in an answer's text each of its tokens begins, in characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._end = 0

    def add(self, token: bytes) -> int:
        """The place where the text of the next token, with these bytes, begins."""
        begin = self._end
        self._end += len(self._decoder.decode(token))
        return begin
