"""The training loop of a worker: stages 1-4 and the pre-trainings, by a DeepSpeed engine.

It runs inside Ray Train's `TorchTrainer`, which `launch.run` starts.
"""

import os
import time
from collections.abc import Iterable
from typing import Any

import ray.train
import torch
from ray.util.queue import Queue
from torch import distributed, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from flashvl.model.loading import load_model, load_processor
from flashvl.train.checkpoint import save_checkpoint
from flashvl.train.feed import read_shares
from flashvl.train.objectives import OBJECTIVES, Objective
from flashvl.train.recipe import AnyRecipe, ModelPart, Recipe
from flashvl.train.shares import Share

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
    rank = ray.train.get_context().get_world_rank()
    shares = read_shares(ray.train.get_dataset_shard("train"), rank, first_step=0)
    log = train_steps(engine, objective, shares, recipe, config["progress"])
    if not log:
        return  # `launch.run` reports that no row could be used

    ray.train.report({"loss": log[-1]["loss"], "step": len(log)})
    if rank == 0:
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
        # The number of micro-batches differs from step to step; `_train_step` sets the boundary.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
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
    shares: Iterable[Share],
    recipe: Recipe,
    progress: Queue,
) -> list[Record]:
    """Train on all `shares`; returns a record of each step, which the first worker reports too."""
    writer = SummaryWriter(recipe.output_dir / "runs") if distributed.get_rank() == 0 else None
    log: list[Record] = []
    start = time.perf_counter()
    for share in shares:
        loss = _train_step(engine, objective, share)
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


def _train_step(engine: Any, objective: Objective, share: Share) -> float:
    """Make one optimizer step; returns the mean loss over the items of the global batch."""
    num_workers = distributed.get_world_size()
    local_items = sum(map(objective.num_items, share.micro_batches))
    num_items = torch.tensor(float(local_items), device=engine.device)
    distributed.all_reduce(num_items)
    num_items.clamp_(min=1)
    total = torch.zeros((), device=engine.device)
    for number, micro_batch in enumerate(share.micro_batches, 1):
        batch = objective.collate(micro_batch)
        batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
        engine.set_gradient_accumulation_boundary(number == len(share.micro_batches))
        loss, _ = objective.loss(engine, batch, num_items)
        engine.backward(loss * num_workers)  # DeepSpeed averages over the workers
        engine.step()
        total += loss.detach()
    distributed.all_reduce(total)
    return float(total)
