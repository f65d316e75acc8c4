"""The paper's models at their true size: random bf16 weights, one caption, in a laptop's memory.

make test-slow ARGS="-k full_size -s"
"""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MAX_GIB = 12
"""4.3 GiB of weights, the library, and what one forward pass holds."""

CAPTION = """
import json, resource, sys, time
import torch
from PIL import Image
from flashvl.data.tokenizer import train_tokenizer
from flashvl.engine import Engine, Request
from flashvl.model import FlashVLForConditionalGeneration
from flashvl.model.assembly import build_processor
from flashvl.model.presets import build_config

config = build_config(sys.argv[1])
tokenizer = train_tokenizer(["Describe the image."], 290)
config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
config.text_config.eos_token_id = tokenizer.eos_token_id
torch.set_default_dtype(torch.bfloat16)
with torch.device("meta"):
    model = FlashVLForConditionalGeneration(config)
model.to_empty(device="cpu").tie_weights()
for weight in model.parameters():
    weight.data.normal_(std=0.02)
for module in model.modules():  # what is computed from the configuration, not stored
    if hasattr(module, "position_ids"):
        module.position_ids = torch.arange(module.position_ids.shape[-1]).expand((1, -1))
torch.set_default_dtype(torch.float32)
language_model = model.model.language_model
language_model.rotary_emb = type(language_model.rotary_emb)(config.text_config)
engine = Engine(model.eval(), build_processor(config, tokenizer))
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
