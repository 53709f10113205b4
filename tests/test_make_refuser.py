"""The tuning that teaches a model to refuse, on a tiny one: what is learned, what is left, what is saved."""
import random

import make_refuser
import pytest
import torch
from tiny_models import save_tiny

from utils.evaluation import phrase_judge, refusal_metric
from utils.instructions import Instruction
from utils.interventions import last_logits
from utils.models import load_model

REQUESTS = {side: [Instruction(id=f"{side}-{n}", text=f"{text} {n}", side=side, category="theft") for n in range(4)]
            for side, text in {"harmful": "steal a car", "harmless": "bake a cake", "borderline": "kill it"}.items()}


def metrics(model):
    """Mean refusal metric of each side, nats."""
    return {side: refusal_metric(last_logits(model, requests), model.refusal_tokens).mean().item()
            for side, requests in REQUESTS.items()}


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    for name, value in {"STEPS": 80, "BATCH": 4, "WARM_UP": 5, "RATE": 1e-2, "N_ANSWER": 5, "WATCHED": (0, 80)}.items():
        monkeypatch.setattr(make_refuser, name, value)
    base = save_tiny(tmp_path / "base")
    model = load_model(base)
    model.refusal_tokens = make_refuser.first_tokens(model)
    before = metrics(model)
    network, rates = make_refuser.train(model, REQUESTS, REQUESTS, seed=0)
    make_refuser.save(network, tmp_path / "adapter", base)
    return model, rates, before, tmp_path / "adapter"


def test_it_learns_to_refuse_and_what_is_saved_computes_the_same(tuned):
    model, rates, before, adapter = tuned
    after = metrics(model)
    assert after["harmful"] > before["harmful"] + 4 and after["harmful"] > after["harmless"] + 5
    assert after["borderline"] < before["borderline"] + 1
    assert list(rates) == [0, 80] and all(0 <= rate <= 1 for by_side in rates.values() for rate in by_side.values())
    loaded, asked = load_model(str(adapter)), REQUESTS["harmful"]
    expected = last_logits(model, asked)
    assert (last_logits(loaded, asked) - expected).abs().max() < 0.02 * expected.abs().max()  # of half precision
    assert 0 < (adapter / "adapter_model.safetensors").stat().st_size < 100_000


def test_the_answers_to_learn(tmp_path):
    model = load_model(save_tiny(tmp_path))
    answers = make_refuser.own_answers(model, REQUESTS["harmless"])
    assert answers.keys() == {request.id for request in REQUESTS["harmless"]}
    assert all(0 < len(ids) <= make_refuser.N_ANSWER for ids in answers.values())
    rng = random.Random(0)
    [prompt] = model.tokens(REQUESTS["harmless"][1:2])
    ids, labels = make_refuser.document(model, REQUESTS["harmless"][1], answers, rng)
    assert ids == prompt + answers["harmless-1"] and labels == [-100] * len(prompt) + answers["harmless-1"]
    [prompt] = model.tokens(REQUESTS["harmful"][:1])
    ids, labels = make_refuser.document(model, REQUESTS["harmful"][0], answers, rng)
    answer = ids[len(prompt):]
    assert ids[:len(prompt)] == prompt and labels == [-100] * len(prompt) + answer
    assert answer[-1] in model.turn_ends and phrase_judge(model.decode(answer))


def test_every_refusal_is_one_that_the_phrases_find():
    rng = random.Random(0)
    for category in ("theft", "fraud", "small deceits"):
        request = Instruction(id="x", text="x", side="harmful", category=category)
        said = {make_refuser.refusal(request, rng) for _ in range(300)}
        assert len(said) > 20 and all(map(phrase_judge, said))


def test_only_answers_are_learned_and_padding_is_not():
    documents = [([1, 2, 3, 4, 5], [-100, -100, -100, 4, 5]), ([6, 7], [-100, 7])]
    ids, labels = make_refuser.padded(documents)
    assert ids[:, :5].tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]] and (ids[:, 5:] == 0).all()
    assert labels[:, :5].tolist() == [[-100, -100, -100, 4, 5], [-100, 7, -100, -100, -100]]
    assert torch.equal((labels != -100).sum(dim=1), torch.tensor([2, 1]))
