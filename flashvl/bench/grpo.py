"""Completions a second of GRPO's rollouts, and seconds of a whole step, beside TRL's trainer.

    flashvl bench grpo

Both sample the same groups: completions of questions about pictures of the procedural world. TRL's
trainer does so by `generate`, and is used as it comes, without gradient checkpointing, which would
only slow it down. Both train adapters of the same layers, and both prepare pictures and questions
within the time that is measured.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from torch import distributed
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import prepare_multimodal_messages

from flashvl.bench.models import RandomWeights, build_random, check_preset
from flashvl.data import synthetic
from flashvl.data.features import ask_about_image, encode_prompt, make_tiles
from flashvl.data.schema import PROMPTS
from flashvl.data.storage import locate
from flashvl.engine import Engine, Request
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.loading import load_model, load_processor
from flashvl.progress import ShowProgress, ignore_progress
from flashvl.train.feed.feed import build_feed, read_steps
from flashvl.train.feed.mixture import TrainingData
from flashvl.train.feed.shares import decode_share
from flashvl.train.grpo.objective import Groups
from flashvl.train.recipe import GrpoRecipe, LoraSettings, ModelPart
from flashvl.train.rewards.functions import exact_match
from flashvl.train.run.lora import add_adapters
from flashvl.train.run.worker import prepare_parts

NUM_GENERATIONS = 24
"""Completions of each prompt, as in the paper."""
BETA = 0.001
TRAINABLE: tuple[ModelPart, ...] = ("multi_modal_projector", "language_model")
ADAPTERS = LoraSettings(r=16, alpha=32, dropout=0.0)
MAX_LENGTH = 2048
"""Tokens of a prompt at most; fewer where the model takes no more."""
TOKEN_BUDGET = 4096
"""Tokens of a micro-batch at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSpeed:
    """Completions a second, medians over the rounds."""

    trl: float
    flashvl: float
    times_trl: float
    """`flashvl / trl`, the median of the rounds' own ratios."""
    prompt_tokens: float
    """Mean tokens of a prompt, its picture's included."""
    trl_tokens: float
    """Mean tokens of TRL's completions, their end tokens included."""
    flashvl_tokens: float
    """Mean tokens of the engine's completions, likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSpeed:
    """Seconds of a step, medians over the rounds."""

    trl: float
    flashvl: float
    rollout: float
    """Seconds of our step that sampling takes."""
    update: float
    """Seconds of our step that the update takes, from micro-batches to new weights."""
    times_trl: float
    """`trl / flashvl`, the median of the rounds' own ratios."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoSpeed:
    """What `flashvl bench grpo` measures."""

    num_prompts: int
    max_completion_length: int
    rollouts: RolloutSpeed
    step: StepSpeed | None
    """None: steps are not measured with random weights."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question about a picture."""

    image: Image.Image
    question: str
    answer: str


def draw_problems(start: int, count: int) -> list[Problem]:
    """Problems of the procedural world from a place of their series on, each with one question."""
    drawn = [synthetic.sample("train", 0, start + place) for place in range(count)]
    turns = [each.turns[-1] for each in drawn]
    return [
        Problem(each.image(), turn.question, turn.answer)
        for each, turn in zip(drawn, turns, strict=True)
    ]


def measure_grpo(
    model: str,
    preset: str | None,
    random_weights: bool,
    *,
    num_layers: int | None,
    num_prompts: int,
    num_tokens: int,
    rounds: int,
    on_progress: ShowProgress = ignore_progress,
) -> GrpoSpeed:
    """Time rollouts and steps of both in turn, `rounds` times, on one thread.

    Args:
        num_layers: layers of tower and LLM of a preset; None: all.
        num_tokens: tokens of a completion at most.

    Raises:
        CheckpointError: `model` does not exist, or cannot be loaded.
        ConfigError: the preset is unknown, or only one of `preset` and `random_weights` is given.
    """
    check_preset(preset, random_weights)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, _process_group(scratch):
        if preset is not None:
            weights = RandomWeights.for_this_machine()
            first, processor = build_random(preset, weights, num_layers)
            second, _ = build_random(preset, weights, num_layers)
        else:
            first, second = load_model(model), load_model(model)
            processor = load_processor(model)
        names = _add_adapters(second)
        problems = draw_problems(0, (rounds + 1) * num_prompts)
        trainer = _build_trainer(
            first, processor, names, problems, num_prompts, num_tokens, scratch
        )
        sampler = _Rollouts(second, processor, num_prompts, num_tokens)
        rollouts = _compare_rollouts(trainer, sampler, num_prompts, rounds, on_progress)
        step = None
        if preset is None:
            ours = _Steps(model, problems, num_prompts, num_tokens, Path(scratch))
            step = _compare_steps(trainer, ours, rounds, on_progress)
    return GrpoSpeed(
        num_prompts=num_prompts, max_completion_length=num_tokens, rollouts=rollouts, step=step
    )


@contextmanager
def _process_group(scratch: str) -> Iterator[None]:
    """A group of this process alone: a worker of a stage always has one."""
    store = f"file://{scratch}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _add_adapters(model: FlashVLForConditionalGeneration) -> list[str]:
    """Put adapters on a model; returns the names of their layers."""
    add_adapters(model, ADAPTERS, TRAINABLE)
    adapted = (name for name, _ in model.named_parameters() if ".lora_" in name)
    return sorted({name.partition(".lora_")[0] for name in adapted})


class _Rollouts:
    """The engine on a model that is being trained."""

    def __init__(
        self,
        model: FlashVLForConditionalGeneration,
        processor: FlashVLProcessor,
        num_prompts: int,
        num_tokens: int,
    ):
        self.processor, self.num_tokens = processor, num_tokens
        self.engine = Engine(
            model.train(),
            processor,
            max_num_seqs=num_prompts * NUM_GENERATIONS,
            max_model_len=MAX_LENGTH + num_tokens,
            is_trained=True,
        )
        self.num_sampled = 0

    def sample(self, problems: Sequence[Problem]) -> tuple[list[int], list[int]]:
        """Sample a group for each problem; returns the tokens of prompts and completions."""
        requests = []
        for problem in problems:
            tiles = make_tiles([problem.image], self.processor)
            messages = ask_about_image(problem.question)
            prompt = encode_prompt(messages, tiles.counts, self.processor)
            for _ in range(NUM_GENERATIONS):
                self.num_sampled += 1
                request = Request(
                    prompt=prompt,
                    images=tiles,
                    max_new_tokens=self.num_tokens,
                    temperature=1.0,
                    logprobs=0,
                    seed=self.num_sampled,
                )
                requests.append(request)
        found = self.engine.generate(requests)
        lengths = [len(each.token_ids) + (each.end is not None) for each in found]
        return [each.prompt_tokens for each in found], lengths


def _build_trainer(
    model: FlashVLForConditionalGeneration,
    processor: FlashVLProcessor,
    names: list[str],
    problems: Sequence[Problem],
    num_prompts: int,
    num_tokens: int,
    scratch: str,
) -> GRPOTrainer:
    """TRL's trainer, which takes one step for each `num_prompts` problems."""
    rows = [
        {
            "prompt": [{"role": "user", "content": problem.question}],
            "images": [problem.image],
            "answer": problem.answer,
        }
        for problem in problems
    ]
    return GRPOTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=[exact_match],
        peft_config=LoraConfig(r=ADAPTERS.r, lora_alpha=ADAPTERS.alpha, target_modules=names),
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=num_prompts * NUM_GENERATIONS,
            num_generations=NUM_GENERATIONS,
            max_completion_length=num_tokens,
            max_steps=len(problems) // num_prompts,
            beta=BETA,
            loss_type="grpo",
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            log_level="error",
        ),
    )


def _sample_by_trl(trainer: GRPOTrainer, problems: Sequence[Problem]) -> list[int]:
    """Sample a group for each problem by the trainer's own path; returns the tokens of each."""
    trainer.model.train()
    prompts = [
        prepare_multimodal_messages(
            [{"role": "user", "content": problem.question}], images=[problem.image]
        )
        for problem in problems
        for _ in range(NUM_GENERATIONS)
    ]
    return list(map(len, trainer._generate(prompts)[1]))


def _compare_rollouts(
    trainer: GRPOTrainer,
    sampler: _Rollouts,
    num_prompts: int,
    rounds: int,
    on_progress: ShowProgress,
) -> RolloutSpeed:
    found: list[dict[str, float]] = []
    for number in range(rounds):
        problems = draw_problems((1000 + number) * num_prompts, num_prompts)
        if number == 0 and rounds > 1:  # libraries initialise
            sampler.sample(problems[:1])
            _sample_by_trl(trainer, problems[:1])
        on_progress(2 * number, 4 * rounds, "rollouts by TRL")
        start_s = time.perf_counter()
        trl_lengths = _sample_by_trl(trainer, problems)
        middle_s = time.perf_counter()
        on_progress(2 * number + 1, 4 * rounds, "rollouts by the engine")
        begin_s = time.perf_counter()
        prompt_lengths, lengths = sampler.sample(problems)
        end_s = time.perf_counter()
        count = num_prompts * NUM_GENERATIONS
        found.append(
            {
                "trl": count / (middle_s - start_s),
                "flashvl": count / (end_s - begin_s),
                "times_trl": (middle_s - start_s) / (end_s - begin_s),
                "prompt_tokens": statistics.mean(prompt_lengths),
                "trl_tokens": statistics.mean(trl_lengths),
                "flashvl_tokens": statistics.mean(lengths),
            }
        )
    return RolloutSpeed(**_medians(found))


class _Steps:
    """Our steps, from rows of a table to new weights, in a loop without DeepSpeed."""

    def __init__(
        self,
        model: str,
        problems: Sequence[Problem],
        num_prompts: int,
        num_tokens: int,
        scratch: Path,
    ):
        table, output = scratch / "problems.parquet", scratch / "output"
        output.mkdir()
        self.model = load_model(model).train()
        longest = self.model.config.text_config.max_position_embeddings
        rows = [
            {
                "row": row,
                "images": [synthetic.encode_jpeg(problem.image, 90)],
                "prompt": ask_about_image(problem.question),
                "answer": problem.answer,
            }
            for row, problem in enumerate(problems)
        ]
        pq.write_table(pa.Table.from_pylist(rows, PROMPTS), table)
        recipe = GrpoRecipe(
            kind="grpo",
            stage="bench",
            init_from=model,
            output_dir=str(output),
            data=TrainingData(parquet=str(table)),
            trainable=TRAINABLE,
            lora=ADAPTERS,
            global_batch_size=num_prompts,
            num_generations=NUM_GENERATIONS,
            max_completion_length=num_tokens,
            max_length=min(MAX_LENGTH, longest - num_tokens),
            token_budget=TOKEN_BUDGET,
            rewards={"exact_match": 1.0},
            beta=BETA,
            precision="fp32",
            use_gpu=torch.cuda.is_available(),
        )
        adapters = prepare_parts(self.model, recipe)
        processor = load_processor(model)
        self.objective = Groups(self.model, processor, recipe, adapters, locate(str(output)))
        self.feed = build_feed(
            recipe.data,
            model=model,
            global_batch_size=num_prompts,
            max_length=recipe.max_length,
            token_budget=recipe.token_budget,
            seed=0,
            kind="grpo",
            num_generations=NUM_GENERATIONS,
        )
        self.weights = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=recipe.learning_rate)
        self.num_steps = 0

    def step(self) -> dict[str, float]:
        """Take a step; returns the seconds of it and of its parts."""
        start_s = time.perf_counter()
        (table,) = read_steps(self.feed, range(self.num_steps, self.num_steps + 1), 1)
        self.num_steps += 1
        objective = self.objective
        batches = objective.prepare(objective.module, decode_share(table))
        num_items = torch.tensor(float(sum(objective.count_items(each).sum() for each in batches)))
        for batch in batches:
            loss, _ = objective.loss(objective.module, objective.collate(batch), num_items)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start_s
        figures = objective.take_figures()
        return {
            "flashvl": seconds,
            "rollout": figures["rollout_s"][0],
            "update": figures["update_s"][0],
        }


class _Turns(TrainerCallback):
    """Times each step of TRL's trainer, and has ours take one after it."""

    def __init__(self, ours: Callable[[], dict[str, float]], on_step: Callable[[int], None]):
        self.ours, self.on_step = ours, on_step
        self.found: list[dict[str, float]] = []
        self._start_s = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start_s = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        trl_s = time.perf_counter() - self._start_s
        seconds = self.ours()
        self.found.append(seconds | {"trl": trl_s, "times_trl": trl_s / seconds["flashvl"]})
        self.on_step(len(self.found))


def _compare_steps(
    trainer: GRPOTrainer, ours: _Steps, rounds: int, on_progress: ShowProgress
) -> StepSpeed:
    turns = _Turns(ours.step, lambda done: on_progress(2 * rounds + done, 4 * rounds, "steps"))
    trainer.add_callback(turns)
    trainer.train()
    return StepSpeed(**_medians(turns.found[1:]))  # libraries initialise in the first one


def _medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in found) for name in found[0]}
