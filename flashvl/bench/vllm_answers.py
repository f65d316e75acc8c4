"""A script with which vLLM answers for `flashvl bench peers`, run by the Python that has vLLM.

It imports nothing of `flashvl`; a model folder is its argument. Requests are lines of JSON on
standard input, each answered by a line on standard output. Everything that vLLM prints goes to
standard error. The first line of output has vLLM's version, and comes when the model is loaded.

    {"prompt": TEXT, "jpeg": BASE64}       -> {"prepared": NUMBER, "prompt_tokens": COUNT}
    {"prepared": [...], "lengths": [...]}  -> {"times": [[...], ...]}

The first kind of request turns a JPEG and its text into an input of vLLM's engine. The second kind
answers prepared inputs, all at once, each with the number of tokens in `lengths`, and returns the
time of each token by `time.perf_counter`, which all processes share on Linux. An input can be
answered only once.
"""

import argparse
import base64
import io
import itertools
import json
import os
import sys
import time
from typing import Any, TextIO


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--enforce-eager", action="store_true")
    arguments = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answerer = _Answerer(arguments.folder, arguments.dtype, arguments.enforce_eager)
    _reply(replies, {"version": answerer.version})
    for line in sys.stdin:
        request = json.loads(line)
        if "jpeg" in request:
            _reply(replies, answerer.prepare(request["prompt"], base64.b64decode(request["jpeg"])))
        else:
            _reply(replies, answerer.answer(request["prepared"], request["lengths"]))


def _reply(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


class _Answerer:
    """vLLM with a model of the folder's shape and random weights of vLLM's own.

    vLLM keeps nothing of an image or a prompt for the next request.
    """

    def __init__(self, folder: str, dtype: str, enforce_eager: bool) -> None:
        import vllm  # type: ignore[import-not-found]

        self.version: str = vllm.__version__
        self.llm = vllm.LLM(
            folder,
            trust_remote_code=True,
            model_impl="transformers",
            load_format="dummy",
            dtype=dtype,
            limit_mm_per_prompt={"image": 1},
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            enforce_eager=enforce_eager,
        )
        self.numbers = itertools.count()
        self.prepared: dict[int, Any] = {}

    def prepare(self, prompt: str, jpeg: bytes) -> dict[str, int]:
        from PIL import Image

        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        [inputs] = self.llm.renderer.render_cmpl(
            [{"prompt": prompt, "multi_modal_data": {"image": image}}]
        )
        number = next(self.numbers)
        self.prepared[number] = inputs
        return {"prepared": number, "prompt_tokens": len(inputs["prompt_token_ids"])}

    def answer(self, numbers: list[int], lengths: list[int]) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

        engine = self.llm.llm_engine
        places: dict[str, int] = {}
        for place, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=length,
                ignore_eos=True,
                output_kind=RequestOutputKind.DELTA,
            )
            engine.add_request(str(number), self.prepared.pop(number), params)
            places[str(number)] = place
        times: list[list[float]] = [[] for _ in numbers]
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                times[places[output.request_id]] += [now] * len(output.outputs[0].token_ids)
        return {"times": times}


if __name__ == "__main__":
    main()
