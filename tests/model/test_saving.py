"""Saved files have the umask's permissions, so that a service may read another user's model."""

from collections.abc import Callable
from pathlib import Path

from flashvl.model.loading import load_model, load_processor
from flashvl.train.create import create_random, create_variant

Check = Callable[[Path], None]


def test_a_model_that_is_saved(
    tiny_random: Path, tmp_path: Path, assert_obeys_umask: Check
) -> None:
    folder = tmp_path / "saved" / "deep"
    model = load_model(tiny_random)
    model.save_pretrained(folder, max_shard_size="1MB")
    load_processor(tiny_random).save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (folder / "modeling_flashvl.py").is_file()
    assert_obeys_umask(tmp_path / "saved")
    model.save_pretrained(folder)  # over the files that exist
    assert_obeys_umask(tmp_path / "saved")


def test_where_a_training_begins(tmp_path: Path, assert_obeys_umask: Check) -> None:
    create_random("tiny", tmp_path / "out" / "random")
    create_variant(tmp_path / "out" / "random", "tiny-iss", tmp_path / "out" / "variant")
    assert_obeys_umask(tmp_path / "out")
