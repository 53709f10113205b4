"""Recorded runs are read as they were written, and what is wrong with one is said in a sentence."""
import json

import pytest
import torch
from safetensors.torch import save_file

from utils import runs
from utils.candidates import SCORES
from utils.evaluation import Rate
from utils.runs import load_run, run_names

ANSWERS = {"harmful": {"base": {"refused": 9, "n": 10, "interval": [0.6, 0.98], "judge": "phrases"},
                       "random_1": {"refused": 8, "n": 10, "interval": [0.5, 0.94], "judge": "phrases",
                                    "metric": [1.0] * 6 + [-1.0] * 4},
                       "random_2": {"refused": 7, "n": 10, "interval": [0.4, 0.89], "judge": "first token",
                                    "metric": [1.0] * 7 + [-1.0] * 3}},
           "harmless": {"base": {"refused": 0, "n": 10, "interval": [0.0, 0.28], "judge": "phrases"}}}


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "REAL", tmp_path)
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({
        "weights": {"id": "somebody/small", "file": "", "quantization": "none", "sha256": ""}, "n_layers": 2,
        "post_instruction": ["<end>", "\n"], "pick": {"layer": 1, "position": -2, "passes": True},
        "prompts": {"harmful": {"set": "own", "hashes": []}}, "openings": ["I"],
        "n": {"train": {"harmful": 8, "harmless": 9}, "val": {"harmful": 4, "harmless": 4}},
        "candidates": {name: [[None, None], [1.0, 2.0]] for name in SCORES}, "answers": ANSWERS,
        "probes": {"real": [[5, 10], [10, 10]], "shuffled": [[5, 10], [4, 10]]},
        "heads": {"harmful": [[1.0, 2.0]], "harmless": [[0.0, 0.5]]}, "dose": {"r": [[-1.0, 0, 8], [1.0, 7, 8]]},
        "costs": {"base": {"paragraphs": 3.0, "choices": [50, 200]}}}))
    save_file({"direction": torch.arange(4.0)}, folder / "direction.safetensors")
    return folder


def test_a_run_is_read_as_it_was_written(recorded):
    assert run_names() == ["small"]
    run = load_run("small")
    assert torch.equal(run.direction.vector, torch.arange(4.0))
    assert (run.direction.layer, run.direction.position) == (1, -2)
    assert run.place == (1, 0) and run.scores.kl[run.place] == 1.0
    assert run.scores.bypass[0].isnan().all() and run.scores.kl[1].tolist() == [1.0, 2.0]
    assert run.passes and run.weights["id"] == "somebody/small"
    assert run.rate("harmful", "base") == Rate(9, 10) and run.rates("harmless") == {"base": Rate(0, 10)}
    assert run.probes["real"] == [Rate(5, 10), Rate(10, 10)] and run.dose == {"r": {-1.0: Rate(0, 8), 1.0: Rate(7, 8)}}
    assert run.heads["harmful"].tolist() == [[1.0, 2.0]] and run.costs["base"]["choices"] == Rate(50, 200)
    assert run.n["train"]["harmless"] == 9 and run.marks == {}
    assert run.random_rates() == [Rate(8, 10)]
    assert run.random_rates("first token") == [Rate(6, 10), Rate(7, 10)]


def test_marks_are_read_where_there_are_any(recorded):
    (recorded / "marks.json").write_text(json.dumps({
        "marks": {"harmful, ablated": {"answers": 3}}, "phrases": {"caught": [9, 10], "false alarms": [1, 40]}}))
    marks = load_run("small").marks
    assert marks["marks"]["harmful, ablated"] == {"answers": 3} and marks["phrases"]["caught"] == Rate(9, 10)


@pytest.mark.parametrize("side, condition, choices", [("harmful", "added", "base, random_1, random_2"),
                                                      ("odd", "base", "harmful, harmless")])
def test_what_was_not_recorded_is_named(recorded, side, condition, choices):
    with pytest.raises(ValueError, match=f"The run 'small' has no '{side}', '{condition}': choose one of {choices}."):
        load_run("small").rate(side, condition)


@pytest.mark.parametrize("name", ["large", "", "../small/../small", "."])
def test_a_run_that_is_not_there(recorded, name):
    with pytest.raises(ValueError, match=f"There is no run '{name}': choose one of small; `make real` records one."):
        load_run(name)


def lacking(results):
    del results["pick"]
    return json.dumps(results)


@pytest.mark.parametrize("damage", [lambda results: "{", lacking, lambda results: "[]"])
def test_damaged_results(recorded, damage):
    results = json.loads((recorded / "results.json").read_text())
    (recorded / "results.json").write_text(damage(results))
    with pytest.raises(ValueError, match="The run in .*small is damaged .*: restore it from the course's repository."):
        load_run("small")


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_a_damaged_direction(recorded, content):
    file = recorded / "direction.safetensors"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match="The run in .*small is damaged"):
        load_run("small")
