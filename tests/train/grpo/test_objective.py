"""GRPO's objective on a small model: split groups, ranks, the engine, and the gallery."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, nn

from flashvl.data.storage import locate
from flashvl.model.loading import load_model, load_processor
from flashvl.train.feed.shares import MicroBatch
from flashvl.train.grpo.gallery import PAGE
from flashvl.train.grpo.objective import Groups, read_prompts
from flashvl.train.grpo.rollouts import make_seed
from flashvl.train.recipe import GrpoRecipe
from flashvl.train.run.worker import prepare_parts
from tests.support.problems import completion, problems, read_share, write_problems
from tests.support.ranks import run_ranks

NUM_PROMPTS, NUM_GENERATIONS = 3, 4


def build_recipe(folder: Path, work: Path, **changes: Any) -> GrpoRecipe:
    recipe = {
        "kind": "grpo",
        "stage": "<test>",
        "init_from": str(folder),
        "output_dir": str(work),
        "data": {"parquet": str(work / "table")},
        "trainable": ["multi_modal_projector", "language_model"],
        "global_batch_size": NUM_PROMPTS,
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": 10,
        "max_length": 300,
        "token_budget": 2000,
        "rewards": {"tests.support.rewards.undefined": 1.0},
        "beta": 0.04,
        "precision": "fp32",
        "use_gpu": False,
    }
    return GrpoRecipe.model_validate(recipe | changes)


def build_groups(recipe: GrpoRecipe) -> Groups:
    """The objective on weights that differ from the reference's."""
    model = load_model(recipe.init_from).train()
    adapters = prepare_parts(model, recipe)
    output = locate(recipe.output_dir)
    groups = Groups(model, load_processor(recipe.init_from), recipe, adapters, output)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return groups


def fix_completions(groups: Groups) -> None:
    def sample(_: nn.Module, prompts: Sequence[Any], step: int) -> list[list[Any]]:
        return [
            [
                completion(groups.processor, each.row, each.first_completion + number)
                for number in range(each.num_completions)
            ]
            for each in prompts
        ]

    groups.sampler.sample = sample  # type: ignore[method-assign]


Step = tuple[dict[str, float], float, torch.Tensor, dict[str, tuple[float, float]]]
"""Advantages by the tokens of the completion, loss, gradients, sums of figures."""


def compute(groups: Groups, batches: Sequence[MicroBatch], num_items: float) -> Step:
    advantages, loss = {}, 0.0
    for batch in batches:
        part, _ = groups.loss(groups.module, groups.collate(batch), torch.tensor(num_items))
        part.backward()
        loss += float(part.detach())
        said = np.split(batch.input_ids[batch.labels >= 0], np.cumsum(batch.branches)[:-1])
        for ids, value in zip(said, batch.advantages.tolist(), strict=False):
            advantages[str(ids.tolist())] = value
    weights = [weight for weight in groups.module.parameters() if weight.requires_grad]
    gradients = torch.cat([weight.grad.flatten() for weight in weights])
    return advantages, loss, gradients, groups.take_figures()


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_problems(tmp_path / "table", problems(NUM_PROMPTS, with_text_only=True))
    return tmp_path


TIMES = ("rollout_s", "reward_s", "update_s")


def compute_rank(folder: Path, work: Path) -> None:
    """The same step on one of several ranks; writes what it finds."""
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    recipe = build_recipe(folder, work, token_budget=310)
    groups = build_groups(recipe)
    fix_completions(groups)
    batches = groups.prepare(groups.module, read_share(recipe, rank, num_ranks))
    counts = torch.tensor([len(batches), sum(groups.count_items(each).sum() for each in batches)])
    everywhere = [torch.empty_like(counts) for _ in range(num_ranks)]
    distributed.all_gather(everywhere, counts)
    assert len({int(each[0]) for each in everywhere}) == 1
    torch.save(compute(groups, batches, NUM_PROMPTS * NUM_GENERATIONS), work / f"rank{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 5])
def test_ranks_and_split_groups_change_nothing(
    num_ranks: int, tiny_iss_random: Path, work: Path, one_rank: None
) -> None:
    """Uneven images, a prompt without any, groups that are split over ranks and micro-batches."""
    recipe = build_recipe(tiny_iss_random, work)
    groups = build_groups(recipe)
    fix_completions(groups)
    batches = groups.prepare(groups.module, read_share(recipe))
    assert len(batches) == 1
    truth = compute(groups, batches, NUM_PROMPTS * NUM_GENERATIONS)
    run_ranks(compute_rank, num_ranks, tiny_iss_random, work)
    found = [torch.load(work / f"rank{rank}.pt") for rank in range(num_ranks)]
    advantages = {key: value for each in found for key, value in each[0].items()}
    assert advantages == pytest.approx(truth[0])
    assert sum(each[1] for each in found) == pytest.approx(truth[1], abs=1e-6)
    gradients = torch.stack([each[2] for each in found]).sum(0)
    assert torch.allclose(gradients, truth[2], atol=1e-6)
    for name, sums in truth[3].items():
        if name not in TIMES:
            total = np.sum([each[3][name] for each in found], axis=0).tolist()
            assert total == pytest.approx(sums, abs=1e-4), name


def test_the_engine_and_the_trainer_mean_the_same_distribution(
    tiny_iss_random: Path, work: Path, one_rank: None
) -> None:
    """At another temperature, and with a model that would write the image's placeholder."""
    recipe = build_recipe(tiny_iss_random, work, temperature=0.7, rewards={"format": 1.0})
    groups = build_groups(recipe)
    model = groups.module.model
    image_token_id = model.config.image_token_id
    with torch.no_grad():
        head = model.lm_head.weight
        head[image_token_id] = 30 * head.mean(0)
    share = read_share(recipe)
    batches = groups.prepare(groups.module, share)
    assert model.training
    assert model.model.language_model.training
    said = np.concatenate([batch.input_ids[batch.labels >= 0] for batch in batches])
    assert image_token_id not in said
    _, loss, _, figures = compute(groups, batches, NUM_PROMPTS * NUM_GENERATIONS)
    assert np.isfinite(loss)
    difference, num_tokens = figures["logprob_difference"]
    assert num_tokens == len(said)
    assert difference / num_tokens < 1e-5
    again = groups.prepare(groups.module, share)
    for batch, other in zip(batches, again, strict=True):
        assert np.array_equal(batch.input_ids, other.input_ids)


def test_seeds_differ_in_each_number() -> None:
    numbers = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0)]
    seeds = {make_seed(*each) for each in numbers}
    assert len(seeds) == len(numbers)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert make_seed(1, 2, 3, 4) == make_seed(1, 2, 3, 4)


def test_a_prompt_names_its_completions(tiny_random: Path, work: Path) -> None:
    """Of twelve completions, five ranks make two or three each, every one once."""
    recipe = build_recipe(tiny_random, work)
    made = []
    for rank in range(5):
        prompts = read_prompts(read_share(recipe, rank, 5))
        own = [
            (each.row, each.first_completion + n)
            for each in prompts
            for n in range(each.num_completions)
        ]
        assert len(own) in (2, 3)
        made += own
    assert sorted(made) == [(row, n) for row in range(NUM_PROMPTS) for n in range(NUM_GENERATIONS)]


def test_the_gallery_shows_a_group_and_escapes_its_texts(
    tiny_random: Path, work: Path, one_rank: None
) -> None:
    recipe = build_recipe(tiny_random, work)
    groups = build_groups(recipe)
    fix_completions(groups)
    groups.prepare(groups.module, read_share(recipe))
    page = (work / PAGE).read_text()
    assert "&lt;test&gt;" in page
    assert "<test>" not in page
    assert page.count("data:image/jpeg;base64,") == 1
    assert page.count('class="said"') == NUM_GENERATIONS
    assert "http" not in page
    assert len(page) < 100_000
