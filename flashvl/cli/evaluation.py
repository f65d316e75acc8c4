"""The commands `flashvl eval`: how good a model is."""

import json
from typing import Annotated, Any

import typer

from flashvl.cli.options import JsonOption, ModelOption, build, options_from, write_json
from flashvl.entrypoint import report_errors, show_progress, start_ray
from flashvl.eval.config import EvaluationJob
from flashvl.eval.contamination.config import ContaminationJob

eval_app = typer.Typer(no_args_is_help=True, help="Measure the quality of a model.")


@eval_app.command()
@options_from(
    EvaluationJob,
    arguments=("data",),
    metavars={
        "data": "FOLDER",
        "output": "FOLDER",
        "tasks": "NAME",
        "model": "NAME|FOLDER",
        "replicas": "N|MIN:MAX",
        "via_serve": "APP",
        "judge_url": "URL",
        "judge_model": "NAME",
        "judge_replies": "FILE",
    },
)
def run(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **options: Any,
) -> None:
    """Score a model on the paper's benchmarks.

    The questions are read from VLMEvalKit's files. The same command again resumes an evaluation
    that was stopped or killed, and marks a finished one anew.

    Answers and their verdicts are written to OUTPUT/verdicts.parquet, questions that could not be
    answered to OUTPUT/dead_letters, the figures to OUTPUT/scores.json, and the table and wrong
    answers with their pictures to OUTPUT/report.html.

    Example: flashvl eval run LMUData/ --task mmstar --task mme --model tiny --output scores/

    Example: flashvl eval run LMUData/ --output scores/ --judge-url http://127.0.0.1:8000/v1
    --judge-model judge
    """
    with report_errors():
        job = build(EvaluationJob, options, command="eval run")
        from flashvl.eval.job import answer_questions, check_evaluation, mark_questions
        from flashvl.model.parts.prepare import prepare_model

        job = job.model_copy(update={"model": str(prepare_model(job.model))})
        plan = check_evaluation(job)
        if not plan.is_answered():
            start_ray(is_beside_service=job.via_serve is not None)
            with show_progress("answering") as on_progress:
                answer_questions(plan, on_progress)
        with show_progress("marking") as on_progress:
            evaluation = mark_questions(plan, on_progress)
        if as_json:
            print(json.dumps(evaluation.as_dict(), indent=2))
            return
        print(evaluation)
        print(f"Open {plan.output / 'report.html'} to see wrong answers.")


@eval_app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Output folder of an evaluation.")],
    second: Annotated[
        str, typer.Argument(metavar="B", help="Output folder of the evaluation to compare with A.")
    ],
) -> None:
    """Compare two models on the questions that both answered.

    For each benchmark, the figures of A and B, their difference, its 95 % confidence interval by
    the paired bootstrap, and whether B is better, worse, or that is undecided.

    Example: flashvl eval compare scores-before/ scores-after/
    """
    with report_errors():
        from flashvl.data.storage import locate
        from flashvl.eval import comparison

        for difference in comparison.compare(locate(first), locate(second)):
            print(difference)


@eval_app.command()
@options_from(
    ContaminationJob,
    arguments=("tables",),
    metavars={
        "tables": "TABLE",
        "benchmarks": "FOLDER",
        "output": "FOLDER",
        "tasks": "NAME",
    },
)
def contamination(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **options: Any,
) -> None:
    """Find the benchmarks' questions in tables for training.

    The benchmarks are VLMEvalKit's files. A picture counts as found if its copy is in a table, even
    if it was encoded anew, resized, made grey or cropped by some percent; a question, if one row of
    a table holds 70 % of its 8-grams (13-grams of characters in Chinese). Drawings that differ
    little may be taken for copies: look at them in the report. Flat pictures and short questions
    cannot be compared, and are counted.

    The same command again resumes a job that was stopped or killed.

    Every match is written to OUTPUT/matches.parquet, each question and whether it was found to
    OUTPUT/items.parquet, the counts to OUTPUT/contamination.json, and pictures side by side to
    OUTPUT/report.html.

    Example: flashvl eval contamination tables/stage4/ tables/stage5/ --benchmarks LMUData/ --output
    contamination/
    """
    with report_errors():
        job = build(ContaminationJob, options, command="eval contamination")
        from flashvl.eval.contamination.job import (
            check_contamination,
            compare_tables,
            read_questions,
        )

        plan = check_contamination(job)
        found = plan.finished()
        if found is None:
            start_ray()
            with show_progress("reading benchmarks") as on_progress:
                benchmarks = read_questions(plan, on_progress)
            with show_progress("comparing") as on_progress:
                found = compare_tables(plan, benchmarks, on_progress)
        if as_json:
            print(json.dumps(found.as_dict(), indent=2))
            return
        print(found)
        print(f"Open {plan.output / 'report.html'} to see what was found.")


@eval_app.command()
def scenes(
    model: ModelOption = "tiny",
    items: Annotated[
        int, typer.Option(metavar="INTEGER", help="Held-out questions of each task.")
    ] = 120,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="Task to ask about, once for each: caption, count, read, chart, arithmetic, or the"
            " problems sum, total, difference, area, perimeter. Default: the first five.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Score a model on held-out scenes of the procedural world.

    The score of a task is the share of final answers that match exactly.

    Example: flashvl eval scenes --model tiny --json scores.json
    """
    with report_errors():
        from flashvl.engine import Engine
        from flashvl.eval.scenes import average, evaluate_scenes, find_tasks
        from flashvl.model.parts.prepare import prepare_model

        asked = find_tasks(task or ())
        if json_file is not None:
            write_json(json_file, {})  # an hour's scores must not be lost to a bad path
        engine = Engine.from_pretrained(prepare_model(model))
        with show_progress("asking") as on_progress:
            scores = evaluate_scenes(engine, items, on_progress, asked)
        if json_file is not None:
            tasks = {
                name: {"items": score.items, "exact_match": score.exact_match}
                for name, score in scores.items()
            }
            write_json(json_file, {"model": model, "tasks": tasks, "average": average(scores)})
        for name, score in scores.items():
            print(f"{name:<12}{score.exact_match:6.3f}  of {score.items}")
        print(f"{'average':<12}{average(scores):6.3f}")
