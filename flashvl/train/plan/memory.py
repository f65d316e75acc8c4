"""GPU memory of a worker: what DeepSpeed keeps of the model, and what a micro-batch adds.

The sizes of DeepSpeed's copies follow Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054, section 3
and figure 1, with what DeepSpeed 0.19 does in each stage (`runtime/zero/stage_1_and_2.py`,
`runtime/bf16_optimizer.py`, `runtime/zero/stage3.py`).
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass

from flashvl.model import FlashVLConfig
from flashvl.train.parameters import Parameters
from flashvl.train.plan.activations import FLOAT, BatchSize, activation_bytes, logits_bytes

BUCKET = 500_000_000
"""Gradients that DeepSpeed sends at once (its `reduce_bucket_size`): it holds a copy of them."""
LIVE = 1_000_000_000
"""Parameters that ZeRO 3 keeps gathered (its `stage3_max_live_parameters`)."""
MOMENTS = 2 * FLOAT
"""Bytes of AdamW's two running means of a parameter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on each GPU at the height of a step, by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 master weights and AdamW's two running means."""
    activations: int
    logits: int
    buffers: int
    """Copies that DeepSpeed makes to send gradients."""
    reference: int
    """Frozen copy of the weights that the stage starts from, where there are no adapters to turn
    off; a tower that is not trained is not copied."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """Bytes that stay from step to step, and those of DeepSpeed's copies."""

    weights: int
    gradients: int
    optimizer: int
    sending: int
    """Copies of gradients while they are sent, at the end of a step, when no activations are left
    but in ZeRO 2 and 3, which send during the backward pass."""
    stepping: int
    """Gradients in fp32 and temporaries of AdamW, while weights are updated."""
    sends_in_backward: bool


def state_bytes(
    parameters: Parameters, *, precision: str, zero_stage: int, num_workers: int
) -> States:
    """Bytes of weights, gradients and optimizer of P parameters, T of them trained, on D workers.

        b = 2 in bf16, 4 in fp32     weights  gradients   optimizer     copies while sending
        ZeRO 0                       b P      b T         12 T [8 T]    b min(T, bucket)
        ZeRO 1                       b P      6 T [4 T]   12 T / D      2 T [4 bucket]
        ZeRO 2                       b P      4 T / D     12 T / D      b bucket
        ZeRO 3                       b P / D  4 T / D     12 T / D      b bucket

    In brackets: fp32, where ZeRO 0 needs no master weights. ZeRO 1 in bf16 keeps every gradient
    twice, in bf16 and as an fp32 sum over the step's micro-batches; ZeRO 3 adds the parameters that
    it has gathered, at most `LIVE`.
    """
    total, trained = parameters.num_total, parameters.num_trained
    is_bf16 = precision == "bf16"
    b = 2 if is_bf16 else FLOAT
    part = -(-trained // num_workers) if zero_stage > 0 else trained
    bucket = min(BUCKET, trained) * b
    weights = b * total
    optimizer = (MOMENTS + FLOAT) * part
    if zero_stage == 0:
        gradients, sending = b * trained, bucket
        if not is_bf16:
            optimizer = MOMENTS * part
    elif zero_stage == 1:
        gradients = (FLOAT + 2) * trained if is_bf16 else FLOAT * trained
        sending = 2 * trained if is_bf16 else bucket
    else:
        gradients, sending = FLOAT * part, b * BUCKET
    if zero_stage == 3:
        weights = b * (-(-total // num_workers) + min(total, LIVE))
    return States(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        sending=sending,
        stepping=2 * FLOAT * part,
        sends_in_backward=zero_stage >= 2,
    )


def plan_memory(
    config: FlashVLConfig,
    parameters: Parameters,
    trainable: Collection[str],
    batch: BatchSize,
    *,
    precision: str,
    zero_stage: int,
    num_workers: int,
    gradient_checkpointing: bool,
    has_lora: bool,
    has_reference: bool = False,
) -> Memory:
    """Memory of a worker at its height, in a step of two micro-batches or more.

    That is the beginning of a micro-batch's backward pass, when all its activations are there and
    the gradients of the micro-batches before it; or, where those are few, the end of the step.
    """
    states = state_bytes(
        parameters, precision=precision, zero_stage=zero_stage, num_workers=num_workers
    )
    number_bytes = 2 if precision == "bf16" else FLOAT
    copied = 0
    if has_reference and not has_lora:
        tower = 0 if "vision_tower" in trainable else parameters.total["vision_tower"]
        copied = parameters.num_total - tower
    activations = activation_bytes(
        config,
        trainable,
        batch,
        number_bytes=number_bytes,
        gradient_checkpointing=gradient_checkpointing,
        has_lora=has_lora,
    )
    logits = logits_bytes(config, batch.num_labels)
    in_backward = states.sending if states.sends_in_backward else 0
    at_the_end = max(states.sending, states.stepping) - activations - logits
    return Memory(
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=activations,
        logits=logits,
        buffers=max(in_backward, at_the_end),
        reference=copied * number_bytes,
    )


def sending_bytes(
    parameters: Parameters,
    *,
    precision: str,
    zero_stage: int,
    num_workers: int,
    micro_batches: int,
) -> tuple[float, float]:
    """Bytes that each worker sends in a step: for gradients, and for weights.

    A ring of D workers sends (D - 1) / D of a buffer to gather it, as much to reduce and scatter
    it, and both to reduce it everywhere (Rajbhandari et al. 2020, section 7). ZeRO 0 and 1 reduce
    the gradients once a step, everywhere; ZeRO 2 and 3 scatter those of each micro-batch. ZeRO 1
    and 2 gather the new weights; ZeRO 3 gathers all weights twice for each micro-batch instead.
    """
    b = 2 if precision == "bf16" else FLOAT
    ring = (num_workers - 1) / num_workers
    gradients = ring * b * parameters.num_trained
    gradients *= 2 if zero_stage < 2 else micro_batches
    if zero_stage == 3:
        return gradients, ring * b * parameters.num_total * 2 * micro_batches
    return gradients, ring * b * parameters.num_trained if zero_stage > 0 else 0.0
