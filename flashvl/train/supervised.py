"""The training loop of a worker: stages 1-4 and the pre-trainings, by a DeepSpeed engine.

It runs inside Ray Train's `TorchTrainer`, which `launch.run` starts.
"""

import itertools
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

import ray.train
import torch
from ray.util.queue import Queue
from torch import distributed, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from flashvl.model.loading import load_model, load_processor
from flashvl.train.checkpoint import save_checkpoint
from flashvl.train.objectives import OBJECTIVES, Objective, Tensors
from flashvl.train.recipe import AnyRecipe, ModelPart, Recipe

Record = dict[str, float]
"""Figures of one step: step, loss, learning_rate, grad_norm, seconds so far, samples_per_s."""


def train_worker(config: dict[str, Any]) -> None:
    """Run one worker of a stage.

    Args:
        config: `recipe`, `num_steps`, and `progress`, a queue for the records of the steps.
    """
    recipe: AnyRecipe = config["recipe"]
    num_steps: int = config["num_steps"]
    torch.set_num_threads(recipe.threads_per_worker)
    torch.manual_seed(recipe.seed)

    processor = load_processor(recipe.init_from)
    model = load_model(recipe.init_from).train()
    freeze_all_but(model, recipe.trainable)
    objective: Objective = OBJECTIVES[recipe.kind](model, processor)
    engine = start_engine(objective.module, recipe, num_steps)
    shard = ray.train.get_dataset_shard("train")
    batches = shard.iter_torch_batches(
        batch_size=recipe.per_device_train_batch_size,
        collate_fn=objective.collate,
        prefetch_batches=2,
        drop_last=True,
    )
    log = train_steps(engine, objective, batches, recipe, config["progress"])
    if not log:
        return  # `launch.run` reports that no row could be used

    ray.train.report({"loss": log[-1]["loss"], "step": len(log)})
    if ray.train.get_context().get_world_rank() == 0:
        save_checkpoint(model, processor, recipe, log)


def freeze_all_but(model: nn.Module, trainable: Iterable[ModelPart]) -> None:
    """Let only the parts `trainable` of the model learn; the head is part of the language model."""
    model.requires_grad_(False)
    for part in trainable:
        model.get_submodule(f"model.{part}").requires_grad_(True)
        if part == "language_model":
            model.get_submodule("lm_head").requires_grad_(True)


def start_engine(module: nn.Module, recipe: Recipe, num_steps: int) -> Any:
    """A DeepSpeed engine around `module`, with AdamW and the recipe's cosine schedule."""
    if not recipe.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # on import it chooses the accelerator, by the variable set above

    # Otherwise the CPU back end compiles a shared-memory all-reduce, which takes g++ and half a
    # minute; a worker killed meanwhile leaves a lock that later runs wait for. Gloo is as good.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    settings = {
        "train_batch_size": recipe.global_batch_size,
        "train_micro_batch_size_per_gpu": recipe.per_device_train_batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "gradient_clipping": recipe.max_grad_norm,
        "zero_optimization": {"stage": recipe.zero_stage},
        "bf16": {"enabled": recipe.precision == "bf16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": recipe.learning_rate,
                "betas": [0.9, recipe.adam_beta2],
                "weight_decay": recipe.weight_decay,
                "torch_adam": True,  # DeepSpeed's own would be compiled at the first step
            },
        },
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
        config=settings,
        dist_init_required=False,  # Ray Train has started the process group
        lr_scheduler=lambda optimizer: get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, recipe.warmup_steps, num_steps, min_lr=recipe.min_learning_rate
        ),
    )
    return engine


def train_steps(
    engine: Any,
    objective: Objective,
    batches: Iterable[Tensors],
    recipe: Recipe,
    progress: Queue,
) -> list[Record]:
    """Train on all `batches`; returns a record of each step, which the first worker reports too."""
    writer = SummaryWriter(recipe.output_dir / "runs") if distributed.get_rank() == 0 else None
    log: list[Record] = []
    start = time.perf_counter()
    for window in _windows(batches, recipe.gradient_accumulation_steps):
        loss = _train_step(engine, objective, window)
        seconds = time.perf_counter() - start
        record = {
            "step": len(log) + 1,
            "loss": loss,
            "learning_rate": engine.get_lr()[0],
            "grad_norm": float(engine.get_global_grad_norm() or 0.0),
            "seconds": seconds,
            "samples_per_s": (len(log) + 1) * recipe.global_batch_size / seconds,
        }
        log.append(record)
        if writer is not None:
            for name in ("loss", "learning_rate", "grad_norm", "samples_per_s"):
                writer.add_scalar(f"train/{name}", record[name], len(log))
            progress.actor.put_nowait.remote(record)  # not waited for
    if writer is not None:
        writer.close()
    return log


def _windows(batches: Iterable[Tensors], size: int) -> Iterator[list[Tensors]]:
    """Groups of `size` micro-batches, one for each step; an incomplete last one is left out."""
    iterator = iter(batches)
    while len(window := list(itertools.islice(iterator, size))) == size:
        yield window


def _train_step(engine: Any, objective: Objective, window: list[Tensors]) -> float:
    """Make one optimizer step; returns the mean loss over the items of the global batch."""
    local_items = sum(objective.num_items(batch) for batch in window)
    num_items = torch.tensor(float(local_items), device=engine.device)
    distributed.all_reduce(num_items)
    num_items /= len(window) * distributed.get_world_size()
    total = torch.zeros((), device=engine.device)
    for batch in window:
        batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
        loss = objective.loss(engine, batch, num_items)
        engine.backward(loss)
        engine.step()
        total += loss.detach()
    distributed.all_reduce(total)
    return float(total) / (len(window) * distributed.get_world_size())
