"""`flashvl plan`: what a stage will take."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flashvl.cli.options import build, options_from
from flashvl.entrypoint import report_errors
from flashvl.train.assumptions import Assumptions


@options_from(Assumptions, metavars={"gpu": "NAME"})
def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file of the stage.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values that replace the recipe's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **options: Any,
) -> None:
    """Print what a stage will take: memory, time, network, storage and money.

    Neither Ray nor a GPU is needed, and the stage's data and model need not exist yet. A stage that
    does not fit the GPUs is refused, with what would make it fit.

    Example: flashvl plan ray_jobs/configs/static/stage2.yaml --gpus 40 --gpu a100-80g --price 1.8
    """
    with report_errors():
        from flashvl.train.plan import build_plan
        from flashvl.train.plan_report import describe_plan
        from flashvl.train.recipe import load_recipe

        assumptions = build(Assumptions, options, command="plan")
        made = build_plan(load_recipe(recipe, overrides or ()), assumptions)
        print(json.dumps(made.describe(), indent=2) if as_json else describe_plan(made))
