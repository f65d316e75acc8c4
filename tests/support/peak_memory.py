"""Peak memory of real training steps, which the plan's memory model is compared with.

    python -m tests.support.peak_memory '{"zero_stage": 1, "precision": "bf16", ...}'

Each worker is a process of its own, so that what the system counts is what a worker takes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NUM_STEPS = 2
"""Steps that are made; the peak is that of the last."""
RECIPE = ("trainable", "precision", "zero_stage", "gradient_checkpointing")
"""Settings that are the recipe's."""
MICRO_BATCHES = 2
"""Micro-batches of a step; the second one's gradients are added to those of the first."""


def measure(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Run the `settings` of `run_worker` in `num_workers` processes.

    Returns:
        of each worker: `peak` and `static` (after the last step), in bytes, less what the process
        took before it had a model, and `seconds` of the last step.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            # Freed memory goes back to the system at once, so that the peak is not of an earlier
            # moment's.
            "MALLOC_MMAP_THRESHOLD_": "131072",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "MALLOC_TOP_PAD_": "0",
            "MALLOC_ARENA_MAX": "1",
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(settings["num_workers"]),
            "STORE": f"{folder}/store",
        }
        command = [sys.executable, "-m", "tests.support.peak_memory", json.dumps(settings)]
        processes = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(settings["num_workers"])
        ]
        outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def run_worker(settings: dict[str, Any]) -> dict[str, float]:
    """Train one worker for a few steps.

    Args:
        settings: `config` (a `FlashVLConfig` as a dict), `trainable`, `num_workers`, `zero_stage`,
            `precision`, `gradient_checkpointing`, and the micro-batch's `num_tokens`, `num_tiles`
            and `num_labels`.
    """
    import gc

    from torch import distributed

    from flashvl.model.presets import build_config

    distributed.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['STORE']}",
        rank=int(os.environ["RANK"]),
        world_size=settings["num_workers"],
    )
    # Libraries, kernels and buffers of the network, which are not the model's memory.
    small = {"num_tokens": 40, "num_tiles": 1, "num_labels": 8}
    train(settings | small | {"config": build_config("tiny").to_dict()})
    gc.collect()
    before = _resident("VmRSS")
    figures = train(settings)
    distributed.barrier()
    distributed.destroy_process_group()
    sizes = {name: figures[name] - before for name in ("peak", "backward", "static")}
    return sizes | {"seconds": figures["seconds"]}


def train(settings: dict[str, Any]) -> dict[str, float]:
    """Make `NUM_STEPS` steps; returns resident bytes, and the seconds of the last step."""
    import time

    import torch
    from transformers.initialization import no_init_weights

    from flashvl.model import FlashVLConfig, FlashVLForConditionalGeneration
    from flashvl.train.recipe import SupervisedRecipe
    from flashvl.train.run.worker import prepare_parts
    from flashvl.train.run.zero import start_engine

    torch.manual_seed(0)
    config = FlashVLConfig(**settings["config"])
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    with no_init_weights():
        model = FlashVLForConditionalGeneration._from_config(config, dtype=dtype)
    model.tie_weights()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0) if weight.dim() < 2 else weight.uniform_(-0.02, 0.02)
    recipe = SupervisedRecipe(
        kind="supervised",
        stage="peak",
        init_from="",
        output_dir="",
        data={"synthetic": {"count": 1}},
        use_gpu=False,
        **{name: settings[name] for name in RECIPE},
    )
    prepare_parts(model, recipe)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    engine = start_engine(model.train(), [{"params": trained, "lr": 1e-5}], recipe)

    num_tokens, num_labels = settings["num_tokens"], settings["num_labels"]
    vocab = config.text_config.vocab_size
    input_ids = torch.randint(4, vocab, (1, num_tokens))
    input_ids[input_ids == config.image_token_id] = 4
    input_ids[:, : settings["num_tiles"] * config.image_seq_length] = config.image_token_id
    batch = {
        "input_ids": input_ids,
        "position_ids": torch.arange(num_tokens)[None] % (num_tokens // 2),  # two documents
        "logits_to_keep": torch.arange(num_tokens - num_labels, num_tokens),
        "labels": torch.zeros(1, num_labels, dtype=torch.long),
        "shift_labels": torch.randint(4, vocab, (1, num_labels)),
        "num_items_in_batch": torch.tensor(float(num_labels)),
        "use_cache": False,
    }
    if settings["num_tiles"]:
        side = config.vision_config.image_size
        batch["pixel_values"] = torch.rand(settings["num_tiles"], 3, side, side)
    for _ in range(NUM_STEPS):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        start = time.perf_counter()
        for number in range(MICRO_BATCHES):
            engine.set_gradient_accumulation_boundary(number == MICRO_BATCHES - 1)
            loss = engine(**batch).loss
            engine.backward(loss)
            del loss
            backward_peak = _resident("VmHWM")
            engine.step()
    figures = {
        "peak": _resident("VmHWM"),
        "backward": backward_peak,
        "static": _resident("VmRSS"),
        "seconds": time.perf_counter() - start,
    }
    engine.destroy()
    return figures


def _resident(field: str) -> int:
    """Bytes of this process's memory that are in use (VmRSS), or were at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_worker(json.loads(sys.argv[1]))) + "\n")
