"""The miniature's tables as Markdown."""

from collections.abc import Iterable, Sequence

from flashvl.eval.miniature.latency import Timed, compare_latencies
from flashvl.eval.miniature.results import Result
from flashvl.eval.miniature.verdicts import Comparison


def render_table(result: Result) -> str:
    """Figures, claims and compute of a table."""
    columns = list(dict.fromkeys(column for row in result.rows.values() for column in row))
    seeds = ", ".join(map(str, result.seeds))
    parts = [
        f"## {result.table.title}",
        f"Exact match, {result.items} held-out questions of each seed ({seeds}); mean and standard"
        " deviation over the seeds.",
        render_rows(
            ["", *columns],
            (
                [label, *(str(row[column]) if column in row else "-" for column in columns)]
                for label, row in result.rows.items()
            ),
        ),
        render_claims(result.comparisons),
        result.table.design,
        f"It cannot show everything: {result.table.limits}",
        f"Compute: {result.training_s:.0f} s of training, {result.asking_s:.0f} s of asking.",
        render_rows(
            ["stage", "rows", "seconds by seed"],
            (
                [stage.name, f"{stage.rows:,}", ", ".join(f"{s:.0f}" for s in stage.seconds)]
                for stage in result.stages
            ),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def render_latency(timed: Sequence[Timed]) -> str:
    """Times and claims of Figure 1; differences are in milliseconds."""
    parts = [
        "## Figure 1 and A.4: latency",
        render_rows(
            ["", "visual tokens", "first token, ms", "next tokens, ms each", "tokens/s"],
            (
                [
                    each.name,
                    str(each.visual_tokens),
                    f"{each.median_first_ms:.1f}",
                    f"{each.median_step_ms:.2f}",
                    f"{each.tokens_per_s:.0f}",
                ]
                for each in timed
            ),
        ),
        render_claims(compare_latencies(timed)),
    ]
    return "\n\n".join(parts) + "\n"


def render_claims(comparisons: Sequence[Comparison]) -> str:
    """A line for each claim, with its verdict in the last column."""
    return render_rows(
        ["claim", "the paper", "difference", "pairs for : against", "p", "verdict"],
        (
            [
                each.claim,
                each.paper,
                ", ".join(f"{difference:+.3f}" for difference in each.differences),
                f"{each.wins} : {each.losses}",
                each.p_text,
                f"**{each.word}**",
            ]
            for each in comparisons
        ),
    )


def render_rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
