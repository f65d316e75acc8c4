"""The page at `/`: a picture, a conversation about it, and what both cost.

The page knows only the service's HTTP routes, and all its files are here: it loads nothing from
elsewhere.
"""

import dataclasses
import functools
from importlib import resources
from pathlib import Path

import jinja2
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, PlainTextResponse, Response

from flashvl.data import synthetic
from flashvl.serve.protocol import RequestError

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data: blob:; media-src blob:; connect-src 'self';"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
EXAMPLE_SIDE = 320
"""Width and height of an example's picture in pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A picture of the procedural world to try, and questions about it."""

    name: str
    sample: synthetic.Sample

    @property
    def questions(self) -> list[str]:
        """Questions about the picture: its task's first, and then the one for a caption."""
        return [turn.question for turn in reversed(self.sample.turns)]

    def jpeg(self) -> bytes:
        """The picture, drawn and encoded."""
        drawn = dataclasses.replace(self.sample, size=EXAMPLE_SIDE)
        return synthetic.encode_jpeg(drawn.image(), quality=90)


def examples() -> dict[str, Example]:
    """The examples by their files' names: one for each task, and one that is not a drawing."""
    chosen: list[tuple[str, synthetic.Task, int]] = [
        ("shapes", "caption", 4),
        ("many shapes", "count", 15),
        ("a sign", "read", 3),
        ("a sum", "arithmetic", 15),
        ("a chart", "chart", 4),
        ("no drawing", "caption", 0),
    ]
    return {
        f"{number}.jpg": Example(
            name=name, sample=synthetic.sample("heldout", 1, index, tasks=("caption", task))
        )
        for number, (name, task, index) in enumerate(chosen)
    }


FILES = {"playground.css": "text/css", "playground.js": "text/javascript"}
PATHS = frozenset(
    {"/", *(f"/playground/{name}" for name in (*FILES, *(f"examples/{e}" for e in examples())))}
)
"""Paths that need no API key: their content is the same for every model."""


def add_playground(api: FastAPI, model: str, folder: Path) -> None:
    """Add the routes of the page.

    Args:
        model: what clients call the model.
        folder: the model's folder, whose README.md is its card.
    """
    card = folder / "README.md"
    shown = examples()
    page = jinja2.Template(_read("index.html"), autoescape=True).render(
        model=model, examples=shown, has_card=card.is_file()
    )

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers=HEADERS)

    @api.get("/playground/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in FILES:
            raise RequestError(404, f"the playground has no file {name[:100]!r}")
        return Response(_read(name), media_type=FILES[name], headers=HEADERS)

    @api.get("/playground/examples/{name}", include_in_schema=False)
    async def example(name: str) -> Response:
        if name not in shown:
            raise RequestError(404, f"the playground has no example {name[:100]!r}")
        return Response(_drawn(name), media_type="image/jpeg", headers=HEADERS)

    @api.get("/model-card", response_class=PlainTextResponse)
    async def model_card() -> PlainTextResponse:
        """The README.md of the model's folder: how it was made, and what it scores."""
        if not card.is_file():
            raise RequestError(404, f"the model {model!r} has no card: its folder has no README.md")
        return PlainTextResponse(card.read_text(encoding="utf-8", errors="replace"))


@functools.cache
def _drawn(name: str) -> bytes:
    return examples()[name].jpeg()


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
