"""The residual stream is what enters each layer of the plain transformers model, prompt by prompt."""
import pytest
import torch
from exact import assert_same
from plain_hooks import plain_streams
from tiny_models import save_tiny

from utils.activations import (
    attention_shares,
    head_attributions,
    mean_residual_stream,
    residual_stream,
    trace_heads,
    trace_residual_stream,
)
from utils.interventions import last_logits
from utils.models import load_model

PROMPTS = ["bake a cake", "steal", "I can't help with a car or a cake", "Sorry, a car"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_residual_stream_is_what_enters_the_layers(model, batch_size):
    streams = residual_stream(model, PROMPTS, batch_size=batch_size)
    assert streams.shape == (4, 4, 5, 32)
    assert_same(streams, plain_streams(model, PROMPTS, model.positions))
    assert (streams[0] - streams[1])[1:].abs().max() > 0.1  # or the order of prompts would not be tested


def test_positions_may_be_chosen(llama):
    streams = residual_stream(llama, PROMPTS, positions=[-3, -7])
    assert_same(streams, plain_streams(llama, PROMPTS, [-3, -7]))


def test_trace_of_one_batch(llama):
    stream = trace_residual_stream(llama, llama.encode(PROMPTS), [-1])
    assert_same(stream, residual_stream(llama, PROMPTS, [-1]))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_mean_is_the_mean(llama, batch_size):
    mean = mean_residual_stream(llama, PROMPTS, batch_size=batch_size)
    assert_same(mean, residual_stream(llama, PROMPTS).mean(dim=0))


@pytest.mark.parametrize("dtype, read_in, rounding", [
    (torch.bfloat16, torch.float32, 0.3), (torch.float32, torch.float32, 1e-5), (torch.float64, torch.float64, 1e-10)])
def test_what_is_read_is_float32_or_more(tmp_path, dtype, read_in, rounding):
    model = load_model(save_tiny(tmp_path), dtype=dtype)
    streams, logits = residual_stream(model, PROMPTS[:1]), last_logits(model, PROMPTS[:1])
    assert {streams.dtype, mean_residual_stream(model, PROMPTS[:1]).dtype, logits.dtype} == {read_in}
    expected = plain_streams(model, PROMPTS[:1], model.positions)  # in float64
    assert (streams - expected).abs().max() < rounding * expected.abs().max()


@pytest.mark.parametrize("positions", [[0], [-1, 2], [-12], []])
@pytest.mark.parametrize("read", [residual_stream, mean_residual_stream])
def test_positions_that_a_prompt_does_not_have(llama, read, positions):
    with pytest.raises(ValueError, match=r"shortest prompt has 11 tokens: choose from -11 to -1, not \["):
        read(llama, PROMPTS, positions)


def test_heads_together_write_what_attention_writes(attentive):
    model = attentive
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0)).double()
    inputs = model.encode(PROMPTS)
    outputs, patterns = trace_heads(model, inputs)
    layers = [layer.self_attn for layer in model.layers]
    attributions = head_attributions(outputs, [layer.o_proj._module.weight for layer in layers], direction)
    assert attributions.shape == (4, 4, 4)
    written = {}
    with model.lm.trace(inputs, use_cache=False):
        for number, layer in enumerate(layers):
            written[number] = layer.output[0][:, -1].save()
    for number, layer in enumerate(layers):
        bias = layer.o_proj._module.bias
        expected = (written[number] - (0 if bias is None else bias)) @ (direction / direction.norm())
        assert_same(attributions[:, number].sum(dim=-1), expected)
    assert patterns.shape == (4, 4, 4, inputs["input_ids"].shape[1])
    if model.config.model_type == "gpt_oss":  # a part of its attention falls on nothing
        assert (patterns.sum(dim=-1) < 1).all()
    else:
        assert_same(patterns.sum(dim=-1), torch.ones(4, 4, 4).double())
    assert patterns[inputs["attention_mask"][:, None, None].expand_as(patterns) == 0].abs().max() == 0


def test_shares_of_attention_add_up_and_go_where_the_attention_is():
    parts = torch.tensor([[-1, 0, 1, 1, 2]])
    pattern = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]).expand(1, 2, 3, 5)
    expected = torch.tensor([0.1, 0.5, 0.4]).expand(1, 2, 3, 3)
    torch.testing.assert_close(attention_shares(pattern, parts, 3), expected)
