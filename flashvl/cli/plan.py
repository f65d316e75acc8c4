"""`flashvl plan`: what training or inference will take, before it is started."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flashvl.cli.options import build, options_from
from flashvl.entrypoint import report_errors
from flashvl.plan.config import CaptioningDemand, ServingDemand
from flashvl.train.plan.assumptions import Assumptions

AsJsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class _PlanGroup(TyperGroup):
    """`flashvl plan RECIPE` is `flashvl plan train RECIPE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            args = ["train", *args]
        return super().resolve_command(ctx, args)


plan_app = typer.Typer(
    cls=_PlanGroup,
    no_args_is_help=True,
    help="Print what a training, a service or a captioning job takes.\n\nNeither Ray nor a GPU is"
    " needed. The word train may be left out before the file of a recipe.",
)


@plan_app.command()
@options_from(Assumptions, metavars={"gpu": "NAME"})
def train(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|PIPELINE",
            help="Recipe file of a stage, or file of a pipeline.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values that replace the file's."),
    ] = None,
    as_json: AsJsonOption = False,
    **options: Any,
) -> None:
    """Print the time, memory and money of a training.

    Neither Ray nor a GPU is needed, and a stage's data and model need not exist yet. A stage that
    does not fit the GPUs is refused, with what would make it fit.

    Example: flashvl plan ray_jobs/configs/static/stage2.yaml --gpus 40 --gpu a100-80g --price 1.8

    Example: flashvl plan ray_jobs/configs/pipelines/static.yaml --gpus 64 --gpu h100
    """
    with report_errors():
        from flashvl.train.pipeline import load_stages
        from flashvl.train.plan.plan import build_plan, describe_all
        from flashvl.train.plan.report import compare_plans, describe_plan

        assumptions = build(Assumptions, options, command="plan")
        plans = [build_plan(stage, assumptions) for stage in load_stages(recipe, overrides or ())]
        if len(plans) == 1:
            found, text = plans[0].describe(), describe_plan(plans[0])
        else:
            found, text = describe_all(plans), compare_plans(plans)
        print(json.dumps(found, indent=2) if as_json else text)


METAVARS = {"preset": "PRESET", "gpu": "NAME", "prices": "FILE", "measured": "FILE"}


@plan_app.command()
@options_from(ServingDemand, metavars=METAVARS | {"trace": "FILE", "replicas": "MIN:MAX"})
def serve(as_json: AsJsonOption = False, **options: Any) -> None:
    """Print the replicas, GPUs and money of a service.

    A number of requests a second needs a fixed number of replicas; a trace, as many as Serve's
    autoscaler runs with flashvl's settings. The speed of an engine is measured by flashvl bench, or
    follows from the GPU's peaks.

    Example: flashvl plan serve --requests-per-s 100 --ttft-ms 500 --gpu h100

    Example: flashvl plan serve --trace day.csv --replicas 2:40 --prices cluster/prices.yaml
    """
    with report_errors():
        demand = build(ServingDemand, options, command="plan serve")
        from flashvl.plan.plan import plan_serving
        from flashvl.plan.report import describe_serving

        plans = plan_serving(demand)
        print(
            json.dumps([plan.describe() for plan in plans], indent=2)
            if as_json
            else describe_serving(plans, demand)
        )


@plan_app.command()
@options_from(CaptioningDemand, arguments=("rows",), metavars=METAVARS | {"rows": "ROWS"})
def caption(as_json: AsJsonOption = False, **options: Any) -> None:
    """Print the GPUs, hours and money of a captioning job.

    The speed of an engine is measured by flashvl bench, or follows from the GPU's peaks.

    Example: flashvl plan caption 50000000 --hours 24 --prices cluster/prices.yaml

    Example: flashvl plan caption 1000000 --gpus 8 --gpu l40s --preset iss
    """
    with report_errors():
        demand = build(CaptioningDemand, options, command="plan caption")
        from flashvl.plan.plan import plan_captioning
        from flashvl.plan.report import describe_captioning

        plans = plan_captioning(demand)
        print(
            json.dumps([plan.describe() for plan in plans], indent=2)
            if as_json
            else describe_captioning(plans, demand)
        )
