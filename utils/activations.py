"""Read the residual stream: x^(l), a vector for each token, at the start of layer l (paper, section 2.1)."""
import nnsight
import torch


def trace_residual_stream(model, inputs, positions):
    """Residual stream of one encoded batch -> [n_prompts, n_layers, n_positions, d_model].

    inputs: as `model.encode` gives them. positions: counted from the end, such as [-2, -1].
    """
    with model.lm.trace(inputs, use_cache=False) as tracer:
        streams = nnsight.save([layer.input[:, positions] for layer in model.layers])
        tracer.stop()  # nothing after the last layer's input is needed
    return torch.stack(streams, dim=1)


def residual_stream(model, instructions, positions=None, batch_size=64):
    """Residual stream of each instruction -> [n_prompts, n_layers, n_positions, d_model], float32 on the CPU.

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
    return (total / n_prompts).float()


def _traced_batches(model, instructions, positions, batch_size):
    positions = model.positions if positions is None else list(positions)
    tokens = model.tokens(instructions)
    shortest = min(map(len, tokens))
    if not positions or not all(-shortest <= position < 0 for position in positions):
        raise ValueError("Positions count from the end, -1 being the last token, and the shortest prompt has "
                         f"{shortest} tokens: choose from -{shortest} to -1, not {positions}.")
    for rows, inputs in model.batches(tokens, batch_size):
        yield rows, trace_residual_stream(model, inputs, positions).float().cpu()
