"""What every client of this folder asks, and how it tells the test what it got."""

import base64
import json
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

QUESTIONS = ("Describe the image.", "How many shapes are there?")
CHOICE = {"type": "function", "function": {"name": "report"}}


class Scene(BaseModel):
    """What is in a picture: closed, so that a small model comes to an end of it."""

    model_config = ConfigDict(extra="forbid")

    num_shapes: int = Field(ge=0, le=9)
    color: Literal["red", "green", "blue"]
    is_chart: bool


def data_url(image: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"


def as_part(image: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def tell(**answers: Any) -> None:
    sys.stdout.write(json.dumps(answers, default=str) + "\n")
