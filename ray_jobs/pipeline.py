"""Runs a chain of stages as one job, and prints the table of scores after each of them.

ray job submit --working-dir . --entrypoint-num-cpus 1 -- \\
    python ray_jobs/pipeline.py ray_jobs/configs/pipelines/static.yaml

The same command again does what is left. KEY=VALUE replaces values of the file, as in:
overrides=[num_workers=8].
"""

import argparse
import json
from pathlib import Path

from flashvl.entrypoint import report_errors, show_progress, start_ray


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", type=Path, metavar="PIPELINE", help="YAML file of the stages")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with report_errors():
        from flashvl.train.pipeline import load_pipeline, render_scores

        pipeline = load_pipeline(arguments.pipeline, arguments.overrides)
        start_ray(include_dashboard=True)
        from flashvl.eval.pipeline import run_and_score

        records = run_and_score(
            pipeline, show_progress, lambda record: print(json.dumps(record), flush=True)
        )
        print(render_scores(records), end="")


if __name__ == "__main__":
    main()
