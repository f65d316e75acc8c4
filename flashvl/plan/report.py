"""A plan of inference as text for a person."""

from collections.abc import Sequence

from flashvl.plan.config import CaptioningDemand, EngineAssumptions, ServingDemand
from flashvl.plan.plan import START_MINUTES, FleetPlan
from flashvl.serve import scaling


def describe_serving(plans: Sequence[FleetPlan], demand: ServingDemand) -> str:
    """The plans of a service, the assumptions below them."""
    load = (
        f"{demand.requests_per_s:g} requests/s"
        if demand.trace is None
        else f"the requests of {demand.trace}, {demand.replicas} replicas"
    )
    notes = [f"99% of the prompts are to be read within {demand.wait_ms:g} ms"]
    if demand.ttft_ms is not None:
        notes.append(f"99% of the first tokens are to come within {demand.ttft_ms:g} ms")
    notes += _engine_notes(demand)
    if demand.trace is None:
        notes.append("requests come at random, all day long as at the peak")
    else:
        notes += [
            f"autoscaling: replicas are added after {scaling.UPSCALE_DELAY_S:g} s with more than"
            f" {scaling.TARGET_SHARE:.0%} of the slots in use, and removed after"
            f" {scaling.DOWNSCALE_DELAY_S:g} s with less than"
            f" {scaling.TARGET_SHARE / scaling.KEPT:.0%}",
            "the load changes evenly from the middle of one hour to that of the next",
        ]
    notes += [
        "wait: for a slot by Erlang's C, for prompts that are read before, and for a decoding step",
        "TTFT: the wait and the prompt; HTTP and decoding images come on top",
        "nothing to spare for lost nodes",
    ]
    return _describe(f"Service for {load}", plans, notes)


def describe_captioning(plans: Sequence[FleetPlan], demand: CaptioningDemand) -> str:
    """The plans of a captioning job, the assumptions below them."""
    limit = f"{demand.hours:g} h" if demand.gpus is None else f"{demand.gpus} GPUs"
    notes = [
        *_engine_notes(demand),
        "all slots in use until the end; images are decoded as fast as they are captioned",
        f"{START_MINUTES:g} minutes until the engines have started",
    ]
    return _describe(f"Captions of {demand.rows:,} images, {limit}", plans, notes)


def _engine_notes(demand: EngineAssumptions) -> list[str]:
    notes = [f"{demand.max_num_seqs} slots, {demand.gpus_per_replica:g} GPUs for each engine"]
    if demand.measured is None:
        notes.append(
            f"{demand.preset}: {demand.images:g} images of 1024 x 768, {demand.text_tokens} tokens"
            f" of text, answers of {demand.answer_tokens} tokens"
        )
    return notes


def _describe(heading: str, plans: Sequence[FleetPlan], notes: Sequence[str]) -> str:
    has_cost, has_wait = plans[0].price is not None, plans[0].wait_ms is not None
    columns = ["GPU", "requests/s each", "replicas", "GPUs", "hours", "GPU-hours", "busy", "cores"]
    columns += ["wait p99", "TTFT p99"] * has_wait + ["cost"] * has_cost
    rows = [columns]
    for plan in plans:
        row = [
            plan.gpu,
            f"{plan.speed.requests_per_s:.3g}",
            f"{plan.replicas:,}",
            f"{plan.gpus:,}",
            f"{plan.hours:.3g}",
            f"{plan.gpu_hours:,.0f}",
            f"{plan.utilization:.0%}",
            f"{plan.cores:,.0f}",
        ]
        if has_wait:
            row += [_milliseconds(plan.wait_ms), _milliseconds(plan.ttft_ms)]
        if has_cost:
            row.append(f"{plan.cost:,.0f}")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    fixed = [
        f"{plan.gpu}: {plan.fixed_gpu_hours:,.0f} GPU-hours if the replicas of the peak ran all day"
        for plan in plans
        if plan.fixed_gpu_hours is not None
    ]
    sources = [f"{plan.gpu}: {plan.speed.source}" for plan in plans]
    told = ["Assumed:", *(f"  {note}" for note in (*notes, *sources))]
    return "\n".join([heading, "", *lines, *fixed, "", *told])


def _milliseconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f} ms"
