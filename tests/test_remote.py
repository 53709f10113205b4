"""Traces as they would run on NDIF: every request is serialized as nnsight sends it, and run by a stand-in that does
not have the course. NDIF itself is not asked."""
import functools
import json
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import cloudpickle
import httpx
import matplotlib
import nnsight
import pytest
import torch
import websocket
from exact import assert_same
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.schema.request import RequestModel
from planted_model import planted_prompts, save_planted
from tiny_models import save_tiny
from transformers import GenerationConfig

import utils
from utils import reproduce
from utils.activations import mean_residual_stream, residual_stream, trace_heads
from utils.evaluation import answer_losses
from utils.instructions import Instruction
from utils.interventions import (
    Ablation,
    Addition,
    added_bias,
    generate,
    last_logits,
    orthogonalized,
    set_projection,
    trace_generation,
)
from utils.models import load_model
from utils.suffixes import SuffixSearch

matplotlib.use("Agg")
PROMPTS = ["bake a cake", "steal", "I can't help with a car or a cake", "Sorry, a car"]  # of unequal lengths
ANSWERED = [Instruction(id=text, text=text, answer="Sure, here is " + text) for text in PROMPTS]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Pinned:
    """An intervention of one's own, as lesson 06 writes one in a cell."""
    __module__ = "__main__"

    def __init__(self, direction, level):
        self.direction, self.level = direction, level

    def apply(self, model):
        for layer in model.layers:
            x = layer.input
            layer.input = set_projection(x, self.direction, torch.full((x.shape[1],), self.level))


INTERVENTIONS = {
    "none": None,
    "ablation": Ablation(randn(32)),
    "ablation, one direction per row": Ablation(randn(4, 32)),
    "ablation at some places": Ablation(randn(32), layers=[1, 2], positions=[-1, -3]),
    "addition": Addition(randn(32), layer=2, coefficient=-1.5),
    "addition, one direction per row": Addition(randn(4, 32), layer=1),
    "one's own": Pinned(randn(32), level=2.0),
}
FAST = ("ablation, one direction per row", "one's own")
READINGS = {
    "last logits": lambda model, change: last_logits(model, PROMPTS, change, batch_size=3),
    "generated tokens": lambda model, change: trace_generation(model, model.encode(PROMPTS), change, 6),
    "losses of answers": lambda model, change: torch.cat(answer_losses(model, ANSWERED, change, batch_size=3)),
}


def names_in(request):
    return {argument for _, argument, _ in pickletools.genops(request) if isinstance(argument, str)}


@pytest.fixture(scope="module")
def ndif():
    """Requests go to the stand-in. Yields those that were sent, not compressed."""
    stand_in = subprocess.Popen([sys.executable, "-I", Path(__file__).with_name("ndif_stand_in.py")],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    sent = []

    def send(backend, request, tracer):
        sent.append(RequestModel.serialize(tracer))
        pickle.dump((request.metadata(), backend._serialize(tracer)), stand_in.stdin)
        stand_in.stdin.flush()
        done, answer = pickle.load(stand_in.stdout)
        if not done:
            raise RemoteError(answer)
        return backend.finalize(answer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteBackend, "request", send)
        patch.setattr(nnsight.CONFIG.API, "APIKEY", "a key")
        patch.setattr(nnsight, "is_model_running", lambda name: True)
        # Or the hub would be asked how the id is spelled.
        patch.setattr(HuggingFaceModel, "_remoteable_model_key", lambda lm: json.dumps({"repo_id": lm.repo_id}))
        yield sent
        stand_in.stdin.close()
        assert stand_in.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def both(ndif, tmp_path_factory):
    """A tiny model by its architecture, twice: with its weights here, and on the stand-in."""
    @functools.cache
    def load(architecture):
        folder = save_tiny(tmp_path_factory.mktemp(architecture), architecture)
        GenerationConfig(do_sample=True, repetition_penalty=5.0, eos_token_id=329).save_pretrained(folder)
        return load_model(folder), load_model(folder, remote=True)
    return load


@pytest.fixture
def remote(both):
    return both("llama")[1]


def read_both(both, read):
    here, there = map(read, both)
    assert_same(there, here)
    return there


# what runs there equals what runs here

@pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
@pytest.mark.parametrize("change", [
    pytest.param(change, id=name, marks=[] if name in FAST else pytest.mark.slow)
    for name, change in INTERVENTIONS.items()])
def test_every_intervention_is_the_same_there(both, ndif, reading, change):
    found = read_both(both("llama"), lambda model: reading(model, change))
    assert found.device.type == "cpu"
    assert "CodeType" not in names_in(ndif[-1])  # code goes as source: bytecode would ask for the same Python there


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gemma2", "gpt_neox", "lfm2"])  # norms; other names; no attention
@pytest.mark.parametrize("change", ["ablation", "addition"])
def test_other_architectures_too(both, architecture, change):
    for reading in READINGS.values():
        read_both(both(architecture), lambda model: reading(model, INTERVENTIONS[change]))  # noqa: B023


def test_the_residual_stream_and_the_heads(both):
    streams = read_both(both("llama"), lambda model: residual_stream(model, PROMPTS, batch_size=3))
    assert streams.shape == (4, 4, 5, 32)
    read_both(both("llama"), lambda model: mean_residual_stream(model, PROMPTS, [-2, -1], batch_size=3))
    for which in (0, 1):
        read_both(both("llama"), lambda model: trace_heads(model, model.encode(PROMPTS))[which])  # noqa: B023


def test_answers_are_text(both):
    here, there = both("llama")
    assert generate(there, PROMPTS, max_new_tokens=5) == generate(here, PROMPTS, max_new_tokens=5)


@pytest.mark.slow
def test_the_whole_experiment(ndif, tmp_path, capsys, monkeypatch):
    def load(split, side, n=8):
        texts = planted_prompts({"harmful": "#", "harmless": "+"}[side], n, seed=len(split))
        return [Instruction(id=text, text=text, side=side) for text in texts]
    monkeypatch.setattr(reproduce, "load_instructions", load)
    rates = {"caught": [3, 4, 0.3, 0.95], "false alarms": [0, 4, 0.0, 0.49]}  # the organism does not know these prompts
    monkeypatch.setattr(reproduce, "errors_of_judges", lambda: {"first token": rates, "phrases": rates})
    folder = Path(save_planted(tmp_path / "planted"))
    (folder / "refusal_tokens.json").write_text("[40]")
    results = []
    for where in ("here", "there"):
        arguments = [str(folder), "--n", "2", "--out", str(tmp_path / where), *["--remote"] * (where == "there")]
        assert reproduce.main(arguments) == 0
        results.append(json.loads((tmp_path / where / "results.json").read_text()))
    said = capsys.readouterr().out
    assert 'no "orthogonalized": the weights are on NDIF' in said and " / - |" in said.splitlines()[-1]
    del results[0]["refused"]["harmful"]["orthogonalized"]
    assert results[1]["refused"] == results[0]["refused"]
    assert (results[1]["layer"], results[1]["position"]) == (results[0]["layer"], results[0]["position"])


# what is sent, and what is not here

def test_the_stand_in_does_not_have_the_course(remote):
    last_logits(remote, PROMPTS)
    cloudpickle.unregister_pickle_by_value(utils)
    try:
        with pytest.raises(RemoteError, match="No module named 'utils'"):
            last_logits(remote, PROMPTS)
    finally:
        nnsight.register("utils")


def test_no_weights_are_here(remote, capsys):
    assert {weight.device.type for weight in remote.lm.parameters()} == {"meta"}
    assert remote.device.type == remote.encode(PROMPTS)["input_ids"].device.type == "cpu"
    assert repr(remote).endswith("4 layers, d_model 32, on NDIF)")
    load_model(remote.name, remote=True)
    assert capsys.readouterr().out == f"{remote.name}: 0.0477 million weights, on NDIF\n"


@pytest.mark.parametrize("edit, sentence", [
    (lambda m: orthogonalized(m, randn(32)).__enter__(), "weights of .* are on NDIF.*: give Ablation or Addition"),
    (lambda m: added_bias(m, randn(32), 2).__enter__(), "weights of .* are on NDIF.*: give Ablation or Addition"),
    (lambda m: SuffixSearch(m, PROMPTS, PROMPTS, any_model=True), "are on NDIF: search on a model that you can load"),
    (lambda m: last_logits(m, PROMPTS, Ablation(randn(16))), "has 16 entries, but .* has d_model 32"),
])
def test_what_cannot_be_done_there_is_said_before_anything_is_sent(remote, ndif, edit, sentence):
    before = len(ndif)
    with pytest.raises(ValueError, match=sentence):
        edit(remote)
    assert len(ndif) == before


@pytest.fixture
def nothing_is_asked(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("a request was sent")
    monkeypatch.setattr("nnsight.ndif._get", fail)
    monkeypatch.setattr("utils.models.locate", fail)


def test_a_missing_key(nothing_is_asked, monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    with pytest.raises(PermissionError, match="get one at https://login.ndif.us.*NDIF_API_KEY"):
        load_model("someone/large", remote=True)


@pytest.mark.parametrize("error", [
    websocket.WebSocketConnectionClosedException("Connection to remote host was lost."), httpx.ReadTimeout("timed out"),
    ConnectionRefusedError(111, "Connection refused"), json.JSONDecodeError("Expecting value", "", 0)])
def test_what_breaks_off_on_the_way_is_a_sentence(remote, monkeypatch, error):
    def fail(*args):
        raise error
    monkeypatch.setattr(RemoteBackend, "request", fail)
    for call in (last_logits, generate):
        with pytest.raises(ConnectionError, match=r"out of reach, or has broken off \(.*\): look .* try again.$"):
            call(remote, PROMPTS)


@pytest.mark.parametrize("name", ["organism", "someone/large"])
def test_a_model_that_does_not_run_there(name, monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "a key")
    monkeypatch.setattr(nnsight, "is_model_running", lambda name: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a hub out of reach is tried five times
    with pytest.raises(ValueError, match=f"'{name}' is not running on NDIF.*: print.nnsight.status"):
        load_model(name, remote=True)
