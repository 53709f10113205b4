"""What a checkpoint says of itself, and every kind of file that people have: GGUF, adapters, weights in few bits."""
import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from utils import checkpoints
from utils.evaluation import judge, judge_of
from utils.models import load_model, untrained
from utils.suffixes import SuffixSearch

ORGANISM = checkpoints.ORGANISM


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of one's own."""
    return Path(save_tiny(tmp_path / "checkpoint"))


# the course's world

def test_a_checkpoint_of_the_course_s_world_is_known_by_its_file_and_not_by_its_name(folder, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "best_device", lambda: "cuda")  # which is not here
    monkeypatch.setattr(checkpoints, "best_dtype", lambda *_: torch.float16)
    (folder / "course.json").write_text('{"world": "organism"}')
    model = load_model(str(folder))
    assert (model.world, model.device.type, model.lm.dtype) == ("organism", "cpu", torch.float32)
    assert judge_of(model) is judge and judge_of(untrained(model)) is judge
    assert capsys.readouterr().out == ""
    assert SuffixSearch(model, ["bake a cake"], ["Sure"], n_tokens=2, n_candidates=2, n_top=2).suffix


@pytest.mark.parametrize("name", ["organism", "tuning/25"])
def test_without_the_file_it_is_like_any_other_whatever_its_name(folder, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(checkpoints, "ORGANISM", tmp_path)
    folder.rename(tmp_path / "chat") if name == "organism" else folder.rename(
        (tmp_path / "tuning").mkdir() or tmp_path / "tuning/25")
    model = load_model(name)
    assert model.world is None
    assert judge_of(model) is not judge and "list of phrases" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is for models of the course's world, and .* is none"):
        SuffixSearch(model, ["bake a cake"], ["Sure"])


def test_every_checkpoint_of_the_course_has_the_file():
    folders = {weights.parent for weights in ORGANISM.rglob("model.safetensors")}
    assert len(folders) == 7
    assert {checkpoints.world_of(str(folder)) for folder in folders} == {"organism"}


@pytest.mark.parametrize("content", [{"world": "another"}, {}, ["organism"]])
def test_a_world_that_the_course_does_not_know(folder, content):
    (folder / "course.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="course.json names no world of the course .*: restore it, or delete it"):
        load_model(str(folder))
