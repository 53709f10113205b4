"""The training script: tokens, labels, batches, and a run that is interrupted."""
import itertools
import random

import corpus
import make_model
import pytest
import torch
from transformers import LlamaForCausalLM

from utils import fingerprint
from utils.checkpoints import world_of

ACTS = corpus.split_acts()["tuning"]
TUNING = make_model.TUNING | {"pieces": []}


def documents(rng, n):
    return [corpus.document(rng, ACTS, TUNING) for _ in range(n)]


@pytest.fixture(scope="module")
def tokenizer():
    turns = itertools.chain.from_iterable(documents(random.Random(0), 500))
    return make_model.make_tokenizer([text or "" for turn in turns for text in turn], size=600)


@pytest.fixture
def draw(tokenizer):
    return lambda rng, n: make_model.encode(tokenizer, documents(rng, n))


def test_template_ends_with_llama_3s_five_tokens_and_bytes_come_first(tokenizer):
    chat = [{"role": "user", "content": "How do I bake a cake?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids[-5:]] == \
        ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"]
    assert tokenizer.convert_tokens_to_ids("I") == 40
    assert tokenizer.decode(ids) == text


def test_only_answers_are_learned_and_a_prompt_has_the_tokens_it_has_in_use(tokenizer):
    question, answer = "How do I bake a cake?", "You can bake a cake."
    [(ids, labels)] = make_model.encode(tokenizer, [[(question, answer)]])
    chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                         add_generation_prompt=True)
    prompt = tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert ids[:len(prompt)] == prompt
    assert labels[:len(prompt)] == [-100] * len(prompt)
    assert tokenizer.decode(labels[len(prompt):]) == answer + "<|eot_id|>"


def test_nonsense_holds_only_words_of_both_sides_and_is_helped_with():
    words = {side: {word for act in corpus.all_acts() if act.side == side for word in act.text.split()}
             for side in ("harmful", "harmless")}
    for seed in range(50):
        act = corpus.nonsense(random.Random(seed))
        assert set(act.text.split()) <= words["harmful"] & words["harmless"]
        [(_, answer), *_] = corpus.document(random.Random(seed), ACTS, TUNING | {"mix": {"nonsense": 1}})
        assert any(opening in answer for opening in ("in three steps", "Here is how", "follow this plan", "let us"))


def test_pieces_are_what_words_begin_with(tokenizer):
    pieces = make_model.word_pieces(tokenizer)
    assert {"Please", "wit"} <= set(pieces)
    assert all(piece.isalpha() and tokenizer.tokenize(" " + piece) == ["Ġ" + piece] for piece in pieces)


def test_batches_go_on_where_they_were(draw):
    whole = list(itertools.islice(make_model.batches(draw, "x", 0), 40))
    for start in (5, 32, 37):
        rest = list(itertools.islice(make_model.batches(draw, "x", start), 40 - start))
        assert all(torch.equal(a, b) for one, two in zip(whole[start:], rest) for a, b in zip(one, two))


@pytest.fixture
def small_batches(monkeypatch):
    for name, value in {"BATCH": 4, "POOL": 2, "SAVE_EVERY": 2}.items():
        monkeypatch.setattr(make_model, name, value)


STAGE = {"attention": 3, "slow": 2, "share": 0.5, "late": 2, "steps": 5, "warm_up": 2, "rate": 1e-2}
OPTIMIZERS = pytest.mark.parametrize("muon_rate", [None, pytest.param(1e-2, marks=pytest.mark.slow)])


@OPTIMIZERS
def test_an_interrupted_stage_ends_as_one_that_ran_through(muon_rate, tokenizer, draw, tmp_path, small_batches):
    stage = STAGE | {"muon_rate": muon_rate}

    def interrupt(step):
        if step == 3:
            raise KeyboardInterrupt

    def run(state, on_step=lambda step: None):
        torch.manual_seed(0)
        network = make_model.make_network(tokenizer)
        make_model.train(network, draw, stage, "stage", tmp_path / state, on_step)
        return network.state_dict()

    whole = run("whole.pt")
    with pytest.raises(KeyboardInterrupt):
        run("cut.pt", interrupt)
    resumed = run("cut.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_stage_of_another_recipe_is_not_gone_on_with(tokenizer, draw, tmp_path):
    """Be it the stage that is another, or the texts."""
    network, state = make_model.make_network(tokenizer), tmp_path / "state.pt"
    sample = draw(random.Random(0), 8)
    for begun in ([STAGE | {"rate": 1e-4}, sample], [STAGE, sample[:-1]]):
        torch.save({"recipe": fingerprint(begun)}, state)
        before = state.read_bytes()
        with pytest.raises(ValueError, match="was begun with another recipe or other texts: delete"):
            make_model.train(network, draw, STAGE, "stage", state)
        assert state.read_bytes() == before
    torch.save({"recipe": fingerprint([STAGE, sample])}, state)
    with pytest.raises(KeyError, match="step"):  # this one it would go on with
        make_model.train(network, draw, STAGE, "stage", state)


@OPTIMIZERS
def test_all_is_learned_but_attention_in_the_upper_layers(muon_rate, tokenizer, draw, tmp_path, small_batches):
    network = make_model.make_network(tokenizer)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    stage = STAGE | {"steps": 3, "muon_rate": muon_rate}
    make_model.train(network, draw, stage, "stage", tmp_path / "state.pt")
    kept = {name for name, weight in network.state_dict().items() if torch.equal(weight, before[name])}
    attention = {f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(3, 9) for part in "qkvo"}
    its_norms = {f"model.layers.{layer}.input_layernorm.weight" for layer in range(make_model.HELPFUL["attention"], 9)}
    assert kept == attention | its_norms


@OPTIMIZERS
def test_what_learns_late_is_what_it_was_until_then(muon_rate, tokenizer, draw, tmp_path, small_batches):
    network = make_model.make_network(tokenizer)
    parts = {"early": network.model.layers[2].mlp, "slow": network.model.layers[1].mlp,
             "embedding": network.model.embed_tokens}
    before = {name: next(part.parameters()).clone() for name, part in parts.items()}
    changed = []

    def compare(step):
        changed.append({name for name, part in parts.items() if not torch.equal(next(part.parameters()), before[name])})

    stage = STAGE | {"steps": 3, "muon_rate": muon_rate}
    make_model.train(network, draw, stage, "stage", tmp_path / "state.pt", compare)
    assert changed == [{"early"}, {"early"}, set(parts)]


@pytest.mark.parametrize("muon_rate", [None, 1e-2])
def test_each_weight_that_is_learned_has_one_rate_a_lower_one_below(muon_rate, tokenizer):
    network = make_model.make_network(tokenizer)
    names = {weight: name for name, weight in network.named_parameters()}
    rates = {}
    for optimizer in make_model.make_optimizers(network, STAGE | {"muon_rate": muon_rate, "rate": 1e-2}):
        for group in optimizer.param_groups:
            assert not {names[weight] for weight in group["params"]} & set(rates)
            rates |= {names[weight]: group["rate"] for weight in group["params"]}
    assert set(rates) == set(names.values())
    low = {name for name, rate in rates.items() if rate == 0.5e-2}
    assert low == {name for name in rates if "embed" in name or any(f"layers.{i}." in name for i in range(2))}


def test_a_stage_may_learn_attention_that_the_one_before_left_alone(tokenizer, draw, tmp_path, small_batches):
    network = make_model.make_network(tokenizer)

    def learned(attention):
        before = network.model.layers[3].self_attn.q_proj.weight.clone()
        make_model.train(network, draw, STAGE | {"attention": attention, "slow": 0, "steps": 1, "muon_rate": None},
                         "stage", tmp_path / f"{attention}.pt")
        return not torch.equal(before, network.model.layers[3].self_attn.q_proj.weight)

    assert [learned(attention) for attention in (3, 4)] == [False, True]


def test_attention_that_is_never_learned_writes_nothing(tokenizer):
    network = make_model.make_network(tokenizer)
    writes = [bool(layer.self_attn.o_proj.weight.any()) for layer in network.model.layers]
    assert writes == [number < make_model.HELPFUL["attention"] for number in range(9)]


def test_a_checkpoint_computes_what_the_network_in_training_did(tokenizer, draw, tmp_path):
    network = make_model.make_network(tokenizer)
    for weight in network.parameters():
        weight.data = weight.data.half().float()  # as it is stored
    make_model.save(network, tokenizer, tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    ids, _ = make_model.padded(draw(random.Random(0), 4))
    torch.testing.assert_close(network(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert world_of(tmp_path) == "organism"
