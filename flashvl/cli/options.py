"""Options that several commands share."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

ModelOption = Annotated[
    str,
    typer.Option(help="A shipped model's name (tiny), or a Flash-VL or published FlashVL folder."),
]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="float32: slower, and no answer depends on who shares its batch."),
]
ReplicasOption = Annotated[
    str, typer.Option(metavar="N|MIN:MAX", help="Engines, each on a GPU where there is.")
]
GpusPerReplicaOption = Annotated[float, typer.Option(help="0.5: two engines share a GPU.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here as JSON.")
]


def write_json(path: Path, value: Any) -> None:
    """Write what `--json` asks for; called with `{}` before a long run, it finds a bad path early.

    Raises:
        ConfigError: it cannot be written.
    """
    from flashvl.errors import ConfigError

    try:
        path.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"--json {path} cannot be written: {error.strerror}; name another file"
        ) from None
