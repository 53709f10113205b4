"""Interventions in nnsight traces equal the same ones written as plain PyTorch hooks: logits and generated tokens."""
from dataclasses import dataclass

import pytest
import torch
from exact import assert_same
from hypothesis import given
from hypothesis import strategies as st
from plain_hooks import Hooks, plain_logits, plain_model, plain_tokens

from utils.directions import Direction
from utils.evaluation import answer_losses
from utils.instructions import Instruction
from utils.interventions import (
    Ablation,
    Addition,
    ablate,
    add,
    added_bias,
    every_pair,
    generate,
    last_logits,
    orthogonalize,
    orthogonalized,
    residual_writers,
    set_projection,
    trace_generation,
)

PROMPTS = ["bake a cake", "steal", "I can't help with a car or a cake", "Sorry, a car"]  # of unequal lengths


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def tokens(model, prompts, intervention=None, n=6, **options):
    """The ids behind what `generate` decodes."""
    decode, model.decode = model.decode, lambda ids: ids.tolist()
    try:
        return generate(model, prompts, intervention, max_new_tokens=n, **options)
    finally:
        del model.decode
        assert model.decode == decode


ONE = {"one direction": lambda n: randn(32, seed=3), "one per row": lambda n: 3 * randn(n, 32, seed=4)}


@pytest.fixture(params=ONE)
def directions(request):
    """(what is given to `utils`, the same as one per prompt)"""
    given = ONE[request.param](len(PROMPTS))
    return given, given.expand(len(PROMPTS), 32)


@pytest.fixture(params=["ablation", "addition"])
def case(request, directions):
    """(intervention, the same for Hooks)"""
    given, rows = directions
    if request.param == "ablation":
        return Ablation(given), lambda some: {"ablate": rows[some]}
    return Addition(given, layer=2, coefficient=-1.5), lambda some: {"add": (2, -1.5 * rows[some])}


# equality with the hooks

EVERY = slice(None)


def test_logits_equal_hooks(model, case):
    intervention, hooks = case
    changed = last_logits(model, PROMPTS, intervention)
    assert_same(changed, plain_logits(model, PROMPTS, **hooks(EVERY)))
    assert (changed - last_logits(model, PROMPTS)).abs().amax(dim=1).min() > 0.1  # every row was changed


def test_logits_do_not_depend_on_batches_or_padding(model, case):
    intervention, hooks = case
    alone = torch.cat([plain_logits(model, [prompt], **hooks(slice(row, row + 1)))
                       for row, prompt in enumerate(PROMPTS)])
    for batch_size in (1, 3):
        changed = last_logits(model, PROMPTS, intervention, batch_size)
        assert_same(changed, alone)


def test_generated_tokens_equal_hooks(model, case):
    intervention, hooks = case
    changed = tokens(model, PROMPTS, intervention)
    assert changed == plain_tokens(model, PROMPTS, **hooks(EVERY))
    assert changed != plain_tokens(model, PROMPTS, **hooks(EVERY), prompt_only=True)
    assert changed != tokens(model, PROMPTS)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generated_tokens_do_not_depend_on_batches(model, case, batch_size):
    intervention, hooks = case
    alone = [plain_tokens(model, [prompt], **hooks(slice(row, row + 1)))[0] for row, prompt in enumerate(PROMPTS)]
    assert tokens(model, PROMPTS, intervention, batch_size=batch_size) == alone


def test_without_intervention_it_is_the_model_itself(model):
    assert_same(last_logits(model, PROMPTS), plain_logits(model, PROMPTS))
    assert tokens(model, PROMPTS) == plain_tokens(model, PROMPTS)


def test_the_model_is_left_as_it_was(llama):
    before = last_logits(llama, PROMPTS)
    generate(llama, PROMPTS, Ablation(randn(32)), max_new_tokens=2)
    last_logits(llama, PROMPTS, Addition(randn(32), 0))
    assert torch.equal(last_logits(llama, PROMPTS), before)


def test_an_ablated_direction_is_gone_from_the_stream(model):
    direction = randn(32)
    with model.lm.trace(model.encode(PROMPTS)):
        Ablation(direction).apply(model)
        last = model.layers[-1].output.save()
    assert (last @ direction).abs().max() < 1e-10
    assert last.abs().max() > 0.1


def test_each_answer_ends_at_its_own_end_token(llama, monkeypatch):
    intervention, hooks = Ablation(randn(32)), {"ablate": randn(32).expand(len(PROMPTS), 32)}
    endless = plain_tokens(llama, PROMPTS, **hooks)
    eos, pad = endless[0][2], llama.tokenizer.pad_token_id
    monkeypatch.setattr(llama.lm._module.generation_config, "eos_token_id", eos)
    expected = [ids[:ids.index(eos) + 1] if eos in ids else ids for ids in endless]
    assert len({len(ids) for ids in expected}) > 1  # some end, others go on
    assert [ids[:len(e)] for ids, e in zip(tokens(llama, PROMPTS, intervention), expected)] == expected
    assert {i for ids, e in zip(tokens(llama, PROMPTS, intervention), expected) for i in ids[len(e):]} == {pad}


def test_generate_gives_whole_answers_as_text(llama):
    answers = generate(llama, PROMPTS, max_new_tokens=5)
    assert answers == [llama.tokenizer.decode(ids, skip_special_tokens=True) for ids in plain_tokens(llama, PROMPTS, 5)]


# at some layers, at some positions

PLACES = {"layers": ([1, 3], None), "positions": (None, [-4, -1]), "both": (range(2), (-1, -2))}


@pytest.mark.parametrize("layers, positions", PLACES.values(), ids=PLACES)
def test_ablation_at_some_places_equals_hooks(model, layers, positions):
    """With positions, generated tokens stay as they are."""
    change, rows = Ablation(randn(32, seed=3), layers, positions), randn(32, seed=3).expand(len(PROMPTS), 32)
    hooks = {"ablate": rows, "layers": layers, "positions": positions}
    changed = last_logits(model, PROMPTS, change)
    assert_same(changed, plain_logits(model, PROMPTS, **hooks))
    for other in (None, Ablation(randn(32, seed=3))):
        assert (changed - last_logits(model, PROMPTS, other)).abs().amax(dim=1).min() > 1e-3
    assert tokens(model, PROMPTS, change) == plain_tokens(model, PROMPTS, **hooks)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_positions_of_each_prompt_with_its_own_direction(llama, batch_size):
    """Prompts are of unequal lengths, padded on the left."""
    rows = 3 * randn(len(PROMPTS), 32, seed=4)
    change, hooks = Ablation(rows, positions=[-6, -1]), {"positions": [-6, -1]}
    alone = [plain_logits(llama, [prompt], ablate=row[None], **hooks) for prompt, row in zip(PROMPTS, rows)]
    assert_same(last_logits(llama, PROMPTS, change, batch_size), torch.cat(alone))
    alone = [plain_tokens(llama, [prompt], ablate=row[None], **hooks)[0] for prompt, row in zip(PROMPTS, rows)]
    found = tokens(llama, PROMPTS, change, batch_size=batch_size)
    assert found == alone != tokens(llama, PROMPTS, Ablation(rows), batch_size=batch_size)


def test_positions_in_a_trace_of_ones_own(llama):
    inputs, change = llama.encode(PROMPTS), Ablation(randn(32), positions=[-1])
    with llama.lm.trace(inputs):
        change.apply(llama)
        logits = llama.lm.output.logits[:, -1].save()
    assert_same(logits, last_logits(llama, PROMPTS, change))
    for one in (change, OnceMore(change)):
        ids = trace_generation(llama, inputs, one, 6)
        assert ids[:, inputs["input_ids"].shape[1]:].tolist() == tokens(llama, PROMPTS, change)


def test_positions_count_from_the_prompts_end_where_an_answer_follows(llama):
    """Answers are of unequal lengths, in one batch with prompts of unequal lengths."""
    answered = [Instruction(id=text, text=text, answer=answer) for text, answer in
                zip(PROMPTS, ["Sure", "I can't", "Sure, here is a guide", "Sorry"])]
    found = answer_losses(llama, answered, Ablation(randn(32), positions=[-2, -1]))
    for instruction, losses in zip(answered, found):
        prompt = llama.tokens([instruction.text])[0]
        answer = llama.tokenizer(instruction.answer, add_special_tokens=False)["input_ids"]
        plain, _ = plain_model(llama.name)
        with Hooks(plain, ablate=randn(1, 32), positions=[len(prompt) - 2, len(prompt) - 1]):
            logits = plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
        assert_same(losses, torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))


# an intervention of one's own, and a Direction

class OnceMore:
    """An intervention of one's own, without a direction."""

    def __init__(self, change):
        self.change, self.times = change, 0

    def apply(self, model):
        self.times += 1
        self.change.apply(model)


@dataclass(frozen=True)
class Frozen:
    """One of one's own, with a direction, and a layer that counts from the end."""
    direction: torch.Tensor
    layer: int = -1

    def apply(self, model):
        Ablation(self.direction).apply(model)


class Odd(OnceMore):
    """What it calls its direction is none."""
    direction = "up"


READINGS = {
    "logits": lambda *args: last_logits(*args, batch_size=3),
    "tokens": lambda *args: tokens(*args, batch_size=3),
    "losses": lambda model, prompts, change: torch.cat(answer_losses(
        model, [Instruction(id=text, text=text, answer="Sure") for text in prompts], change, batch_size=3)),
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
@pytest.mark.parametrize("own, same", [
    (OnceMore(Addition(randn(32), 2)), Addition(randn(32), 2)), (Odd(Ablation(randn(32))), Ablation(randn(32))),
    (Frozen(randn(32)), Ablation(randn(32))), (Frozen(randn(4, 32)), Ablation(randn(4, 32)))],
    ids=["no direction", "none", "frozen", "one per row"])
def test_an_intervention_of_ones_own(llama, read, own, same):
    found, expected = read(llama, PROMPTS, own), read(llama, PROMPTS, same)
    assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected
    assert getattr(own, "times", 1) > 0  # it was not a copy that was applied


def test_a_direction_with_its_layer(llama):
    direction = Direction(randn(32), layer=2, position=-1)
    for change, same in [(Ablation(direction), Ablation(randn(32))), (Addition(direction), Addition(randn(32), 2)),
                         (Addition(direction, 1, -1.5), Addition(randn(32), 1, -1.5))]:
        assert torch.equal(last_logits(llama, PROMPTS, change), last_logits(llama, PROMPTS, same))
    for edit, same in [(orthogonalized(llama, direction), orthogonalized(llama, randn(32))),
                       (added_bias(llama, direction), added_bias(llama, randn(32), 2)),
                       (added_bias(llama, direction, 1), added_bias(llama, randn(32), 1))]:
        with edit:
            logits = last_logits(llama, PROMPTS)
        with same:
            assert torch.equal(last_logits(llama, PROMPTS), logits)


@pytest.mark.parametrize("none", [randn(32), Direction(randn(32), 1, -1), Ablation, "ablation", ablate])
@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_what_is_no_intervention(llama, read, none):
    with pytest.raises(TypeError, match=r"a method `.apply\(model\)`, such as Ablation\(direction\), and not a "
                                        f"{type(none).__name__}.$"):
        read(llama, PROMPTS, none)


# every direction with every prompt

def test_every_pair(llama):
    directions = randn(3, 32)
    prompts, rows = every_pair(PROMPTS, directions)
    together = last_logits(llama, prompts, Ablation(rows)).view(3, len(PROMPTS), -1)
    for direction, logits in zip(directions, together):
        assert_same(logits, last_logits(llama, PROMPTS, Ablation(direction)))


# edits of the weights

EDITS = {
    "orthogonalized": (lambda model: orthogonalized(model, randn(32)), {"ablate": randn(32).expand(len(PROMPTS), 32)}),
    "added bias": (lambda model: added_bias(model, randn(32), layer=2, coefficient=-1.5),
                   {"add": (2, -1.5 * randn(32).expand(len(PROMPTS), 32))}),
}


@pytest.mark.parametrize("edit, hooks", EDITS.values(), ids=EDITS)
def test_edited_weights_equal_hooks(editable, edit, hooks):
    model = editable
    expected, expected_tokens = plain_logits(model, PROMPTS, **hooks), plain_tokens(model, PROMPTS, **hooks)
    with edit(model):
        changed, changed_tokens = last_logits(model, PROMPTS), tokens(model, PROMPTS)
    assert_same(changed, expected)
    assert changed_tokens == expected_tokens
    assert (changed - last_logits(model, PROMPTS)).abs().amax(dim=1).min() > 0.1


@pytest.mark.parametrize("edit", [edit for edit, _ in EDITS.values()], ids=EDITS)
def test_edited_weights_are_put_back_bit_for_bit_whatever_happens(editable, edit):
    model = editable
    module = model.lm._module
    before, shared = {name: weight.clone() for name, weight in module.state_dict().items()}, len({*module.parameters()})
    hooks = [list(part._forward_hooks) for part in module.modules()]  # nnsight has hooks of its own in a used model
    with pytest.raises(KeyboardInterrupt), edit(model):
        raise KeyboardInterrupt
    after = module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert len({*module.parameters()}) == shared  # an unembedding that was the embedding is so again
    assert [list(part._forward_hooks) for part in module.modules()] == hooks


def test_all_that_writes_is_a_view_of_the_model(editable):
    model, writers = editable, residual_writers(editable)
    biases = {"gpt_neox": 2, "seed_oss": 1}.get(model.lm.config.model_type, 0)  # in each layer
    assert len(writers) == 1 + model.n_layers * (2 + biases)
    assert all(view.shape[0] == model.d_model for view in writers)
    assert {view.data_ptr() for view in writers} <= {weight.data_ptr() for weight in model.lm._module.parameters()}


def test_nothing_is_written_along_the_direction(editable):
    model = editable
    with orthogonalized(model, randn(32)):
        writers = residual_writers(model)
        edited = writers[:1] if model.post_norms else writers  # the others are followed by a norm, changed instead
        assert all((randn(32) @ view).abs().max() < 1e-10 for view in edited)


# the formulas

vectors = st.integers(0, 10**6).map(lambda seed: randn(5, seed=seed))
streams = st.integers(0, 10**6).map(lambda seed: randn(3, 4, 5, seed=seed))


@given(streams, vectors, st.floats(0.01, 100))
def test_ablate_leaves_nothing_along_the_direction_and_the_rest_alone(x, r, length):
    ablated = ablate(x, length * r)
    assert (ablated @ r).abs().max() < 1e-10
    across = x - (x @ r / (r @ r))[..., None] * r
    assert_same(ablated, across)
    assert_same(ablate(ablated, r), ablated)  # nothing is left to take
    assert_same(ablate(x, -r), ablated)


@given(st.integers(0, 10**6).map(lambda seed: randn(5, 7, seed=seed)), vectors, st.floats(0.01, 100))
def test_an_orthogonalized_matrix_writes_what_ablation_leaves(weight, r, length):
    x = randn(4, 7)
    edited = orthogonalize(weight, length * r)
    assert_same(x @ edited.T, ablate(x @ weight.T, r))
    assert_same(orthogonalize(weight[:, 0], r), edited[:, 0])  # a bias


@given(streams, st.integers(0, 10**6), st.floats(-3, 3))
def test_a_direction_per_row_is_each_row_alone(x, seed, coefficient):
    directions = randn(3, 5, seed=seed)
    for changed, change in [(ablate(x, directions), ablate),
                            (add(x, directions, coefficient), lambda x, r: add(x, r, coefficient))]:
        for row in range(3):
            assert_same(changed[row], change(x[row:row + 1], directions[row])[0])


@given(streams, vectors, st.floats(-3, 3))
def test_add_moves_every_token_by_the_vector(x, r, coefficient):
    moved = add(x, r, coefficient)
    assert_same(moved - x, (coefficient * r).expand_as(x))
    assert_same(add(moved, r, -coefficient), x)


def test_add_moves_by_the_whole_vector_by_default():
    assert torch.equal(add(torch.zeros(1, 2, 2), torch.tensor([3.0, 4.0])), torch.tensor([[[3.0, 4.0]] * 2]))


def test_arguments_are_not_changed_in_place():
    x, r = randn(3, 4, 5), randn(5)
    kept = x.clone(), r.clone()
    ablate(x, r), add(x, r)
    assert torch.equal(x, kept[0]) and torch.equal(r, kept[1])


def test_half_precision_streams_stay_so():
    assert ablate(randn(1, 2, 5).bfloat16(), randn(5)).dtype == torch.bfloat16
    assert add(randn(1, 2, 5).bfloat16(), randn(5)).dtype == torch.bfloat16


# what does not fit

@pytest.mark.parametrize("call, sentence", [
    (lambda m: Ablation([1.0, 2.0]), r"A direction is a tensor of floating-point numbers, .* or a Direction"),
    (lambda m: Ablation(randn(2, 3, 32)), "A direction is a tensor"),
    (lambda m: Ablation(torch.ones(32, dtype=torch.int8)), "A direction is a tensor of floating-point numbers"),
    (lambda m: Addition(torch.zeros(32), layer=1), "length zero .* choose another one"),
    (lambda m: Ablation(torch.stack([randn(32), torch.zeros(32)])), "length zero"),
    (lambda m: Ablation(torch.full((32,), torch.nan)), "not finite"),
    (lambda m: last_logits(m, PROMPTS, Ablation(randn(16))), "has 16 entries, but .* has d_model 32: find"),
    (lambda m: generate(m, PROMPTS, Ablation(randn(3, 32))), "3 directions for 4 prompts: give one for all"),
    (lambda m: last_logits(m, PROMPTS, Addition(randn(32), 4)), "no layer 4 in .*: choose from 0 to 3"),
    (lambda m: generate(m, PROMPTS, Addition(randn(32), -1)), "no layer -1"),
    (lambda m: orthogonalized(m, randn(4, 32)).__enter__(), "one direction, .* use Ablation"),
    (lambda m: orthogonalized(m, randn(16)).__enter__(), "has 16 entries"),
    (lambda m: orthogonalized(m, torch.zeros(32)).__enter__(), "length zero"),
    (lambda m: added_bias(m, randn(32), 0).__enter__(), "No MLP comes before layer 0"),
    (lambda m: added_bias(m, randn(32), 4).__enter__(), "no layer 4"),
    (lambda m: generate(m, []), "list of instructions is empty"),
    (lambda m: Addition(randn(32)), r"Say at which layer to add: Addition\(vector, layer=4\)"),
    (lambda m: Ablation(randn(32), layers=[]), "Without any layers nothing is erased: .* or leave layers out for all"),
    (lambda m: Ablation(randn(32), positions=[]), "Without any positions nothing is erased"),
    (lambda m: Ablation(randn(32), layers=2), r"Give layers as a list of whole numbers, such as \[4\], not 2"),
    (lambda m: Ablation(randn(32), positions=-1), r"Give positions as a list of whole numbers, such as \[-2, -1\]"),
    (lambda m: Ablation(randn(32), positions=[-1.0]), "Give positions as a list of whole numbers"),
    (lambda m: Ablation(randn(32), positions=[-2, 0]), "from the prompt's end, -1 being its last token: 0 is none"),
    (lambda m: Ablation(randn(32), positions=[3]), "3 is none"),
    (lambda m: last_logits(m, PROMPTS, Ablation(randn(32), layers=[1, 4])), "no layer 4 in .*: choose from 0 to 3"),
    (lambda m: generate(m, PROMPTS, Ablation(randn(32), layers=[-1])), "no layer -1 in .*: choose from 0 to 3"),
    (lambda m: generate(m, PROMPTS, Ablation(randn(32), positions=[-12])), "shortest prompt has 11 tokens: choose"),
    (lambda m: answer_losses(m, [Instruction(id="x", text="steal", answer="Sure, here is a guide")],
                             Ablation(randn(32), positions=[-12])), "shortest prompt has 11 tokens: choose from -11"),
])
def test_what_does_not_fit_is_said(llama, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(llama)


@given(st.integers(0, 10**6))
def test_a_projection_is_set_and_nothing_else_is_changed(seed):
    x, direction, levels = randn(2, 3, 8, seed=seed), 5 * randn(8, seed=seed + 1), 3 * randn(3, seed=seed + 2)
    unit, changed = direction / direction.norm(), set_projection(x, direction, levels)
    assert_same(changed @ unit, levels.expand(2, 3))
    assert_same(ablate(changed, direction), ablate(x, direction))
