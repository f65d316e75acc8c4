"""The paper's models at their true size: random bf16 weights, one caption, in a laptop's memory.

make test-slow ARGS="-k full_size -s"
"""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MAX_GIB = 16
"""Memory at most: 4.3 GiB of random weights, 4.7 GiB of them packed for the engine, a cache of a
quarter of the rest, the libraries, and the tensors of a forward pass."""

CAPTION = """
import json, resource, sys, time
import torch
from PIL import Image
from flashvl.bench.models import RandomWeights, build_random
from flashvl.engine import Engine, Request

engine = Engine(*build_random(sys.argv[1], RandomWeights(torch.bfloat16)))
start = time.perf_counter()
request = Request(
    messages=[{"role": "user", "content": "<image>Describe the image."}],
    images=[Image.new("RGB", (448, 448), "teal")],
    max_new_tokens=2,
)
(completion,) = engine.generate([request])
print(json.dumps({
    "prompt_tokens": completion.prompt_tokens,
    "generated": len(completion.token_ids),
    "seconds": round(time.perf_counter() - start, 1),
    "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
}))
"""


@pytest.mark.parametrize(("preset", "tokens"), [("static", 256), ("dynamic", 256), ("iss", 576)])
def test_a_caption_at_full_size(preset: str, tokens: int) -> None:
    command = [sys.executable, "-c", CAPTION, preset]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.write(f"{preset} {found}\n")
    assert found["prompt_tokens"] > tokens
    assert found["peak_gib"] < MAX_GIB
