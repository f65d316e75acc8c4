"""Shows the paper's comparisons in miniature, on the procedural world, for several seeds.

    make miniature
    make miniature ARGS=table6
    python ray_jobs/miniature.py table4 table7 --seeds 0 1 2 --runs runs/miniature

RUNS then holds

    report.html                 the tables that were named: figures, verdicts, charts, compute
    TABLE.md, figure1.md        each as Markdown
    scores.json                 all figures
    answers.json                which answers of each model are right
    shared/, seed-N/            the stages, as training writes them

A run that was interrupted resumes where it stopped, and what was trained, asked or timed is not
done again; remove RUNS to begin anew. KEY=VALUE replaces a value of all recipes, as num_workers=1.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from flashvl.entrypoint import report_errors, show_progress, start_ray

if TYPE_CHECKING:
    from flashvl.eval.miniature.latency import Timed

CONFIGS = Path(__file__).parent / "configs"
FIGURE = "figure1"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="TABLE | KEY=VALUE", help="table4 ... table8, figure1 (all)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/miniature"), help="folder for all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument(
        "--items", type=int, default=200, help="held-out questions of each task and seed (200)"
    )
    arguments = parser.parse_args()
    with report_errors():
        from flashvl.eval.miniature.designs import find_tables

        overrides = [name for name in arguments.names if "=" in name]
        named = [name for name in arguments.names if "=" not in name]
        tables = [] if named == [FIGURE] else find_tables([n for n in named if n != FIGURE])
        if tables:
            start_ray(include_dashboard=True)  # first, as it says how torch's threads wait

        from flashvl.eval.miniature.answers import Examiner
        from flashvl.eval.miniature.report import write_report
        from flashvl.eval.miniature.results import make_table
        from flashvl.eval.miniature.stages import Trainer

        runs: Path = arguments.runs
        runs.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(runs=runs, recipes=CONFIGS, overrides=overrides, show=show_progress)
        examiner = Examiner(file=runs / "answers.json", items=arguments.items)
        results = [make_table(name, trainer, examiner, arguments.seeds) for name in tables]
        timed = time_tilings(runs / f"{FIGURE}.json") if FIGURE in named or not named else []
        print(write_report(results, timed, trainer))


def time_tilings(file: Path) -> "list[Timed]":
    """The times of Figure 1, which are measured unless the file holds them."""
    from flashvl.bench.tilings import measure_tilings
    from flashvl.eval.miniature.designs import TILINGS
    from flashvl.eval.miniature.latency import Timed

    if not file.exists():
        with show_progress(FIGURE) as on_progress:
            measured = measure_tilings(TILINGS, on_progress=on_progress)
        file.write_text(json.dumps(measured) + "\n")
    return [Timed(**each) for each in json.loads(file.read_text())]


if __name__ == "__main__":
    main()
