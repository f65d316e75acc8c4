"""What a stage will take: memory of each GPU, time, network, storage, GPU-hours and money.

It needs neither Ray nor a GPU, and while the data or the model of the stage does not exist, it goes
by the mixture's counts, by `preset` and by `Assumptions`. What it leaves out: evaluations, the
start of the workers, and steps that are made again after a failure.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flashvl.errors import ConfigError
from flashvl.model import FlashVLConfig
from flashvl.train.flops import training_flops
from flashvl.train.parameters import Parameters, count_parameters
from flashvl.train.plan.activations import BatchSize
from flashvl.train.plan.assumptions import Assumptions
from flashvl.train.plan.gpus import GIB, Gpu, find_gpu
from flashvl.train.plan.memory import Memory, plan_memory, sending_bytes
from flashvl.train.plan.rollouts import rollout_seconds
from flashvl.train.plan.row_sizes import RowSize, count_rows, find_config, sample_rows
from flashvl.train.recipe import AnyRecipe, CellsRecipe, DpoRecipe, GrpoRecipe

GB = 10**9
HOST_GB_PER_S = 10
"""Rate at which a GPU copies to the host's memory, through PCIe 4 shared by two GPUs."""
UPDATE_BYTES = 28
"""Bytes that AdamW reads and writes of a parameter: three fp32 numbers each way, and a gradient."""
DECODE_MS, RESIZE_MS = 2.7, 5.7
"""Time of a core to decode a JPEG of 1024 x 768, and to resize it to a tile of 512 x 512."""
BUDGETS = 256
"""Tokens of which `token_budget` is proposed as a multiple."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Bytes that each GPU sends in a step, and what follows from them."""

    gradient_bytes: float
    weight_bytes: float
    """Updated weights, which ZeRO gathers from the GPUs that hold them."""
    seconds: float
    """Time of both at the assumed bandwidth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """What a checkpoint takes, and how many there will be."""

    size_bytes: int
    """fp32 weights and AdamW's two means of all parameters that are trained."""
    copy_s: float
    """Time that training stands still for one: each GPU copies its part to the host's memory."""
    write_s: float
    """Time until it is in the store, while training goes on."""
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """What the feed needs while the GPUs compute."""

    rows_per_s: float
    bytes_per_s: float
    cores: float
    """Cores that decode and resize all the time."""
    total_bytes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The plan of a stage."""

    stage: str
    gpu: Gpu
    num_gpus: int
    assumptions: Assumptions
    parameters: Parameters
    row: RowSize
    num_rows: int
    num_steps: int
    global_batch_size: int
    rows_of_a_gpu: int
    """Rows of a step on the GPU that has most of them."""
    micro_batches: int
    """Micro-batches of a step on a GPU."""
    token_budget: int
    precision: str
    zero_stage: int
    gradient_checkpointing: bool
    save_steps: int
    memory: Memory
    """Memory of a micro-batch that fills `token_budget`."""
    usable_bytes: int
    """Memory of a GPU, less the reserve."""
    largest_token_budget: int
    tflop_of_a_row: float
    """Forward and backward pass, without the layers that gradient checkpointing computes again."""
    compute_s: float
    """Time of a step's passes at the assumed MFU."""
    update_s: float
    """Time of AdamW, which waits for the GPU's memory alone."""
    rollout_s: float
    """Time to sample a step's completions; 0 for kinds that sample none."""
    network: Network
    checkpoints: Checkpoints
    loading: Loading

    @property
    def step_s(self) -> float:
        """Time of a step, if computing and network overlap."""
        return max(self.compute_s, self.network.seconds) + self.update_s + self.rollout_s

    @property
    def hours(self) -> float:
        seconds = self.num_steps * self.step_s + self.checkpoints.count * self.checkpoints.copy_s
        return seconds / 3600

    @property
    def hours_without_overlap(self) -> float:
        return self.hours + self.num_steps * min(self.compute_s, self.network.seconds) / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.num_gpus

    @property
    def rows_per_s_of_a_gpu(self) -> float:
        return self.global_batch_size / self.num_gpus / self.step_s

    @property
    def cost(self) -> float | None:
        price = self.assumptions.price
        return None if price is None else price * self.gpu_hours

    def describe(self) -> dict[str, Any]:
        """The plan for JSON: sizes in bytes, times in the unit that a name ends with."""
        derived = ("step_s", "hours", "hours_without_overlap", "gpu_hours", "rows_per_s_of_a_gpu")
        values = asdict(self) | {"assumptions": self.assumptions.model_dump()}
        values["memory"]["total"] = self.memory.total
        values["parameters"]["paper_millions"] = round(self.parameters.paper_millions, 2)
        values["row"]["num_tokens"] = self.row.num_tokens
        return values | {name: getattr(self, name) for name in derived} | {"cost": self.cost}


def describe_all(plans: Sequence[Plan]) -> dict[str, Any]:
    """The plans of several stages for JSON, with their sums."""
    costs = [plan.cost for plan in plans if plan.cost is not None]
    return {
        "stages": [plan.describe() for plan in plans],
        "hours": sum(plan.hours for plan in plans),
        "gpu_hours": sum(plan.gpu_hours for plan in plans),
        "cost": sum(costs) if costs else None,
    }


def build_plan(recipe: AnyRecipe, assumptions: Assumptions) -> Plan:
    """The plan of a stage.

    Raises:
        ConfigError: the stage does not fit the GPUs, has fewer rows than GPUs in a step, trains
            another number of parameters than its recipe says, or its rows cannot be counted.
    """
    gpu = find_gpu(assumptions.gpu)
    num_gpus = assumptions.gpus or recipe.num_workers
    is_grpo = isinstance(recipe, GrpoRecipe)
    num_generations = recipe.num_generations if isinstance(recipe, GrpoRecipe) else 1
    units = recipe.global_batch_size * num_generations  # what GPUs may share, at the least
    if num_gpus > units:
        raise ConfigError(
            f"{num_gpus} GPUs are more than the {units} {'completions' if is_grpo else 'rows'} of a"
            f" step (global_batch_size); plan for {units} GPUs at most"
        )
    config = find_config(recipe)
    num_rows = assumptions.rows or count_rows(recipe)
    row = _find_row(
        recipe, config, assumptions, num_branches=min(num_generations, -(-units // num_gpus))
    )
    image_bytes = assumptions.image_kb * 1000 * assumptions.images
    stage = _Stage(recipe, config, num_gpus, row)
    usable = int(gpu.memory_gib * GIB * (1 - assumptions.reserve))
    memory = stage.memory()
    if memory.total > usable:
        raise ConfigError(_refusal(stage, gpu, memory, usable))
    # A GPU has whole prompts, or part of one's completions.
    rows_of_a_gpu = -(-recipe.global_batch_size // num_gpus)
    num_steps = -(-num_rows // recipe.global_batch_size)
    rows_at_once = max(1, int(recipe.token_budget / row.num_tokens))
    micro_batches = -(-rows_of_a_gpu // rows_at_once)
    executed = stage.flops(recipe.gradient_checkpointing)
    compute_s = rows_of_a_gpu * executed / (assumptions.mfu * gpu.bf16_tflops * 1e12)
    gradient_bytes, weight_bytes = sending_bytes(
        stage.parameters,
        precision=recipe.precision,
        zero_stage=recipe.zero_stage,
        num_workers=num_gpus,
        micro_batches=micro_batches,
    )
    network = Network(
        gradient_bytes=gradient_bytes,
        weight_bytes=weight_bytes,
        seconds=(gradient_bytes + weight_bytes) / (assumptions.network * GB),
    )
    share = num_gpus if recipe.zero_stage > 0 else 1
    update_s = UPDATE_BYTES * stage.parameters.num_trained / share / (gpu.bandwidth_gb_per_s * GB)
    rollout_s = 0.0
    if is_grpo:
        rollout_s = rollout_seconds(config, row, rows_of_a_gpu, gpu, mfu=assumptions.mfu)
    step_s = max(compute_s, network.seconds) + update_s + rollout_s
    rows_per_s = recipe.global_batch_size / step_s
    return Plan(
        stage=recipe.stage,
        gpu=gpu,
        num_gpus=num_gpus,
        assumptions=assumptions,
        parameters=stage.parameters,
        row=row,
        num_rows=num_rows,
        num_steps=num_steps,
        global_batch_size=recipe.global_batch_size,
        rows_of_a_gpu=rows_of_a_gpu,
        micro_batches=micro_batches,
        token_budget=recipe.token_budget,
        precision=recipe.precision,
        zero_stage=recipe.zero_stage,
        gradient_checkpointing=recipe.gradient_checkpointing,
        save_steps=recipe.save_steps,
        memory=memory,
        usable_bytes=usable,
        largest_token_budget=stage.largest_token_budget(usable),
        tflop_of_a_row=stage.flops(gradient_checkpointing=False) / 1e12,
        compute_s=compute_s,
        update_s=update_s,
        rollout_s=rollout_s,
        network=network,
        checkpoints=_checkpoints(recipe, stage.parameters, num_gpus, num_steps, assumptions),
        loading=Loading(
            rows_per_s=rows_per_s,
            bytes_per_s=rows_per_s * image_bytes,
            cores=rows_per_s * (DECODE_MS * assumptions.images + RESIZE_MS * row.num_tiles) / 1000,
            total_bytes=float(num_rows) * image_bytes,
        ),
    )


def _find_row(
    recipe: AnyRecipe, config: FlashVLConfig, assumptions: Assumptions, num_branches: int
) -> RowSize:
    """The mean row of a stage, as a GPU computes it.

    Args:
        num_branches: completions of a prompt on a GPU, for a stage that samples them.
    """
    text, images = assumptions.text_tokens, assumptions.images
    if isinstance(recipe, GrpoRecipe):
        prompt = sample_rows(recipe) or RowSize.assume(config, 0, images)
        return prompt.with_branches(min(text, recipe.max_completion_length), num_branches)
    num_answers = 2 if isinstance(recipe, DpoRecipe) else 0
    return sample_rows(recipe) or RowSize.assume(config, text, images, num_answers)


class _Stage:
    """A recipe on a number of GPUs, whose memory and FLOPs are asked for in several ways."""

    def __init__(self, recipe: AnyRecipe, config: FlashVLConfig, num_gpus: int, row: RowSize):
        self.recipe, self.config, self.num_gpus, self.row = recipe, config, num_gpus, row
        self.has_lora = recipe.lora is not None
        rank = recipe.lora.r if recipe.lora is not None else None
        self.parameters = count_parameters(config, recipe.trainable, rank)
        if isinstance(recipe, CellsRecipe):  # the tower alone, with a small layer of its own
            self.parameters = self.parameters.only("vision_tower")
        wanted = recipe.num_trainable_params
        if wanted not in (None, self.parameters.num_trained):
            raise ConfigError(
                f"num_trainable_params ({wanted}) is not the number of parameters that"
                f" {', '.join(recipe.trainable)} have ({self.parameters.num_trained}); correct it,"
                " or trainable"
            )

    def flops(self, gradient_checkpointing: bool) -> float:
        """FLOPs of a row of mean size."""
        row = self.row
        if isinstance(self.recipe, CellsRecipe):
            return row.num_tiles * training_flops(self.config, ["vision_tower"], 0, 1, num_labels=0)
        return training_flops(
            self.config,
            self.recipe.trainable,
            row.num_tokens,
            row.num_tiles,
            gradient_checkpointing,
            num_labels=row.num_labels,
            branches=row.branches,
            has_lora=self.has_lora,
            has_reference=self.recipe.has_reference,
        )

    def memory(self, token_budget: int | None = None, **changed: Any) -> Memory:
        """Memory with a `token_budget` full of rows of mean size.

        Args:
            changed: `zero_stage` or `gradient_checkpointing`, where not the recipe's.
        """
        recipe = self.recipe
        num_rows = (token_budget or recipe.token_budget) / self.row.num_tokens
        is_cells = isinstance(recipe, CellsRecipe)
        size = BatchSize(
            num_tokens=0 if is_cells else round(num_rows * self.row.num_tokens),
            num_tiles=round(num_rows * self.row.num_tiles),
            num_labels=0 if is_cells else round(num_rows * self.row.num_labels),
        )
        options: dict[str, Any] = {
            "zero_stage": recipe.zero_stage,
            "gradient_checkpointing": recipe.gradient_checkpointing,
        }
        return plan_memory(
            self.config,
            self.parameters,
            recipe.trainable,
            size,
            precision=recipe.precision,
            num_workers=self.num_gpus,
            has_lora=self.has_lora,
            has_reference=recipe.has_reference,
            **(options | changed),
        )

    def largest_token_budget(self, usable: int, **changed: Any) -> int:
        """The largest multiple of `BUDGETS` that fits; 0 if none does."""
        return BUDGETS * _last(lambda n: self.memory(n * BUDGETS, **changed).total <= usable)


def _last(fits: Callable[[int], bool]) -> int:
    """The last of 1, 2, ... that `fits`, which holds up to some number and not after it."""
    if not fits(1):
        return 0
    low = 1
    while fits(2 * low) and low < 2**20:
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _refusal(stage: _Stage, gpu: Gpu, memory: Memory, usable: int) -> str:
    """Why a stage does not fit, in one line, with the change that would help."""
    recipe = stage.recipe
    parts = asdict(memory).items()
    needed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts if size > 0.05 * GIB)
    return (
        f"{recipe.stage} needs {memory.total / GIB:.1f} GiB on each of {stage.num_gpus} GPUs"
        f" ({needed}), an {gpu.name} has {usable / GIB:.1f} GiB for it; {_remedy(stage, usable)}"
    )


def _remedy(stage: _Stage, usable: int) -> str:
    recipe = stage.recipe
    changes: list[tuple[str, dict[str, Any]]] = [("", {})]
    if not recipe.gradient_checkpointing:
        changes.append(("gradient_checkpointing=true", {"gradient_checkpointing": True}))
    for zero_stage in range(recipe.zero_stage + 1, 4):
        name = f"zero_stage={zero_stage} gradient_checkpointing=true"
        changes.append((name, {"zero_stage": zero_stage, "gradient_checkpointing": True}))
    for name, changed in changes:
        budget = stage.largest_token_budget(usable, **changed)
        if budget >= recipe.token_budget:
            return f"set {name}"
        if budget >= recipe.max_length:
            return f"set {f'{name} ' if name else ''}token_budget={budget}"
    return "plan for GPUs with more memory, or lower max_length and token_budget"


def _checkpoints(
    recipe: AnyRecipe,
    parameters: Parameters,
    num_gpus: int,
    num_steps: int,
    assumptions: Assumptions,
) -> Checkpoints:
    size = 12 * parameters.num_trained
    share = num_gpus if recipe.zero_stage > 0 else 1
    return Checkpoints(
        size_bytes=size,
        copy_s=size / share / (HOST_GB_PER_S * GB),
        write_s=size / (assumptions.store * GB),
        count=-(-num_steps // recipe.save_steps),
    )
