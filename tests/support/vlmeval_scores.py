"""Runs VLMEvalKit's own scorers on answers, in a process of its own, and writes down what they say.

python vlmeval_scores.py FOLDER, where VLMEvalKit is in the package `vlmeval` on the path.

FOLDER holds NAME.tsv for each benchmark: its rows, with the columns `prediction` and `reply`, what
a judge says of the prediction. The results go to `results.json` there: by benchmark, what `exact`
matching and what a `judge` makes of each row, and the `figures`.
"""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[1])
os.environ |= {"PRED_FORMAT": "tsv", "EVAL_FORMAT": "csv", "LMUData": str(FOLDER)}


def without_contents(name: str) -> types.ModuleType:
    """A package whose modules can be imported, but whose own code, which imports all of a hundred
    libraries, is not run."""
    spec = importlib.util.find_spec("vlmeval") if name == "vlmeval" else None
    folder = Path(spec.origin).parent if spec else Path(sys.modules["vlmeval"].__path__[0])
    module = types.ModuleType(name)
    module.__path__ = [str(folder if name == "vlmeval" else folder / "/".join(name.split(".")[1:]))]
    sys.modules[name] = module
    return module


without_contents("vlmeval")
without_contents("vlmeval.dataset")
UTILITIES: Any = without_contents("vlmeval.dataset.utils")
UTILITIES.build_judge, UTILITIES.DEBUG_MESSAGE = None, ""

import pandas as pd  # noqa: E402
from vlmeval.dataset.dynamath import DynaMath_auxeval  # noqa: E402
from vlmeval.dataset.image_mcq import ImageMCQDataset, MMMUDataset  # noqa: E402
from vlmeval.dataset.image_vqa import OCRBench  # noqa: E402
from vlmeval.dataset.image_yorn import ImageYORNDataset  # noqa: E402
from vlmeval.dataset.utils import mathv, mathverse, mathvista, mmvet, wemath, yorn  # noqa: E402
from vlmeval.dataset.utils import multiple_choice as mcq  # noqa: E402

if not hasattr(pd.DataFrame, "_append"):  # gone from pandas, but not from VLMEvalKit

    def _append(table: pd.DataFrame, row: dict[str, Any], ignore_index: bool) -> pd.DataFrame:
        return pd.concat([table, pd.DataFrame([row])], ignore_index=ignore_index)

    pd.DataFrame._append = _append


class FixedJudge:
    """A judge model that always replies the same."""

    def __init__(self, reply: object):
        self.reply = str(reply)

    def generate(self, prompt: str, temperature: float = 0) -> str:
        return self.reply


def evaluated(kind: type, name: str, path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The figures of a whole evaluation by exact matching, and the file with each row's result."""
    dataset = kind.__new__(kind)
    dataset.dataset_name, dataset.data = name, pd.read_csv(path, sep="\t")
    copy = path.parent / f"answers_{name}.tsv"
    dataset.data.to_csv(copy, sep="\t", index=False)
    figures = dataset.evaluate(str(copy), model="exact_matching", nproc=1)
    ending = "_auxmatch" if kind is ImageYORNDataset else "_exact_matching_result"
    return figures, pd.read_csv(copy.with_name(f"{copy.stem}{ending}.tsv"), sep="\t")


def multiple_choice(name: str, path: Path) -> dict[str, Any]:
    kind = MMMUDataset if name.startswith("MMMU_DEV") else ImageMCQDataset
    figures, rows = evaluated(kind, name, path)
    data = pd.read_csv(path, sep="\t")
    judged = {}
    if "MMBench" not in name:
        data["GT"] = [a if a in list("ABCDEFGHIJ") else "A" for a in data["answer"]]
        data = mcq.MMMU_preproc(data) if name.startswith("MMMU_DEV") else data
        for _, line in data.iterrows():
            hit = mcq.eval_vanilla(FixedJudge(line["reply"]), line, dataset_name=name)["hit"]
            judged[str(line["index"])] = hit
    exact = {str(index): hit for index, hit in zip(rows["index"], rows["hit"], strict=True)}
    return {"exact": exact, "judge": judged, "figures": figures.to_dict("records")}


def yes_or_no(name: str, path: Path) -> dict[str, Any]:
    figures, rows = evaluated(ImageYORNDataset, name, path)
    exact = {str(i): int(score) for i, score in zip(rows["index"], rows["score"], strict=True)}
    judged = {}
    for _, line in pd.read_csv(path, sep="\t").iterrows():
        said = yorn.YOrN_Extraction(line["prediction"])
        if said == "Unknown":
            said = yorn.YOrN_auxeval(FixedJudge(line["reply"]), line)
        judged[str(line["index"])] = int(said == line["answer"])
    return {"exact": exact, "judge": judged, "figures": figures.to_dict("records")}


def ocrbench(path: Path) -> dict[str, Any]:
    exact = {}
    data = pd.read_csv(path, sep="\t")
    for _, line in data.iterrows():
        one = FOLDER / "one.tsv"
        pd.DataFrame([line]).to_csv(one, sep="\t", index=False)
        exact[str(line["index"])] = OCRBench.evaluate(str(one))["Final Score"]
    return {"exact": exact, "figures": [OCRBench.evaluate(str(path))]}


def mathematics(module: Any, auxiliary: str, check: str, path: Path) -> dict[str, Any]:
    """MathVista or MathVision: a judge copies out the answer, and a rule compares the copy."""
    judged = {}
    for _, line in pd.read_csv(path, sep="\t", dtype={"answer": str, "reply": str}).iterrows():
        found = getattr(module, auxiliary)(FixedJudge(line["reply"]), line)
        right = getattr(module, check)(pd.Series({**line, "res": found["res"]}), prefetch=False)
        judged[str(line["index"])] = int(right)
    return {"judge": judged}


def mathverse_(path: Path) -> dict[str, Any]:
    data = pd.read_csv(path, sep="\t", dtype={"answer": str, "reply": str})
    data["extract"] = data["prediction"]
    data["score"] = [
        mathverse.MathVerse_auxeval_score(FixedJudge(line["reply"]), line)["score"]
        for _, line in data.iterrows()
    ]
    scored = FOLDER / "scored.tsv"
    data.to_csv(scored, sep="\t", index=False)
    judged = {str(i): int(score) for i, score in zip(data["index"], data["score"], strict=True)}
    return {"judge": judged, "figures": mathverse.MathVerse_acc(str(scored)).to_dict("records")}


def mmvet_(path: Path) -> dict[str, Any]:
    data = pd.read_csv(path, sep="\t", dtype={"answer": str, "reply": str})
    data["score"] = [
        mmvet.MMVet_auxeval(FixedJudge(line["reply"]), line)["score"] for _, line in data.iterrows()
    ]
    scored = FOLDER / "scored.tsv"
    data.to_csv(scored, sep="\t", index=False)
    figures, _ = mmvet.MMVet_acc(str(scored))
    judged = {str(i): score for i, score in zip(data["index"], data["score"], strict=True)}
    return {"judge": judged, "figures": figures.to_dict("records")}


def dynamath(path: Path) -> dict[str, Any]:
    judged = {}
    for _, line in pd.read_csv(path, sep="\t", dtype={"answer": str, "reply": str}).iterrows():
        found = DynaMath_auxeval(FixedJudge(line["reply"]), line)
        judged[str(line["index"])] = int(found["correct"])
    return {"judge": judged}


def wemath_(path: Path) -> dict[str, Any]:
    data = pd.read_csv(path, sep="\t")
    data["GT"] = data["answer"]
    data["hit"] = [
        mcq.eval_vanilla(FixedJudge(line["reply"]), line, dataset_name="WeMath")["hit"]
        for _, line in data.iterrows()
    ]
    scored = FOLDER / "scored.tsv"
    data.to_csv(scored, sep="\t", index=False)
    judged = {str(i): int(hit) for i, hit in zip(data["index"], data["hit"], strict=True)}
    return {"judge": judged, "figures": [wemath.wemath_evaluate_models(str(scored))]}


def say(path: Path) -> dict[str, Any]:
    name = path.stem
    match name:
        case "MME" | "HallusionBench":
            return yes_or_no(name, path)
        case "OCRBench":
            return ocrbench(path)
        case "MathVista_MINI":
            return mathematics(mathvista, "MathVista_auxeval", "post_check", path)
        case "MathVision":
            return mathematics(mathv, "MATH_V_auxeval", "post_check", path)
        case "MathVerse_MINI":
            return mathverse_(path)
        case "MMVet":
            return mmvet_(path)
        case "DynaMath":
            return dynamath(path)
        case "WeMath":
            return wemath_(path)
        case _:
            return multiple_choice(name, path)


if __name__ == "__main__":
    results = {path.stem: say(path) for path in sorted(FOLDER.glob("[A-Z]*.tsv"))}
    (FOLDER / "results.json").write_text(json.dumps(results, default=str))
