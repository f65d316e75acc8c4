"""The designs of the miniature as data: which stages make which models, and what is compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flashvl.errors import ConfigError

QuestionSet = Literal["reading", "reasoning", "large"]
"""Questions about scenes; about problems and scenes; about large pictures. See `answers`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A model of a preset with the tower and the LLM of the shipped `tiny`."""

    preset: str
    keeps_adapter: bool
    """Whether the adapter is that of `tiny`, too; otherwise it is random."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A training stage."""

    recipe: str
    """Recipe's path in `ray_jobs/configs`, without its ending."""
    after: str | Variant = "tiny"
    """What it starts from: a shipped model, another stage, or a variant of a shipped model."""
    is_seeded: bool = True
    """Whether each seed trains one of its own; otherwise all seeds share one, of seed 0."""


TILINGS = {
    "static": "tiny",
    "dynamic": "tiny-dynamic",
    "overlap": "tiny-many-overlap",
    "ISS": "tiny-many-iss",
}
"""Presets of Table 6 and Figure 1."""
STAGES = {
    # Tables 5 and 8.
    "stage1": Stage(recipe="miniature/stage1", after=Variant(preset="tiny", keeps_adapter=False)),
    "stage2": Stage(recipe="miniature/stage2", after="stage1"),
    "stage3": Stage(recipe="miniature/stage3", after="stage2"),
    "stage4": Stage(recipe="miniature/stage4", after="stage3"),
    "two-linear-stage1": Stage(
        recipe="miniature/stage1", after=Variant(preset="tiny-two-linear", keeps_adapter=False)
    ),
    "two-linear-stage2": Stage(recipe="miniature/stage2", after="two-linear-stage1"),
    # Table 6.
    **{
        tiling.lower(): Stage(
            recipe="miniature/tilings", after=Variant(preset=preset, keeps_adapter=True)
        )
        for tiling, preset in TILINGS.items()
    },
    # Tables 4 and 7.
    "stage5": Stage(recipe="tiny-reasoning/stage5"),
    "introduction": Stage(recipe="tiny-reasoning/introduction", is_seeded=False),
    "base": Stage(recipe="tiny-reasoning/short_answers", after="introduction", is_seeded=False),
    "sft": Stage(recipe="tiny-reasoning/reasoning_sft", after="base"),
    "rl": Stage(recipe="tiny-reasoning/grpo", after="base"),
    "sft-rl": Stage(recipe="tiny-reasoning/grpo", after="sft"),
}
"""Stages by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What the paper's table says: one model is better than another."""

    text: str
    paper: str
    """The paper's own figures."""
    better: str
    """Row of the table with the better model."""
    worse: str
    column: str = "average"
    """Column of the table in which it is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of the paper, in miniature."""

    title: str
    rows: dict[str, str]
    """Stage, or shipped model, by the row's label."""
    questions: QuestionSet
    claims: tuple[Claim, ...]
    design: str
    """Sentences about how the models are made."""
    limits: str
    """Sentences about what it cannot show."""
    logged: tuple[str, ...] = ()
    """Figures of the last step of training that the table shows as well."""


TABLES = {
    "table4": Table(
        title="Table 4: DPO",
        rows={"tiny": "tiny", "+ DPO": "stage5"},
        questions="reading",
        logged=("eval_accuracy", "eval_margin"),
        claims=(
            Claim(
                text="DPO raises the average",
                paper="60.6 -> 62.4, 62.7 -> 64.0, 63.7 -> 64.8",
                better="+ DPO",
                worse="tiny",
            ),
        ),
        design="From the shipped tiny, 640 pairs of captions, of which one has one thing wrong;"
        " LoRA and beta 0.1 as in the paper. eval_accuracy is the share of 600 held-out pairs whose"
        " faithful caption has the higher implicit reward; before DPO it is 0.5 by definition.",
        limits="The paper's preferences are about the tasks of its benchmarks. Ours are about"
        " captions alone, which tiny writes without faults before, so that there is nothing to gain"
        " in exact match.",
    ),
    "table5": Table(
        title="Table 5: stages",
        rows={
            "stage 1": "stage1",
            "stage 2": "stage2",
            "stage 3": "stage3",
            "stage 4": "stage4",
        },
        questions="reading",
        claims=(
            Claim(
                text="stage 2 raises the average",
                paper="48.6 -> 54.4",
                better="stage 2",
                worse="stage 1",
            ),
            Claim(
                text="stage 3 raises the average",
                paper="54.4 -> 59.0",
                better="stage 3",
                worse="stage 2",
            ),
            Claim(
                text="stage 4 raises the average",
                paper="59.0 -> 60.6",
                better="stage 4",
                worse="stage 3",
            ),
        ),
        design="A new five-layer adapter between tiny's tower and LLM: 1,280, 3,072, 768 and"
        " 1,280 rows, in proportion to the paper's 10, 24, 6 and 10 million, each seen once. Stage"
        " 1 trains the adapter alone.",
        limits="The paper's stages bring better data and harder questions; ours draw from one"
        " world, in which tower and LLM are at home before. A stage of 24 steps, which begins at a"
        " high rate again, hardly recovers from it; the paper's have 25,000. Rates fall from stage"
        " to stage, so that some of the growth is annealing. Stage 5 is Table 4.",
    ),
    "table6": Table(
        title="Table 6: tilings",
        rows={
            "static": "static",
            "dynamic": "dynamic",
            "overlap": "overlap",
            "ISS": "iss",
        },
        questions="large",
        claims=(
            Claim(
                text="dynamic is better than static",
                paper="46.9 -> 50.6",
                better="dynamic",
                worse="static",
            ),
            Claim(
                text="dynamic is better than overlap",
                paper="50.6 against 49.9",
                better="dynamic",
                worse="overlap",
            ),
            Claim(
                text="ISS is better than dynamic",
                paper="51.4 against 50.6",
                better="ISS",
                worse="dynamic",
            ),
            Claim(
                text="ISS is better than overlap",
                paper="51.4 against 49.9",
                better="ISS",
                worse="overlap",
            ),
            Claim(
                text="ISS reads better than dynamic",
                paper="OCRBench 427 against 383",
                better="ISS",
                worse="dynamic",
                column="read",
            ),
            Claim(
                text="ISS is better than dynamic where a seam cuts a thing",
                paper="the reason that section 3.1 gives, without a figure",
                better="ISS",
                worse="dynamic",
                column="on a seam",
            ),
        ),
        design="Pictures of 192 x 192 pixels with words and shapes in any of 7 x 7 cells, which lie"
        " on the grid of visual tokens, or half a cell off it; then the seam in the middle cuts"
        " through some things. A third of the questions each are about pictures on the grid, off it"
        " with nothing cut, and off it with something cut. All models begin as tiny, with its"
        " adapter, and train whole on the same 1,920 rows. Static shows the picture at 96 pixels;"
        " the others show it at its own size, in 4, 9 and 16 tiles after the overview, with 80, 160"
        " and 68 visual tokens.",
        limits="The paper gives every tiling four tiles at most, so that overlap and ISS also lose"
        " resolution; here all have the same, as tiny's tower can read at one size alone. The"
        " overlap is 50 % of a tile, not 12.5 %, and ISS shuffles pixels like the others: without,"
        " as in the paper, its adapter would be new. After so few rows all models read badly what"
        " lies half a cell off the grid, cut or not, so that little is left that stitching could"
        " gain on a seam.",
    ),
    "table7": Table(
        title="Table 7: SFT and RL",
        rows={"base": "base", "+ SFT": "sft", "+ RL": "rl", "+ SFT + RL": "sft-rl"},
        questions="reasoning",
        claims=(
            Claim(
                text="SFT raises the average", paper="23.80 -> 26.08", better="+ SFT", worse="base"
            ),
            Claim(
                text="RL raises the average", paper="23.80 -> 27.23", better="+ RL", worse="base"
            ),
            Claim(
                text="RL gains more than SFT",
                paper="27.23 against 26.08",
                better="+ RL",
                worse="+ SFT",
            ),
            Claim(
                text="SFT and RL are better than SFT alone",
                paper="29.05 against 26.08",
                better="+ SFT + RL",
                worse="+ SFT",
            ),
            Claim(
                text="SFT and RL are better than RL alone",
                paper="29.05 against 27.23",
                better="+ SFT + RL",
                worse="+ RL",
            ),
        ),
        design="The base can work problems out and mostly does not, as it was trained on short"
        " answers last. SFT is LoRA on worked solutions in words, RL is GRPO with groups of 24 and"
        " the right answer as the reward.",
        limits="The paper's base has not been taught to answer at once, so its gains are smaller;"
        " problems of two or three digits say nothing about geometry. The reading column tells what"
        " is forgotten, which the paper does not report.",
    ),
    "table8": Table(
        title="Table 8: adapters",
        rows={"two linear": "two-linear-stage2", "five layers": "stage2"},
        questions="reading",
        claims=(
            Claim(
                text="five layers raise the average",
                paper="39.4 -> 40.8",
                better="five layers",
                worse="two linear",
            ),
            Claim(
                text="five layers read better",
                paper="OCRBench 54 -> 168",
                better="five layers",
                worse="two linear",
                column="read",
            ),
        ),
        design="Stages 1 and 2 of Table 5, with the same rows in the same order for both adapters."
        " Two linear layers are as wide as the LLM, like the usual ones (186,240 parameters against"
        " 756,416).",
        limits="Both adapters see few rows, and the larger one may only learn faster.",
    ),
}
"""Tables by name."""


def find_tables(names: Sequence[str]) -> list[str]:
    """The tables of these names; all if there are none.

    Raises:
        ConfigError: there is no such table.
    """
    if unknown := [name for name in names if name not in TABLES]:
        raise ConfigError(f"there is no {unknown[0]!r}; name one of {', '.join(TABLES)}, figure1")
    return list(names or TABLES)
