"""ZeRO 3 on two ranks, of which one sees pictures and the other only text."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed

from flashvl.train.feed.mixture import SyntheticData, TrainingData
from flashvl.train.recipe import DpoRecipe
from flashvl.train.run.zero import start_engine, update_weights
from tests.support.pairs import SETTINGS, batches_of, build, move, rows, step, trained_of
from tests.support.ranks import run_ranks


def learn_on_uneven_ranks(folder: Path, zero_stage: int) -> None:
    """Rank 1 sees text alone; both make the steps of one process that sees all pairs."""
    torch.manual_seed(0)  # the ranks draw the same adapters
    rank = distributed.get_rank()
    objective = build(folder, SETTINGS)
    move(trained_of(objective.module))
    recipe = DpoRecipe(
        kind="dpo",
        stage="test",
        init_from=str(folder),
        output_dir="none",
        data=TrainingData(synthetic=SyntheticData(count=1)),
        zero_stage=zero_stage,
        precision="fp32",
        use_gpu=False,
    )
    shown, told = rows()[:2], [pair | {"images": []} for pair in rows()[2:]]
    whole = build(folder, SETTINGS)
    whole.module.load_state_dict(objective.module.state_dict())
    truth, _ = step(whole, batches_of(folder, shown + told))
    groups = [{"params": list(trained_of(objective.module).values()), "lr": 1e-3}]
    engine = start_engine(objective.module, groups, recipe)
    num_items = torch.tensor(4.0)
    for number in range(2):
        total = torch.zeros(())
        for batch in batches_of(folder, told if rank else shown):
            engine.set_gradient_accumulation_boundary(True)
            loss, _ = objective.loss(engine, objective.collate(batch), num_items)
            engine.backward(2 * loss)
            total += loss.detach()
        update_weights(engine)
        distributed.all_reduce(total)
        assert float(total) == pytest.approx(truth, rel=1e-5) or number
    engine.eval()
    with torch.no_grad():
        for batch in batches_of(folder, told if rank else shown):
            objective.loss(engine, objective.collate(batch), num_items)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_rank_without_images_keeps_step_in_zero_3(random_folder: Callable[[str], Path]) -> None:
    run_ranks(learn_on_uneven_ranks, 2, random_folder("tiny-iss"), 3)
