"""The paper in miniature: its designs, its statistics and words, its tables, and a real run."""

import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashvl.data.synthetic import LARGE_SIDE, is_cut
from flashvl.errors import ConfigError
from flashvl.eval.miniature.answers import (
    COLUMNS,
    CUT,
    ON,
    PLACES,
    Answers,
    large_items,
    question_groups,
)
from flashvl.eval.miniature.designs import STAGES, TABLES, TILINGS, Variant, find_tables
from flashvl.eval.miniature.latency import CLAIMS, Timed, compare_latencies
from flashvl.eval.miniature.markdown import render_latency, render_table
from flashvl.eval.miniature.plots import as_picture, plot_preferences, plot_reasoning
from flashvl.eval.miniature.report import build_page
from flashvl.eval.miniature.results import Result, Spread, TrainedStage
from flashvl.eval.miniature.stages import Trainer
from flashvl.eval.miniature.verdicts import Comparison, compare, sign_test
from flashvl.model.loading import load_model
from flashvl.model.presets import build_config
from flashvl.train.create import create_variant
from flashvl.train.recipe import load_recipe
from tests.support.reader import components, ink_of
from tests.support.recipes import CONFIGS

ROOT = Path(__file__).resolve().parents[2]

# Statistics


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1), (3, 3, 1), (5, 0, 2 / 32), (9, 1, 2 * (1 + 10) / 1024), (2, 1, 1)],
)
def test_the_sign_test_by_hand(wins: int, losses: int, p: float) -> None:
    assert sign_test(wins, losses) == pytest.approx(p)
    assert sign_test(losses, wins) == sign_test(wins, losses)


def test_the_sign_test_counts_all_ways_in_which_pairs_may_fall_out() -> None:
    for total in range(1, 11):
        falls = [sum(each) for each in itertools.product((0, 1), repeat=total)]
        for wins in range(total + 1):
            far = abs(2 * wins - total)
            as_far = sum(abs(2 * each - total) >= far for each in falls)
            assert sign_test(wins, total - wins) == pytest.approx(as_far / 2**total)


def comparison(wins: int, losses: int, *differences: float) -> Comparison:
    return Comparison(claim="", paper="", differences=differences, wins=wins, losses=losses)


def test_a_verdict_needs_the_sign_test_and_all_seeds() -> None:
    assert comparison(30, 10, 0.1, 0.05, 0.01).word == "reproduced"
    assert comparison(10, 30, -0.1, -0.05, -0.01).word == "not reproduced"
    assert comparison(30, 10, 0.1, 0.2, -0.01).word == "undecided"
    assert comparison(30, 10, 0.1, 0.2, 0.0).word == "undecided"
    assert comparison(12, 10, 0.1, 0.05, 0.01).word == "undecided"
    assert comparison(0, 0, 0.0, 0.0, 0.0).word == "undecided"


def test_pairs_count_where_one_answer_alone_is_right() -> None:
    found = compare(
        "claim",
        "paper",
        [(True, True, False, False), (True, True, True, True)],
        [(True, False, True, False), (False, False, False, True)],
    )
    assert (found.wins, found.losses) == (4, 1)
    assert found.differences == (0.0, 0.75)


# Designs


@pytest.mark.parametrize("name", TABLES)
def test_a_table_compares_models_that_it_makes(name: str) -> None:
    table = TABLES[name]
    for claim in table.claims:
        assert {claim.better, claim.worse} <= table.rows.keys()
        assert claim.column in COLUMNS[table.questions]
    trainer = Trainer(runs=Path("runs"), recipes=CONFIGS, show=lambda _: pytest.fail())
    chain = trainer.chain(table.rows.values())
    assert {stage for stage in table.rows.values() if stage in STAGES} <= set(chain)
    for place, stage in enumerate(chain):
        after = STAGES[stage].after
        assert isinstance(after, Variant) or after in ("tiny", *chain[:place])
        assert load_recipe(CONFIGS / f"{STAGES[stage].recipe}.yaml")


def test_no_two_recipes_draw_the_same_scenes_and_all_draw_for_training() -> None:
    recipes = {stage.recipe for stage in STAGES.values()}
    data = [load_recipe(CONFIGS / f"{recipe}.yaml").data.synthetic for recipe in recipes]
    assert len({each.seed for each in data if each}) == len(recipes)
    assert all(each and each.split == "train" and each.seed < 1000 for each in data)


def test_tilings_show_large_pictures_at_their_own_size_and_differ_in_their_tiles_alone() -> None:
    configs = {name: build_config(preset) for name, preset in TILINGS.items()}
    for part in ("vision_config", "text_config", "projector_input_size"):
        assert len({str(getattr(config, part)) for config in configs.values()}) == 1
    rules = {name: config.tiling_rule for name, config in configs.items()}
    size = (LARGE_SIDE, LARGE_SIDE)
    assert {name: rule.num_tiles(size) for name, rule in rules.items()} == {
        "static": 1,
        "dynamic": 1 + 4,
        "overlap": 1 + 9,
        "ISS": 1 + 16,
    }
    assert all(rules[name].views(size)[-1].resized == size for name in rules if name != "static")


def test_a_variant_may_have_a_new_adapter_and_has_all_else_of_tiny(tmp_path: Path) -> None:
    tiny = load_model("tiny").state_dict()
    for keeps_adapter, parts in ((True, set()), (False, {"multi_modal_projector"})):
        create_variant("tiny", "tiny", tmp_path / str(parts), 1, keeps_adapter=keeps_adapter)
        weights = load_model(tmp_path / str(parts)).state_dict()
        differ = {name for name, weight in weights.items() if not weight.equal(tiny[name])}
        assert {name.split(".")[1] for name in differ} == parts


def test_tables_are_found_by_name() -> None:
    assert find_tables(["table6"]) == ["table6"]
    assert find_tables([]) == list(TABLES)
    with pytest.raises(ConfigError, match="table9"):
        find_tables(["table9"])


# Questions


def test_questions_of_two_seeds_differ_and_fill_the_columns() -> None:
    for questions, columns in COLUMNS.items():
        groups = dict(question_groups(questions, 0, 2))
        assert set(itertools.chain.from_iterable(columns.values())) == set(groups)
    first, second = (
        {item.image.tobytes() for item in large_items("read", 5, seed, CUT)} for seed in (0, 1)
    )
    assert len(first) == len(second) == 5
    assert not first & second


@pytest.mark.parametrize("where", PLACES)
def test_questions_are_about_things_in_their_place(where: str) -> None:
    for item in large_items("count", 8, 0, where):
        assert is_cut(item.image) == (where == CUT)
        ink = ink_of(np.asarray(item.image))
        middles = [
            ((rows.min() + rows.max()) / 2 % 24, (columns.min() + columns.max()) / 2 % 24)
            for rows, columns in components(ink)
        ]
        # On the grid, a thing lies in the middle of a token of 24 pixels, give or take its jitter.
        is_on = all(abs(middle - 12) < 5 for place in middles for middle in place)
        assert is_on == (where == ON)


def test_a_column_is_a_mean_over_its_groups() -> None:
    right = {group: (group.startswith("read"),) * 2 for group in COLUMNS["large"]["average"]}
    answers = Answers(right=right, seconds=1.0)
    assert answers.of("read", "large") == (True,) * 6
    assert statistics.fmean(answers.of("average", "large")) == pytest.approx(1 / 3)


# Tables and page


def result(name: str) -> Result:
    table = TABLES[name]
    columns = {column: Spread(values=(0.5, 0.6, 0.7)) for column in COLUMNS[table.questions]}
    return Result(
        name=name,
        table=table,
        seeds=(0, 1, 2),
        rows=dict.fromkeys(table.rows, columns),
        items=1000,
        comparisons=(comparison(30, 10, 0.1, 0.05, 0.01), comparison(9, 9, 0.1, -0.1, 0.0)),
        stages=(TrainedStage(name="stage1", rows=1280, seconds=(10.0, 20.0, 30.0)),),
        asking_s=12.0,
    )


TIMED = [
    Timed(name=name, visual_tokens=tokens, times_ms=[[first, first + 10, first + 20]] * 6)
    for name, tokens, first in (
        ("static", 16, 5.0),
        ("dynamic", 80, 15.0),
        ("overlap", 80, 16.0),
        ("ISS", 180, 14.0),
    )
]


def test_a_table_holds_mean_spread_verdicts_and_compute() -> None:
    text = render_table(result("table5"))
    lines = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line[:1] == "|"]
    row = next(line for line in lines if line[0] == "stage 1")
    assert row[1:] == [f"0.600 +- {statistics.stdev((0.5, 0.6, 0.7)):.3f}"] * 6
    assert [line[-1] for line in lines if "**" in line[-1]] == ["**reproduced**", "**undecided**"]
    assert "60 s of training, 12 s of asking" in text
    assert ["stage1", "1,280", "10, 20, 30"] in lines


def test_latencies_are_compared_round_by_round() -> None:
    found = {each.claim: each for each in compare_latencies(TIMED)}
    assert len(found) == len(CLAIMS)
    assert found["static has its first token before dynamic"].word == "reproduced"
    assert found["dynamic has its first token before ISS"].word == "not reproduced"
    assert found["dynamic answers faster than ISS"].differences == (-1.0,)
    assert "| static | 16 | 5.0 | 10.00 | 120 |" in render_latency(TIMED)


def test_the_page_is_one_file_with_all_tables(tmp_path: Path) -> None:
    trainer = Trainer(runs=tmp_path, recipes=CONFIGS, show=lambda _: pytest.fail())
    page = build_page([result("table5"), result("table6")], TIMED, trainer)
    for title in ("Table 5: stages", "Table 6: tilings", "Figure 1 and A.4"):
        assert title in page
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="http', page)
    assert page.count('class="word reproduced"') == 2 + 2


def test_curves_are_drawn() -> None:
    steps = range(1, 31)
    dpo: list[dict[str, Any]] = [{"step": step, "loss": 0.6} for step in steps]
    for record in dpo[9::10]:
        record |= {"eval_accuracy": 0.9, "eval_reward_chosen": 0.2, "eval_reward_rejected": -1.0}
    sft = [{"step": step, "loss": 1 / step} for step in steps]
    rl = [{"step": step, "reward": 0.01 * step, "completion_length": 20.0} for step in steps]
    preferences = plot_preferences([dpo, dpo])
    reasoning = plot_reasoning({"SFT": [sft], "RL": [rl, rl], "SFT + RL": [rl]})
    assert [len(axes.lines) for axes in preferences.axes] == [2, 4]
    assert [len(axes.lines) for axes in reasoning.axes] == [1, 3, 3]
    assert as_picture(preferences).startswith("data:image/png;base64,iVBOR")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_resumes_and_writes_its_tables(starts_ray: None, tmp_path: Path) -> None:
    """Not what is learnt, which takes hours, but whole chains on a few rows."""
    runs = tmp_path / "runs"

    def run() -> str:
        sizes = ["data.synthetic.count=40", "save_steps=2"]
        options = ["--seeds", "0", "--items", "4", "--runs", str(runs)]
        job = str(ROOT / "ray_jobs" / "miniature.py")
        done = subprocess.run(
            [sys.executable, job, "table4", "table7", "table8", *sizes, *options],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run()
    assert "| + SFT + RL |" in first
    figures = json.loads((runs / "scores.json").read_text())
    assert {name: len(each["claims"]) for name, each in figures.items()} == {
        "table4": 1,
        "table7": 5,
        "table8": 2,
    }
    last = runs / "seed-0" / "sft-rl"
    made = {path: path.stat().st_mtime_ns for path in runs.rglob("model.safetensors")}
    assert len(made) == 6 + 4 + 2  # stages 4 and 7, stages of both adapters, and their beginnings
    asked = json.loads((runs / "answers.json").read_text())
    shutil.rmtree(last)  # as if the run had been interrupted before this stage
    second = run()
    remade = {path for path, time in made.items() if path.stat().st_mtime_ns != time}
    assert remade == {last / "model.safetensors"}
    assert asked.items() <= json.loads((runs / "answers.json").read_text()).items()

    def tables(text: str) -> list[str]:
        rows = re.findall(r"^\|.*\|$", text, re.MULTILINE)
        return [row for row in rows if not row.startswith("| sft-rl")]  # its seconds differ

    assert tables(first) == tables(second)
    assert (runs / "report.html").is_file()
