"""Train one stage from its recipe, on the Ray cluster it is submitted to.

ray job submit --working-dir . -- python ray_jobs/train.py ray_jobs/configs/stage1.yaml
python ray_jobs/train.py ray_jobs/configs/stage1.yaml num_workers=8 data.parquet=/data/stage1
"""

import argparse

from flashvl.entrypoint import report_errors, show_progress, start_ray


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file, as in ray_jobs/configs/")
    parser.add_argument("overrides", nargs="*", help="key=value, in place of the file's")
    arguments = parser.parse_args()
    with report_errors():
        from flashvl.config import load_config
        from flashvl.train.recipe import Recipe

        recipe = load_config(Recipe, arguments.recipe, arguments.overrides)
        start_ray(include_dashboard=True)
        from flashvl.train.launch import run

        with show_progress(recipe.stage) as on_progress:
            result = run(recipe, on_progress)
        print(
            f"{result.checkpoint}: {result.num_steps} steps in {result.seconds:.0f} s,"
            f" last loss {result.loss:.4f}"
        )


if __name__ == "__main__":
    main()
