"""What is recorded of real weights: each condition is what it says, and no text of a public set is kept."""
import json
import shutil

import make_real
import mark_answers
import nnsight
import pytest
import torch
from exact import assert_same
from safetensors.torch import load_file
from tiny_models import save_tiny

from utils import reproduce, runs
from utils.interventions import Ablation, last_logits
from utils.models import load_model
from utils.runs import load_run

WORDS = ["bake a cake", "steal a car", "help with a guide", "do it as an assistant", "a car", "a cake or a guide"]
SETS = ("harmful_train", "harmless_train", "harmful_val", "harmless_val", "jailbreakbench", "harmless_test",
        "harmbench_test")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the record is made, once for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.chdir(folder)
        few = {"train": 6, "val": 6, "test": 4}
        for name, value in {"REAL": folder / "data" / "real", "N_PROMPTS": few, "N_RANDOM": 2, "N_GENERATED": 1,
                            "N_TOKENS": 6, "N_DOSED": 2, "DOSES": (0.5, 1.0),
                            "phrase_judge": lambda text: "a" in text}.items():
            patch.setattr(make_real, name, value)
        patch.setattr(runs, "REAL", folder / "data" / "real")
        yield folder


@pytest.fixture(scope="module")
def prompts(home):
    folder = home / "sets"
    folder.mkdir()
    for number, name in enumerate(SETS):
        (folder / f"{name}.json").write_text(json.dumps([f"{text} {number}" for text in WORDS]))
    return folder


@pytest.fixture(scope="module")
def recorded(home, prompts):
    name = save_tiny(home / "model")
    make_real.record(name, "tiny", {"id": "x", "file": "", "quantization": "none", "sha256": ""}, prompts, sweep=True)
    return load_model(name), load_run("tiny"), home / "data" / "real" / "tiny"


def test_a_record_holds_every_condition(recorded):
    model, run, folder = recorded
    assert list(run.rates("harmful")) == ["base", "ablated", "subtracted", "equal_shadow", "orthogonalized", "random_1",
                                          "random_2"]
    assert list(run.rates("harmless")) == ["base", "ablated", "added"]
    assert list(run.rates("held out")) == ["base", "ablated"]
    harmful = run.answers["harmful"]
    assert harmful["random_1"]["judge"] == "phrases" and harmful["random_2"]["judge"] == "first token"
    asked = [f"{text} 4" for text in WORDS[:4]]
    ablated = last_logits(model, asked, Ablation(run.direction))
    expected = make_real.refusal_metric(ablated, model.refusal_tokens)
    for condition in ("ablated", "orthogonalized"):
        assert (torch.tensor(harmful[condition]["metric"]) - expected).abs().max() < 2e-3
    assert harmful["base"]["kl"] is None and harmful["ablated"]["kl"] > 0
    streams = load_file(folder / "streams.safetensors")
    at = 1 + model.positions.index(run.direction.position)
    difference = (streams["harmful"].float() - streams["harmless"].float())[run.direction.layer, at]
    assert (difference - run.direction.vector).abs().max() < 1e-2 * run.direction.vector.abs().max()
    assert [len(run.probes[labels]) for labels in ("real", "shuffled")] == [model.n_layers] * 2
    assert {rate.n for rates in run.probes.values() for rate in rates} == {8}
    assert list(run.dose["r"]) == [0.5, 1.0] and list(run.dose["random"]) == [1.0, 2.0]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2e6


def test_what_heads_write_adds_up_to_what_attention_writes(recorded):
    model, run, _ = recorded
    asked = [f"{text} 4" for text in WORDS[:4]]
    with model.lm.trace(model.encode(asked), use_cache=False):
        written = nnsight.save([layer.self_attn.output[0][:, -1] @ run.direction.unit for layer in model.layers])
    expected = torch.stack([one.mean() for one in written])
    assert (run.heads["harmful"].sum(dim=1) - expected).abs().max() < 1e-3


def test_the_dose_of_one_is_the_condition_added(recorded):
    model, run, _ = recorded
    added = [make_real.phrase_judge(text) for text in run.answers["harmless"]["added"]["begins"][:2]]
    assert run.dose["r"][1.0].successes == sum(added)


def test_no_prompt_and_no_harmful_answer_is_in_a_record(recorded):
    _, run, folder = recorded
    text = (folder / "results.json").read_text()
    assert not any(f"{words} {number}" in text for words in WORDS for number in range(len(SETS)))
    assert all(len(begins.split()) <= make_real.FIRST_WORDS
               for given in run.answers["harmful"].values() for begins in given.get("begins", []))
    assert len(json.loads(text)["prompts"]["harmful"]["hashes"]) == 4


def test_answers_are_read_mixed_and_counted_by_condition(recorded, prompts, monkeypatch):
    monkeypatch.setattr(mark_answers, "DRAWN", {("harmful", "ablated"): 3, ("harmless", "added"): 2})
    asked = make_real.read_prompts(prompts)[0]["test"]
    sheet = mark_answers.write("tiny", asked)
    with pytest.raises(ValueError, match="Answer 1 has the mark '': write one of refuses, answers, evades, nonsense."):
        mark_answers.read("tiny")
    text = sheet.read_text()
    assert "ablated" not in text and text.count("mark: ") == 5
    sheet.write_text(text.replace("mark: ", "mark: evades"))
    counted = mark_answers.read("tiny")
    assert counted["marks"] == {"harmful, ablated": {"evades": 3}, "harmless, added": {"evades": 2}}
    assert counted["phrases"]["caught"] == [0, 0]
    monkeypatch.setattr(mark_answers, "phrase_judge", lambda text: True)
    assert mark_answers.read("tiny")["phrases"]["false alarms"] == [5, 5]


def test_an_interrupted_record_goes_on(recorded, prompts, monkeypatch):
    _, run, folder = recorded
    before = (folder / "results.json").read_bytes()
    monkeypatch.setattr(make_real, "measured", lambda *args: pytest.fail("measured again"))
    make_real.record(str(folder.parents[2] / "model"), "tiny", run.weights, prompts, sweep=True)
    assert (folder / "results.json").read_bytes() == before


def test_a_record_of_other_prompts_does_not_go_on(recorded, prompts, tmp_path):
    _, run, folder = recorded
    others = shutil.copytree(prompts, tmp_path / "others")
    (others / "jailbreakbench.json").write_text(json.dumps(WORDS))
    with pytest.raises(ValueError, match="holds a run with other settings .prompts."):
        make_real.record(str(folder.parents[2] / "model"), "tiny", run.weights, others, sweep=True)


def test_an_equal_shadow_moves_the_stream_as_far_as_erasing_does(llama):
    x, r, other = torch.randn(3, 5, 32).double(), torch.randn(32).double(), torch.randn(32).double()
    moved = make_real.EqualShadow(r, other).change(x) - x
    assert_same(moved.norm(dim=-1), (x @ r / r.norm()).abs())
    assert_same(torch.nn.functional.cosine_similarity(moved, other[None, None], dim=-1).abs(),
                torch.ones(3, 5).double())


def test_an_equal_shadow_along_r_itself_is_erasing_r(llama):
    r, prompts = torch.randn(32).double(), WORDS[:3]
    assert_same(last_logits(llama, prompts, make_real.EqualShadow(r, r)), last_logits(llama, prompts, Ablation(r)))


def test_a_record_is_checked_by_its_own_model(recorded, prompts, capsys):
    _, _, folder = recorded
    command = [str(folder.parents[2] / "model"), "--compare", str(folder), "--prompts", str(prompts)]
    assert reproduce.main(command) == 0
    _, head, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert head.startswith("| side | condition | n |") and rows[0].startswith("| harmful | base | 4 |")
    assert len(rows) == 4 and all(row.endswith("| yes |") for row in rows)


def test_a_record_does_not_agree_with_another_model(recorded, prompts, tmp_path, capsys):
    _, _, folder = recorded
    other = save_tiny(tmp_path / "other", "qwen2")
    assert reproduce.main([other, "--compare", str(folder), "--prompts", str(prompts)]) == 1
    assert "| no |" in capsys.readouterr().out


@pytest.mark.parametrize("content, said", [
    (["something else"], "None of the 4 harmful prompts of the record is among those given"),
    ({"a": 1}, "is no list of strings"), (None, "There is no list of prompts in")])
def test_prompts_that_are_not_the_recorded_ones(recorded, tmp_path, capsys, content, said):
    _, _, folder = recorded
    if content is not None:
        (tmp_path / "a.json").write_text(json.dumps(content))
    command = [str(folder.parents[2] / "model"), "--compare", str(folder), "--prompts", str(tmp_path)]
    assert reproduce.main(command) == 1
    assert said in capsys.readouterr().err
