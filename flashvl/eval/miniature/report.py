"""Writes what the miniature found: a page, tables as Markdown, and all figures.

The page is one self-contained HTML file.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flashvl.batch.report import render_page
from flashvl.eval.miniature.answers import PLACES
from flashvl.eval.miniature.latency import Timed, compare_latencies
from flashvl.eval.miniature.markdown import render_latency, render_table
from flashvl.eval.miniature.plots import (
    as_picture,
    plot_latency,
    plot_preferences,
    plot_reasoning,
    plot_rows,
)
from flashvl.eval.miniature.results import Result, TrainedStage
from flashvl.eval.miniature.stages import Trainer
from flashvl.eval.miniature.verdicts import Comparison
from flashvl.train.run.export import read_log


def write_report(results: Sequence[Result], timed: Sequence[Timed], trainer: Trainer) -> str:
    """Write all files to the trainer's folder; returns the tables as Markdown."""
    tables = {result.name: render_table(result) for result in results}
    if timed:
        tables["figure1"] = render_latency(timed)
    for name, table in tables.items():
        (trainer.runs / f"{name}.md").write_text(table)
    figures = {result.name: as_figures(result) for result in results}
    if timed:
        figures["figure1"] = {"claims": as_claims(compare_latencies(timed))}
    (trainer.runs / "scores.json").write_text(json.dumps(figures, indent=1) + "\n")
    (trainer.runs / "report.html").write_text(build_page(results, timed, trainer))
    return "\n".join(tables.values())


def as_figures(result: Result) -> dict[str, Any]:
    """A table's figures, for JSON."""
    return {
        "seeds": result.seeds,
        "items": result.items,
        "rows": {
            label: {column: spread.values for column, spread in row.items()}
            for label, row in result.rows.items()
        },
        "claims": as_claims(result.comparisons),
        "seconds": {stage.name: stage.seconds for stage in result.stages},
        "asking_s": result.asking_s,
    }


def as_claims(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Claims with their verdicts, for JSON."""
    return [{**asdict(each), "p_value": each.p_value, "verdict": each.word} for each in comparisons]


def build_page(results: Sequence[Result], timed: Sequence[Timed], trainer: Trainer) -> str:
    """The page of some tables, and of Figure 1 if it was measured."""
    # A stage that several tables use was trained once.
    stages: dict[str, TrainedStage] = {
        stage.name: stage for result in results for stage in result.stages
    }
    return render_page(
        "flashvl.eval.miniature",
        results=results,
        pictures={result.name: draw_pictures(result, trainer) for result in results},
        timed=timed,
        latency_picture=as_picture(plot_latency(timed)) if timed else None,
        latency_claims=compare_latencies(timed) if timed else (),
        training_s=sum(sum(stage.seconds) for stage in stages.values()),
        asking_s=sum(result.asking_s for result in results),
    )


def draw_pictures(result: Result, trainer: Trainer) -> list[str]:
    """A table's charts, as data URIs."""
    is_large = result.table.questions == "large"
    figures = [plot_rows(result, PLACES if is_large else ("average",))]

    def logs(stage: str) -> list[list[dict[str, object]]]:
        return [read_log(trainer.runs / f"seed-{seed}" / stage) for seed in result.seeds]

    if result.name == "table4":
        figures.append(plot_preferences(logs("stage5")))
    if result.name == "table7":
        ways = {"SFT": logs("sft"), "RL": logs("rl"), "SFT + RL": logs("sft-rl")}
        figures.append(plot_reasoning(ways))
    return [as_picture(figure) for figure in figures]
