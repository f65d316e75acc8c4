"""Shows in miniature what preference training and reasoning gain, for several seeds.

    make reasoning
    python ray_jobs/reasoning.py --seeds 0 1 2 --runs runs/reasoning

tiny -> DPO on pairs of captions, for each seed. tiny -> problems, how they are worked out, and then
short answers to them, which makes the base: it can reason, and mostly does not. From the base, for
each seed: SFT on worked solutions in words, GRPO, and GRPO after SFT. Each model is asked held-out
questions. RUNS then holds

    preference.md, reasoning.md     a table each
    preference.png, reasoning.png   the curves of the training
    scores.json                     all figures

A run that was interrupted resumes where it stopped; remove RUNS to begin anew. KEY=VALUE replaces
a value of all recipes, as num_workers=1.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashvl.entrypoint import report_errors, show_progress, start_ray

if TYPE_CHECKING:
    from flashvl.eval.reasoning import Preference, Reasoner, Scores

RECIPES = Path(__file__).parent / "configs" / "tiny-reasoning"
SEED_STRIDE = 1000
"""Distance between the data seeds of two seeds, so that no two stages draw the same scenes."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs/reasoning"), help="folder for all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument(
        "--items", type=int, default=120, help="held-out questions of each of ten tasks (120)"
    )
    parser.add_argument("--json", type=Path, help="another file for the figures")
    arguments = parser.parse_args()
    with report_errors():
        import flashvl.eval.curves  # noqa: F401 - where matplotlib is missing, this tells so now

        start_ray(include_dashboard=True)
        Miniature(arguments.runs, arguments.items, arguments.overrides).run(
            arguments.seeds, arguments.json
        )


class Miniature:
    """The stages in a folder, and the scores of their models."""

    def __init__(self, runs: Path, items: int, overrides: Sequence[str]):
        self.runs, self.items, self.overrides = runs, items, list(overrides)
        self.answers = runs / "answers.json"
        """File of the scores by model, which are not asked for again."""

    def run(self, seeds: Sequence[int], json_file: Path | None) -> None:
        """Train, ask and write what is not there yet; print the tables."""
        from flashvl.eval.reasoning import judge, render_preferences, render_reasoning

        self.runs.mkdir(parents=True, exist_ok=True)
        before = self.score("tiny")
        self.train("introduction", "introduction", "tiny")
        base = self.score(self.train("base", "short_answers", self.runs / "introduction"))
        after, trained = [], []
        for seed in seeds:
            after.append(self.prefer(seed))
            trained += self.reason(seed)
        tables = {
            "preference": render_preferences(before, after),
            "reasoning": render_reasoning(base, trained),
        }
        claims = judge(before, after, base, trained)
        for name, table in tables.items():
            (self.runs / f"{name}.md").write_text(table)
        self.draw(seeds)
        figures = {
            "tiny": _plain(before),
            "base": _plain(base),
            "preference": [asdict(each) for each in after],
            "reasoning": [asdict(each) for each in trained],
            "claims": claims,
        }
        for file in filter(None, (self.runs / "scores.json", json_file)):
            file.write_text(json.dumps(figures, indent=2) + "\n")
        print("\n".join(tables.values()))
        for claim, holds in claims.items():
            print(f"{'yes' if holds else 'NO':<5}{claim}")

    def prefer(self, seed: int) -> "Preference":
        """DPO from tiny."""
        from flashvl.eval.reasoning import Preference
        from flashvl.train.run.export import read_log

        folder = self.train(f"seed-{seed}/stage5", "stage5", "tiny", seed)
        last = read_log(folder)[-1]
        return Preference(
            seed=seed,
            accuracy=last["eval_accuracy"],
            margin=last["eval_margin"],
            scores=self.score(folder),
        )

    def reason(self, seed: int) -> list["Reasoner"]:
        """SFT, GRPO and both from the base."""
        from flashvl.eval.reasoning import Reasoner

        base = self.runs / "base"
        sft = self.train(f"seed-{seed}/sft", "reasoning_sft", base, seed)
        rl = self.train(f"seed-{seed}/rl", "grpo", base, seed)
        both = self.train(f"seed-{seed}/sft-rl", "grpo", sft, seed)
        return [
            Reasoner(seed=seed, way=way, scores=self.score(folder))
            for way, folder in (("SFT", sft), ("RL", rl), ("SFT+RL", both))
        ]

    def train(self, name: str, recipe: str, init_from: str | Path, seed: int = 0) -> Path:
        """Train a stage by one of the recipes, or what is left of it; returns its folder."""
        from flashvl.train.recipe import load_recipe
        from flashvl.train.run.launch import run

        path, folder = RECIPES / f"{recipe}.yaml", self.runs / name
        data = load_recipe(path).data.synthetic
        assert data is not None
        chain = [
            f"stage={name.replace('/', '-')}",
            f"init_from={init_from}",
            f"output_dir={folder}",
            f"seed={seed}",
            f"data.synthetic.seed={data.seed + SEED_STRIDE * seed}",
        ]
        with show_progress(name) as on_progress:
            result = run(load_recipe(path, [*self.overrides, *chain]), on_progress)
        print(result, flush=True)
        return folder

    def score(self, model: str | Path) -> "Scores":
        """The scores of a model on all tasks."""
        from flashvl.data.synthetic import REASONING_TASKS, TASKS
        from flashvl.engine import Engine
        from flashvl.eval.scenes import TaskScore, evaluate_scenes

        known = json.loads(self.answers.read_text()) if self.answers.exists() else {}
        key = f"{model}, {self.items} items"
        if key not in known:
            with show_progress(f"asking {model}") as on_progress:
                scores = evaluate_scenes(
                    Engine.from_pretrained(model),
                    self.items,
                    on_progress,
                    (*TASKS, *REASONING_TASKS),
                )
            known[key] = _plain(scores)
            self.answers.write_text(json.dumps(known, indent=2) + "\n")
        return {task: TaskScore(**score) for task, score in known[key].items()}

    def draw(self, seeds: Sequence[int]) -> None:
        """Write the curves."""
        from flashvl.eval.curves import plot_preferences, plot_reasoning
        from flashvl.train.run.export import read_log

        def logs(stage: str) -> list[list[dict[str, Any]]]:
            return [read_log(self.runs / f"seed-{seed}" / stage) for seed in seeds]

        plot_preferences(logs("stage5"), self.runs / "preference.png")
        plot_reasoning(
            {"SFT": logs("sft"), "RL": logs("rl"), "SFT+RL": logs("sft-rl")},
            self.runs / "reasoning.png",
        )


def _plain(scores: "Scores") -> dict[str, Any]:
    return {task: asdict(score) for task, score in scores.items()}


if __name__ == "__main__":
    main()
