"""What tiling costs: the times of models that differ in it alone (paper, Figure 1 and A.4)."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from flashvl.bench.contenders import build_flashvl, make_photo
from flashvl.bench.latency import Round, measure_latency
from flashvl.bench.machine import measure_machine
from flashvl.bench.models import RandomWeights, build_twins
from flashvl.progress import ShowProgress, ignore_progress


def measure_tilings(
    presets: Mapping[str, str],
    *,
    num_tokens: int = 128,
    rounds: int = 15,
    on_progress: ShowProgress = ignore_progress,
) -> list[dict[str, Any]]:
    """Time the engine with random weights of some presets, which take turns.

    Args:
        presets: by the name that its times get.

    Returns:
        For each its `name`, the picture's `visual_tokens`, and `times_ms`: by round, the time of
        each token since the picture's tensors were there.
    """
    weights = RandomWeights.for_this_machine()
    contenders, visual_tokens = [], []
    for name, preset in presets.items():
        engine, _ = build_flashvl(build_twins(preset, weights))
        engine.name = name
        contenders.append(engine)
        tiles = engine.prepare(make_photo(0))
        visual_tokens.append(len(tiles.pixels) * engine.engine.processor.image_seq_length)
    machine = measure_machine(weights.dtype, contenders[0].twin.model.device)
    measured = measure_latency(
        contenders, machine, num_tokens=num_tokens, rounds=rounds, on_progress=on_progress
    )
    return [
        {
            "name": latency.name,
            "visual_tokens": count,
            "times_ms": [_since_tensors(each) for each in latency.rounds],
        }
        for latency, count in zip(measured, visual_tokens, strict=True)
    ]


def _since_tensors(took: Round) -> list[float]:
    return [1e3 * each for each in accumulate([took.first_s, *took.gaps_s])]
