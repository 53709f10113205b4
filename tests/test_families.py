"""What differs from family to family: each one's scores and selection equal plain hooks; templates, tokens, windows."""
import pytest
import torch
import torch.nn.functional as F
from exact import assert_same
from plain_hooks import plain_logits, plain_metric, plain_scores, plain_selection, plain_streams
from tiny_models import ARCHITECTURES, EXPERTS, save_tiny
from transformers import AutoModelForCausalLM

from utils.activations import trace_heads
from utils.directions import find_direction, lowest_bypass, select_direction
from utils.interventions import Ablation, ablate, add, added_bias, last_logits, orthogonalize, orthogonalized
from utils.models import load_model

PROMPTS = ["bake a cake", "steal", "I can't help with a car or a cake", "Sorry, a car", "a guide", "steal a car",
           "how to do it", "Sure"]


def halves(model):
    """Refusal tokens by which the random model refuses some of the prompts -> these, and which it refuses, and answers.

    A random half of the vocabulary: by it, every prompt is refused with about even odds.
    """
    logits = plain_logits(model, PROMPTS)
    for seed in range(100):
        tokens = torch.randperm(logits.shape[-1], generator=torch.Generator().manual_seed(seed))[::2].tolist()
        refused = plain_metric(logits, tokens) > 0
        if 3 <= refused.sum() <= 5:
            return tokens, *([prompt for prompt, is_so in zip(PROMPTS, refused) if is_so == side]
                             for side in (True, False))
    raise AssertionError("no such tokens")


def test_scores_and_selection_equal_hooks(model, monkeypatch):
    tokens, harmful, harmless = halves(model)
    monkeypatch.setattr(model, "refusal_tokens", tokens)
    both = {"harmful": PROMPTS, "harmless": PROMPTS}
    direction, scores = find_direction(model, both, both, screen=None, strict=False)

    means = [plain_streams(model, side, model.positions).mean(dim=0) for side in (harmful, harmless)]
    candidates = means[0] - means[1]
    expected = plain_scores(model, candidates, harmful, harmless)
    assert_same(torch.stack([scores.bypass, scores.induce, scores.kl]), expected)
    assert (expected[:, 1:] - expected[:, :1]).abs().amax(dim=(1, 2)).min() > 0.05  # some candidates change much

    place = direction.layer, model.positions.index(direction.position)
    assert place == (plain_selection(expected, max_kl=0.1, min_induce=0.0) or lowest_bypass(scores))
    assert_same(direction.vector, candidates[place])
    for max_kl, min_induce in [(0.6, 0.3), (0.9, 0.5), (0.8, 0.7)]:  # quantiles, as few pass the paper's filters
        filters = ((scores.kl.quantile(max_kl) + 1e-4).item(), (scores.induce.quantile(min_induce) + 1e-4).item())
        if selected := plain_selection(expected, *filters):
            assert select_direction(scores, *filters) == selected
    assert selected


# sliding windows

@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text"])
def test_prompts_are_longer_than_the_window(load_tiny, exact, tmp_path, architecture):
    """Or the tests of all architectures would not show what a window does."""
    model = load_tiny(architecture)
    wide = load_model(save_tiny(tmp_path, architecture, sliding_window=256), torch.float64)
    assert min(map(len, model.tokens(PROMPTS))) > model.config.sliding_window
    assert (last_logits(model, PROMPTS) - last_logits(wide, PROMPTS)).abs().amax(dim=1).min() > 0.1


# families that are not known, and those that write otherwise than the course reads

@pytest.mark.parametrize("architecture, part", [
    ("gpt2", "model.embed_tokens"), ("falcon_h1", "model.norm"), ("opt", "model.embed_tokens")])
def test_a_family_with_other_parts(tmp_path, architecture, part):
    with pytest.raises(ValueError, match=f"which, unlike Llama, lacks {part}: choose a model of another family"):
        load_model(save_tiny(tmp_path, architecture))


@pytest.fixture
def load_altered(tmp_path, monkeypatch):
    """Load a tiny model, its transformers module altered as soon as it has been read."""
    def load_altered(architecture, alter, dtype=None, **more):
        def from_pretrained(*args, **options):
            module, report = read(*args, **options)
            alter(module)
            return module, report
        read = AutoModelForCausalLM.from_pretrained
        with monkeypatch.context() as patch:
            patch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
            return load_model(save_tiny(tmp_path, architecture, **more), dtype)
    return load_altered


GEMMA4 = {"head_dim": 8, "global_head_dim": 8, "vocab_size_per_layer_input": 330}


def half_of_each_layer(module):
    for layer in module.model.layers:
        layer.layer_scalar.fill_(0.5)


def on_layer_2(change):
    """An alteration: what layer 2 puts out becomes change(its input, its output)."""
    def alter(module):
        module.model.layers[2].register_forward_hook(
            lambda layer, args, kwargs, out: change(args[0] if args else kwargs["hidden_states"], out),
            with_kwargs=True)
    return alter


def third_writer(module):
    """As where a layer has cross-attention too, or an embedding of its own."""
    third = torch.randn(32, 32)
    on_layer_2(lambda x, out: out + x @ third.to(x))(module)


def half_of_the_mlp(module):
    """A parallel block that multiplies what its MLP has written."""
    layer = module.model.layers[2]

    def forward(hidden_states, **options):
        x = layer.input_layernorm(hidden_states)
        return hidden_states + layer.self_attn(x, **options)[0] + 0.5 * layer.mlp(x)
    layer.forward = forward


def mlp_first(module):
    layer = module.model.layers[2]

    def forward(x, **options):
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x + layer.self_attn(layer.input_layernorm(x), **options)[0]
    layer.forward = forward


def nothing(module):
    pass


OTHERWISE = {
    "a scalar of each layer": ("gemma4_text", half_of_each_layer, {**GEMMA4, "hidden_size_per_layer_input": 0}, 0),
    "embeddings of each layer": ("gemma4_text", nothing, {**GEMMA4, "hidden_size_per_layer_input": 8}, 0),
    "the stream is normalised": ("minimax", nothing, {"head_dim": 8}, 0),
    "norms of another name": ("glm4", nothing, {"head_dim": 8}, 0),
    "a norm on the embeddings too": ("nanochat", nothing, {}, 0),
    "a gate behind the sum": ("llama", on_layer_2(lambda x, out: 0.9 * out), {}, 2),
    "a change between two layers": ("olmo2", on_layer_2(lambda x, out: out.roll(1, dims=1)), {}, 2),
    "a third writer": ("qwen3", third_writer, {}, 2),
    "half of the MLP": ("cohere2", half_of_the_mlp, {}, 2),
    "the MLP first": ("llama", mlp_first, {}, 0),
    "two multipliers": ("granite", on_layer_2(lambda x, out: x + 0.5 * (out - x)), {"residual_multiplier": 0.5}, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture, alter, more, layer", OTHERWISE.values(), ids=OTHERWISE)
def test_a_family_that_adds_otherwise_is_refused(load_altered, architecture, alter, more, layer, dtype):
    with pytest.raises(ValueError, match=f"is a .*, whose layer {layer} does not just add what attention and MLP write"
                                         ", .*: choose a model of another family.$"):
        load_altered(architecture, alter, dtype, **more)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_right_families_are_loaded_in_any_precision(tmp_path, architecture, dtype):
    assert load_model(save_tiny(tmp_path, architecture), dtype).editable == (architecture not in EXPERTS)


def test_a_scalar_of_one_does_no_harm(load_altered):
    model = load_altered("gemma4_text", nothing, torch.float32, **GEMMA4, hidden_size_per_layer_input=0)
    assert model.editable and model.post_norms


# weights that are no plain matrices

class Int8(torch.nn.Linear):
    """Weights in 8 bits, with a scale for each row, as bitsandbytes keeps them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x) * self.scale)


class Packed(torch.nn.Linear):
    """Weights in 4 bits, two in a byte, all in one column."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.abs().max() / 7
        four = ((linear.weight / self.scale).round() + 8).to(torch.uint8).view(-1, 2)
        self.weight = torch.nn.Parameter((16 * four[:, :1] + four[:, 1:]), requires_grad=False)

    def forward(self, x):
        four = torch.cat([self.weight // 16, self.weight % 16], dim=1).to(x).view(self.out_features, self.in_features)
        return F.linear(x, (four - 8) * self.scale)


class Float8(torch.nn.Linear):
    """Weights in 8 bits that are floating-point numbers, with a scale."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.abs().max() / 400
        self.weight = torch.nn.Parameter((linear.weight / self.scale).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x) * self.scale)


class Adapted(torch.nn.Module):
    """A matrix with a low-rank one beside it. Its `.weight` is the matrix alone."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer, self.weight, self.bias = linear, linear.weight, None
        self.beside = torch.nn.Parameter(0.1 * torch.randn(32, linear.in_features), requires_grad=False)

    def forward(self, x):
        return self.base_layer(x) + F.linear(x, self.beside)


def with_matrices(kind, parts=("o_proj", "down_proj")):
    """An alteration: matrices of layer 1 are of another kind."""
    def alter(module):
        layer = module.model.layers[1]
        for name, parent in (("o_proj", layer.self_attn), ("down_proj", layer.mlp)):
            if name in parts:
                setattr(parent, name, kind(getattr(parent, name)))
    return alter


def behind(part, change):
    """An alteration: what a part of layer 1 computes is changed before it gives it on."""
    def alter(module):
        part_here = module.model.layers[1].get_submodule(part)
        forward = part_here.forward
        part_here.forward = lambda x: change(forward(x))
    return alter


def positions_beside_the_embedding(module):
    learned = torch.randn(256, 32)
    module.model.layers[0].register_forward_pre_hook(
        lambda layer, args: (args[0] + learned[:args[0].shape[1]].to(args[0]), *args[1:]))


NOT_PLAIN = {
    "8 bits": with_matrices(Int8), "8 bits, the MLP alone": with_matrices(Int8, ["down_proj"]),
    "4 bits, packed": with_matrices(Packed), "8 bits, floating": with_matrices(Float8),
    "an adapter": with_matrices(Adapted, ["o_proj"]), "a bias behind the matrix": behind("mlp", lambda out: out + 0.3),
    "a scale in the matrix": behind("mlp.down_proj", lambda out: 1.5 * out),
    "positions beside the embedding": positions_beside_the_embedding,
}


@pytest.mark.parametrize("alter", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_weights_that_are_no_plain_matrices_are_not_edited(load_altered, alter):
    """The stream can be changed all the same."""
    model, r = load_altered("llama", alter, torch.float32), torch.randn(32, generator=torch.Generator().manual_seed(0))
    assert not model.editable
    for edit in (orthogonalized(model, r), added_bias(model, r, 2)):
        with pytest.raises(ValueError, match="one plain matrix in each attention and MLP.*: give Ablation or Addition"):
            edit.__enter__()
    with model.lm.trace(model.encode(PROMPTS)):
        Ablation(r).apply(model)
        last = model.layers[-1].output.save()
    assert (last @ r).abs().max() < 1e-4 and last.abs().max() > 0.1


def test_weights_that_are_quantized_later_are_not_edited(tmp_path):
    model = load_model(save_tiny(tmp_path, "llama"))
    with added_bias(model, torch.randn(32), 2):
        pass
    linear = model.layers[3].mlp.down_proj._module
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="one plain matrix in each attention and MLP"):
        added_bias(model, torch.randn(32), 2).__enter__()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("change", [ablate, add, orthogonalize])
def test_a_direction_is_not_rounded_to_nothing(change, dtype):
    x = torch.ones(1, 3, 32).to(dtype) if change is not orthogonalize else torch.ones(32, 3).to(dtype)
    with pytest.raises(TypeError, match=f"A direction cannot be told in {dtype}: change activations, or weights of 16"):
        change(x, torch.rand(32))


@pytest.mark.parametrize("architecture", EXPERTS)
def test_where_experts_write_edits_are_refused(load_tiny, exact, architecture):
    model, r = load_tiny(architecture), torch.randn(32, generator=torch.Generator().manual_seed(0))
    assert not model.editable
    for edit in (orthogonalized(model, r), added_bias(model, r, 2)):
        with pytest.raises(ValueError, match="one plain matrix in each attention and MLP.*: give Ablation or Addition"):
            edit.__enter__()


@pytest.mark.parametrize("architecture, layers", [("lfm2", "0, 2, 3"), ("qwen3_5_text", "0, 1, 2")])
def test_a_layer_without_attention_has_no_heads(load_tiny, exact, architecture, layers):
    model = load_tiny(architecture)
    with pytest.raises(ValueError, match=f"has no attention in layer {layers}, and so no heads there: choose a model"):
        trace_heads(model, model.encode(PROMPTS))


# templates

SYSTEM = ("{{ bos_token }}{% if messages[0]['role'] != 'system' %}system\nYou are helpful.<|eot_id|>{% endif %}"
          "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<|eot_id|>{% endfor %}"
          "{% if add_generation_prompt %}assistant\n{% endif %}")
NO_SYSTEM = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
             "{% for m in messages %}user\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
             "{% if add_generation_prompt %}model\n{% endif %}")
INST = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
THINKS = ("{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<|eot_id|>{% endfor %}"
          "{% if add_generation_prompt %}assistant\n"
          "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
          "{% endif %}")
TEMPLATES = {  # (template, what stands before the instruction, what comes after it, is it trimmed?)
    "a default system prompt": (SYSTEM, "<|begin_of_text|>system\nYou are helpful.<|eot_id|>user\n",
                                "<|eot_id|>assistant\n", False),
    "no system role, and trims": (NO_SYSTEM, "<|begin_of_text|>user\n", "<|eot_id|>model\n", True),
    "plain brackets": (INST, "<|begin_of_text|>[INST] ", " [/INST]", False),
    "thinking": (THINKS, "user\n", "<|eot_id|>assistant\n<think>\n\n</think>\n\n", False),
}


@pytest.mark.parametrize("template, before, after, trims", TEMPLATES.values(), ids=TEMPLATES)
def test_templates(exact, tmp_path, capsys, template, before, after, trims):
    model = load_model(save_tiny(tmp_path, "qwen3", template), torch.float64)
    assert capsys.readouterr().out.endswith("; thinking is off\n" if template == THINKS else " on cpu\n")
    assert model.render("bake a cake") == f"{before}bake a cake{after}"
    assert "".join(model.post_instruction) == after
    assert model.positions == list(range(-len(model.post_instruction), 0))
    assert [model.tokenizer.decode([token]) for token in model.refusal_tokens] == ["I", "As", "Sorry"]
    assert (model.tokens([" bake a cake\n"]) == model.tokens(["bake a cake"])) == trims
    prompts = [" bake a cake\n", *PROMPTS]
    assert_same(last_logits(model, prompts), plain_logits(model, prompts))
