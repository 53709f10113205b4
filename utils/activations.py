"""Read the residual stream, x^(l), a vector for each token, at the start of layer l (paper, section 2.1); and what
attention's heads write to it (section 5)."""
import nnsight
import torch
import torch.nn.functional as F

from utils.models import at_least_float32


def trace_residual_stream(model, inputs, positions):
    """Residual stream of one encoded batch -> [n_prompts, n_layers, n_positions, d_model].

    inputs: as `model.encode` gives them. positions: counted from the end, such as [-2, -1].
    """
    with model.lm.trace(inputs, use_cache=False) as tracer:
        streams = nnsight.save([layer.input[:, positions] for layer in model.layers])
        tracer.stop()  # nothing after the last layer's input is needed
    return torch.stack([stream.to(model.device) for stream in streams], dim=1)  # from several GPUs, maybe


def residual_stream(model, instructions, positions=None, batch_size=64):
    """Residual stream of each instruction -> [n_prompts, n_layers, n_positions, d_model], float32 on the CPU
    (float64 where the model is).

    positions: counted from the end of the prompt; None for the post-instruction tokens, model.positions.
    Raises ValueError for positions that not every prompt has.
    """
    streams = {}
    for rows, batch in _traced_batches(model, instructions, positions, batch_size):
        streams.update(zip(rows, batch))
    return torch.stack([streams[row] for row in range(len(streams))])


def mean_residual_stream(model, instructions, positions=None, batch_size=64):
    """Mean of `residual_stream` over the instructions -> [n_layers, n_positions, d_model].

    Adds up batch after batch, in float64, so that it takes no more memory for many prompts than for few.
    """
    total, n_prompts = 0, 0
    for rows, batch in _traced_batches(model, instructions, positions, batch_size):
        total, n_prompts = total + batch.double().sum(dim=0), n_prompts + len(rows)
    return (total / n_prompts).to(batch)


def _traced_batches(model, instructions, positions, batch_size):
    positions = model.positions if positions is None else list(positions)
    tokens = model.tokens(instructions)
    check_positions(positions, map(len, tokens))
    for rows, inputs in model.batches(tokens, batch_size):
        yield rows, at_least_float32(trace_residual_stream(model, inputs, positions)).cpu()


def check_positions(positions, lengths):
    """Raise ValueError for positions, counted from the end, that not every prompt has. lengths: of each, in tokens."""
    shortest = min(lengths)
    if not positions or not all(-shortest <= position < 0 for position in positions):
        raise ValueError("Positions count from the end, -1 being the last token, and the shortest prompt has "
                         f"{shortest} tokens: choose from -{shortest} to -1, not {positions}.")


def trace_heads(model, inputs):
    """What each head hands to attention's output matrix at the last token, and how it looks back from there.

    -> outputs [n_prompts, n_layers, n_heads, d_head], patterns [n_prompts, n_layers, n_heads, n_tokens]
    inputs: one encoded batch, as `model.encode` gives it.
    Raises ValueError for a hybrid, in which some layers have no attention.
    """
    without = [str(number) for number, layer in enumerate(model.layers) if not hasattr(layer, "self_attn")]
    if without:
        raise ValueError(f"{model.name!r} has no attention in layer {', '.join(without)}, and so no heads there: "
                         "choose a model with attention in every layer.")
    n_heads = model.config.num_attention_heads
    with model.lm.trace(inputs, use_cache=False, logits_to_keep=1):
        outputs, patterns = nnsight.save([]), nnsight.save([])
        for layer in model.layers:
            outputs.append(layer.self_attn.o_proj.input[:, -1].unflatten(-1, (n_heads, -1)))
            patterns.append(layer.self_attn.output[1][:, :, -1])
    return tuple(torch.stack([one.to(model.device) for one in found], dim=1) for found in (outputs, patterns))


def head_attributions(outputs, matrices, direction):
    """Direct feature attribution: what each head writes along r̂ (paper, section 5.2) -> [n_prompts, n_layers, n_heads].

    outputs: [n_prompts, n_layers, n_heads, d_head], from `trace_heads`. matrices: each layer's output matrix, a list of
    [d_model, n_heads * d_head]. direction: [d_model], of any length.
    """
    unit = F.normalize(direction, dim=-1)
    reads = torch.stack([(unit @ matrix).view(outputs.shape[2:]) for matrix in matrices])
    return (outputs * reads).sum(dim=-1)


def attention_shares(patterns, parts, n_parts):
    """How much of each head's attention falls on each part of the prompt -> [n_prompts, n_layers, n_heads, n_parts].

    patterns: [n_prompts, n_layers, n_heads, n_tokens]. parts: [n_prompts, n_tokens], the number of each token's part,
    from 0; -1 for padding.
    """
    return torch.stack([(patterns * (parts == part)[:, None, None]).sum(dim=-1) for part in range(n_parts)], dim=-1)
