"""What differs from family to family: each one's scores and selection equal plain hooks; templates, tokens, windows."""
import pytest
import torch
from plain_hooks import plain_logits, plain_metric, plain_scores, plain_selection, plain_streams
from tiny_models import save_tiny

from utils.directions import find_direction, lowest_bypass, select_direction
from utils.interventions import Ablation, Addition, added_bias, last_logits, orthogonalized
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
    direction, scores = find_direction(model, PROMPTS, PROMPTS, PROMPTS, PROMPTS, strict=False)

    means = [plain_streams(model, side, model.positions).mean(dim=0) for side in (harmful, harmless)]
    candidates = means[0] - means[1]
    expected = plain_scores(model, candidates, harmful, harmless)
    found = torch.stack([scores.bypass, scores.induce, scores.kl])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert (expected[:, 1:] - expected[:, :1]).abs().amax(dim=(1, 2)).min() > 0.05  # some candidates change much

    place = direction.layer, model.positions.index(direction.position)
    assert place == (plain_selection(expected, max_kl=0.1, min_induce=0.0) or lowest_bypass(scores))
    torch.testing.assert_close(direction.vector, candidates[place], rtol=0, atol=1e-5)
    for max_kl, min_induce in [(0.6, 0.3), (0.9, 0.5), (0.8, 0.7)]:  # quantiles, as few pass the paper's filters
        filters = ((scores.kl.quantile(max_kl) + 1e-4).item(), (scores.induce.quantile(min_induce) + 1e-4).item())
        if selected := plain_selection(expected, *filters):
            assert select_direction(scores, *filters) == selected
    assert selected


# sliding windows

@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text"])
def test_prompts_are_longer_than_the_window(load_tiny, tmp_path, architecture):
    """Or the tests of all architectures would not show what a window does."""
    model, wide = load_tiny(architecture), load_model(save_tiny(tmp_path, architecture, sliding_window=256))
    assert min(map(len, model.tokens(PROMPTS))) > model.config.sliding_window
    assert (last_logits(model, PROMPTS) - last_logits(wide, PROMPTS)).abs().amax(dim=1).min() > 0.1


# experts, and families that are not known

def test_where_experts_write_interventions_equal_hooks_and_edits_are_refused(tmp_path):
    model = load_model(save_tiny(tmp_path, "qwen3_moe", head_dim=8, num_experts=4, num_experts_per_tok=2,
                                 moe_intermediate_size=16, decoder_sparse_step=1))
    r = torch.randn(32, generator=torch.Generator().manual_seed(0))
    rows = r.expand(len(PROMPTS), 32)
    for change, hooks in [(Ablation(r), {"ablate": rows}), (Addition(r, 2), {"add": (2, rows)})]:
        torch.testing.assert_close(last_logits(model, PROMPTS, change), plain_logits(model, PROMPTS, **hooks),
                                   rtol=0, atol=1e-5)
    assert not model.editable
    for edit in (orthogonalized(model, r), added_bias(model, r, 2)):
        with pytest.raises(ValueError, match="one matrix in each attention and MLP.*: give Ablation or Addition"):
            edit.__enter__()


@pytest.mark.parametrize("architecture, part", [
    ("gpt2", "lacks model.embed_tokens"), ("falcon_h1", "lacks model.norm"), ("glm4", "has post_mlp_layernorm")])
def test_a_family_with_other_parts(tmp_path, architecture, part):
    """GLM 4 has the names, but norms behind attention and MLP that the course would overlook."""
    with pytest.raises(ValueError, match=f"which, unlike Llama, {part}: choose a model of another family"):
        load_model(save_tiny(tmp_path, architecture))


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
def test_templates(tmp_path, capsys, template, before, after, trims):
    model = load_model(save_tiny(tmp_path, "qwen3", template))
    assert capsys.readouterr().out.endswith("; thinking is off\n" if template == THINKS else " on cpu\n")
    assert model.render("bake a cake") == f"{before}bake a cake{after}"
    assert "".join(model.post_instruction) == after
    assert model.positions == list(range(-len(model.post_instruction), 0))
    assert [model.tokenizer.decode([token]) for token in model.refusal_tokens] == ["I", "As", "Sorry"]
    assert (model.tokens([" bake a cake\n"]) == model.tokens(["bake a cake"])) == trims
    prompts = [" bake a cake\n", *PROMPTS]
    torch.testing.assert_close(last_logits(model, prompts), plain_logits(model, prompts), rtol=0, atol=1e-5)
