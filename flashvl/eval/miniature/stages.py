"""Trains the miniature's stages, each once: a finished stage is not trained again.

shared/STAGE, seed-N/STAGE    a stage's folder, as `flashvl.train.run.launch` writes it
.../start-PRESET              a variant of tiny that a stage starts from
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from flashvl.eval.miniature.designs import STAGES, Variant
from flashvl.progress import ShowProgress
from flashvl.train.create import create_variant
from flashvl.train.recipe import load_recipe
from flashvl.train.run.export import CONFIG
from flashvl.train.run.launch import run

SEED_STRIDE = 1000
"""Distance between the data seeds of two seeds, so that no two stages draw the same scenes."""
Show = Callable[[str], AbstractContextManager[ShowProgress]]
"""Shows the progress of a work, whose name it is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """Makes the models that the tables compare."""

    runs: Path
    """Folder for all stages."""
    recipes: Path
    """Folder of the recipes, `ray_jobs/configs`."""
    overrides: Sequence[str] = ()
    """Values that replace those of every recipe, as `key=value`."""
    show: Show

    def folder(self, stage: str, seed: int) -> Path | None:
        """The folder of a stage's model; None for a shipped model."""
        if stage not in STAGES:
            return None
        return self.runs / (f"seed-{seed}" if STAGES[stage].is_seeded else "shared") / stage

    def chain(self, stages: Iterable[str]) -> list[str]:
        """The stages and all those before them, the first ones first."""
        found: dict[str, None] = {}
        for name in stages:
            if name in STAGES:
                after = STAGES[name].after
                before = [] if isinstance(after, Variant) else self.chain([after])
                found |= dict.fromkeys([*before, name])
        return list(found)

    def make(self, name: str, seed: int) -> Path | str:
        """Train what is left of a stage and of those before it, on the Ray cluster that this
        process is connected to; returns its folder, or the name of a shipped model as it is."""
        folder = self.folder(name, seed)
        if folder is None:
            return name
        stage = STAGES[name]
        seed = seed if stage.is_seeded else 0
        if isinstance(stage.after, Variant):
            before: Path | str = self._start(stage.after, folder.parent, seed)
        else:
            before = self.make(stage.after, seed)
        path = self.recipes / f"{stage.recipe}.yaml"
        data = load_recipe(path).data.synthetic
        assert data is not None
        chain = [
            f"stage={folder.parent.name}-{name}",
            f"init_from={before}",
            f"output_dir={folder}",
            f"seed={seed}",
            f"data.synthetic.seed={data.seed + SEED_STRIDE * seed}",
        ]
        with self.show(f"{folder.parent.name}/{name}") as on_progress:
            run(load_recipe(path, [*self.overrides, *chain]), on_progress)
        return folder

    def _start(self, start: Variant, parent: Path, seed: int) -> Path:
        """The model that a stage starts from, which is written unless an earlier run did."""
        kept = "-kept" if start.keeps_adapter else ""
        folder = parent / f"start-{start.preset}{kept}"
        if not (folder / CONFIG).exists():
            create_variant("tiny", start.preset, folder, seed, keeps_adapter=start.keeps_adapter)
        return folder
