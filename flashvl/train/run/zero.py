"""What DeepSpeed keeps of a parameter on this rank, and what it does with gradients.

DeepSpeed lays the parameters that are trained end to end, and gives each rank a part (ZeRO 1-3) or
all of it (ZeRO 0). A `Fragment` names a piece of such a part by its parameter and the place where
it begins in it, which holds at any number of ranks and at any ZeRO stage. All that reads
DeepSpeed's own attributes is here.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from flashvl.train.recipe import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's running means of the gradient and of its square."""
KINDS = ("weight", *MOMENTS)
"""Names of the tensors of a fragment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """A piece of a parameter that this rank updates."""

    name: str
    """Name of the parameter in the module that is trained."""
    start: int
    """Place in the flattened parameter where the piece begins."""
    tensors: dict[str, torch.Tensor]
    """Flat fp32 views of the piece's weights and AdamW's means, by the names in `KINDS`."""


def start_engine(module: nn.Module, groups: list[dict[str, Any]], recipe: Recipe) -> Any:
    """A DeepSpeed engine around `module`, with AdamW.

    The number of micro-batches varies from step to step, so the caller tells the engine which is
    the last one (`set_gradient_accumulation_boundary`), and multiplies the loss by the number of
    ranks, over which DeepSpeed takes the mean.

    Args:
        groups: AdamW's parameter groups: `params` and `lr`.
    """
    if not recipe.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # on import it chooses the accelerator, by the variable set above

    # Otherwise the CPU back end compiles a shared-memory all-reduce, which takes g++ and half a
    # minute; a worker killed meanwhile leaves a lock that later runs wait for. Gloo is as good.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    is_bf16 = recipe.precision == "bf16"
    settings: dict[str, Any] = {
        "train_batch_size": distributed.get_world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.max_grad_norm,
        "zero_optimization": {"stage": recipe.zero_stage},
        "bf16": {"enabled": is_bf16},
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
    if is_bf16 and recipe.zero_stage > 0:  # DeepSpeed has no such mixture without ZeRO
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=groups,
        config=settings,
        dist_init_required=False,  # Ray Train has started the process group
    )
    if is_bf16 and recipe.zero_stage == 0:
        # DeepSpeed makes AdamW's state by a step without gradients, which counts, and decays.
        engine.basic_optimizer.state.clear()
        for low, high in _pairs(engine.optimizer):
            high.data.copy_(low.data)
    return engine


def is_replicated(engine: Any) -> bool:
    """Whether every rank updates all parameters, as without ZeRO."""
    return int(engine.zero_optimization_stage()) == 0


def read_fragments(engine: Any) -> list[Fragment]:
    """The pieces that this rank updates; AdamW's means are made if it has not stepped yet."""
    state = engine.basic_optimizer.state
    fragments = []
    for name, start, flat, offset, length in _pieces(engine):
        _start_adam(state[flat], flat)
        whole = {"weight": flat, **{moment: state[flat][moment] for moment in MOMENTS}}
        tensors = {
            kind: tensor.detach().view(-1).narrow(0, offset, length)
            for kind, tensor in whole.items()
        }
        fragments.append(Fragment(name=name, start=start, tensors=tensors))
    return fragments


def adam_step(engine: Any) -> int:
    """Number of updates that AdamW has made."""
    steps = (float(state["step"]) for state in engine.basic_optimizer.state.values())
    return int(next(steps, 0))


def publish(engine: Any, adam_step: int) -> None:
    """Make the engine compute with what was copied into its fragments.

    Args:
        adam_step: number of updates that have made the fragments.
    """
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(adam_step)
    optimizer, stage = engine.optimizer, int(engine.zero_optimization_stage())
    with torch.no_grad():
        if stage == 3:
            for number in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            optimizer._post_step(set())  # gathers the small weights that ranks hold in full
        elif stage > 0:
            optimizer.update_lp_params()
        elif optimizer is not engine.basic_optimizer:
            for low, high in _pairs(optimizer):
                low.data.copy_(high.data)


def update_weights(engine: Any) -> float | None:
    """Update the weights by the gradients of all backward passes since the last update.

    Returns:
        The norm of the gradient before clipping; None where it is not finite: then nothing changed.
    """
    if engine.optimizer is engine.basic_optimizer:  # plain AdamW, which checks nothing
        gradients = [weight.grad for weight in engine.module.parameters()]
        norm = float(nn.utils.get_total_norm([each for each in gradients if each is not None]))
        if not math.isfinite(norm):
            drop_gradients(engine)
            return None
        engine.step()
        return norm
    engine.step()
    return float(engine.get_global_grad_norm()) if engine.was_step_applied() else None


def drop_gradients(engine: Any) -> None:
    """Forget the gradients of all backward passes since the last update.

    It does what DeepSpeed's optimizers do at an overflow: weights and means stay as they are.
    """
    optimizer, stage = engine.optimizer, int(engine.zero_optimization_stage())
    if optimizer is engine.basic_optimizer:
        engine.zero_grad()
        return
    optimizer.zero_grad()
    if stage == 3:
        optimizer.averaged_gradients = {}
    elif hasattr(optimizer, "averaged_gradients"):  # DeepSpeed's BF16_Optimizer has none
        optimizer._release_preflattened_grad_buffers()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
        for group in optimizer.all_grad_tensors:
            optimizer.all_grad_tensors[group] = None


def _start_adam(state: dict[str, Any], flat: torch.Tensor) -> None:
    """Make the state that AdamW would make at its first step."""
    if not state:
        state["step"] = torch.tensor(0.0)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(flat)


_Piece = tuple[str, int, torch.Tensor, int, int]
"""Parameter's name, place in it, the tensor that AdamW updates, place in that one, length."""


def _pieces(engine: Any) -> Iterator[_Piece]:
    optimizer, stage = engine.optimizer, int(engine.zero_optimization_stage())
    names = {param: name for name, param in engine.module.named_parameters()}
    if optimizer is engine.basic_optimizer:
        for group in optimizer.param_groups:
            for param in group["params"]:
                yield names[param], 0, param, 0, param.numel()
    elif stage == 0:
        for low, high in _pairs(optimizer):
            yield names[low], 0, high, 0, high.numel()
    elif stage == 3:
        yield from _pieces_of_stage_3(optimizer, names)
    else:
        yield from _pieces_of_stages_1_and_2(optimizer, names)


def _pieces_of_stages_1_and_2(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[_Piece]:
    if hasattr(optimizer, "bf16_groups"):  # DeepSpeed's BF16_Optimizer
        groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    else:
        groups, flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    for group, flat in zip(groups, flats, strict=True):
        for param in group:
            mapping = param._hp_mapping
            if mapping is not None:  # else the parameter lies on other ranks
                place = mapping.hp_fragment_address
                start = mapping.lp_fragment_address.start
                yield names[param], start, flat, place.start, place.numel


def _pieces_of_stage_3(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[_Piece]:
    rank = distributed.get_rank()
    groups = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    for group, flat in groups:
        offset = 0
        for param in group:
            start = rank * param.partition_numel()
            length = min(param.partition_numel(), param.ds_numel - start)
            if length > 0:  # the last ranks' parts of a parameter may be padding
                yield names[param], start, flat, offset, length
            offset += param.partition_numel()


def _pairs(optimizer: Any) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Each bf16 parameter with its fp32 master, of DeepSpeed's optimizer without ZeRO."""
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    for low_group, high_group in groups:
        yield from zip(low_group, high_group, strict=True)
