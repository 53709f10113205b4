"""The residual stream is what plain transformers reports as hidden states, prompt by prompt."""
import pytest
import torch

from utils.activations import mean_residual_stream, residual_stream, trace_residual_stream

PROMPTS = ["bake a cake", "steal", "I can't help with a car or a cake", "Sorry, a car"]


def hidden_states(model, prompt, positions):
    """[n_layers, n_positions, d_model] of one prompt, without nnsight and without padding."""
    states = model.lm._module(**model.encode([prompt]), output_hidden_states=True).hidden_states
    return torch.stack(states[:-1])[:, 0, positions]  # the last one is what leaves the last layer


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_residual_stream_is_the_hidden_states(model, batch_size):
    streams = residual_stream(model, PROMPTS, batch_size=batch_size)
    assert streams.shape == (4, 4, 5, 32)
    for stream, prompt in zip(streams, PROMPTS):
        torch.testing.assert_close(stream, hidden_states(model, prompt, model.positions), rtol=1e-4, atol=1e-4)
    assert (streams[0] - streams[1])[1:].abs().max() > 0.1  # or the order of prompts would not be tested


def test_positions_may_be_chosen(llama):
    streams = residual_stream(llama, PROMPTS, positions=[-3, -7])
    for stream, prompt in zip(streams, PROMPTS):
        torch.testing.assert_close(stream, hidden_states(llama, prompt, [-3, -7]), rtol=1e-4, atol=1e-4)


def test_trace_of_one_batch(llama):
    stream = trace_residual_stream(llama, llama.encode(PROMPTS), [-1])
    torch.testing.assert_close(stream, residual_stream(llama, PROMPTS, [-1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_mean_is_the_mean(llama, batch_size):
    mean = mean_residual_stream(llama, PROMPTS, batch_size=batch_size)
    torch.testing.assert_close(mean, residual_stream(llama, PROMPTS).mean(dim=0), rtol=1e-5, atol=1e-5)


def test_results_are_float32_whatever_the_model(llama, tmp_path):
    from tiny_models import save_tiny

    from utils.models import load_model
    half = load_model(save_tiny(tmp_path), dtype=torch.bfloat16)
    stream = residual_stream(half, PROMPTS)
    assert stream.dtype == mean_residual_stream(half, PROMPTS).dtype == torch.float32
    torch.testing.assert_close(stream, residual_stream(llama, PROMPTS), rtol=0.1, atol=0.3)


@pytest.mark.parametrize("positions", [[0], [-1, 2], [-12], []])
@pytest.mark.parametrize("read", [residual_stream, mean_residual_stream])
def test_positions_that_a_prompt_does_not_have(llama, read, positions):
    with pytest.raises(ValueError, match=r"shortest prompt has 11 tokens: choose from -11 to -1, not \["):
        read(llama, PROMPTS, positions)
