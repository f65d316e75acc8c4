"""`flashvl plan`: what a stage will take."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flashvl.cli.options import build, options_from
from flashvl.entrypoint import report_errors
from flashvl.train.plan.assumptions import Assumptions


@options_from(Assumptions, metavars={"gpu": "NAME"})
def plan(
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
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
