"""Read the residual stream: x^(l), the vector of each token at the start of layer l (paper, section 2.1)."""
import nnsight
import torch


def trace_residual_stream(model, inputs, positions):
    """Residual stream of one encoded batch -> [n_prompts, n_layers, n_positions, d_model].

    inputs: what `model.encode` returns. positions: counted from the end, such as [-2, -1].
    """
    with model.lm.trace(inputs, use_cache=False) as tracer:
        streams = nnsight.save([layer.input[:, positions] for layer in model.layers])  # in the order of execution
        tracer.stop()  # nothing after the last layer's input is needed
    return torch.stack(streams, dim=1)


def residual_stream(model, instructions, positions=None, batch_size=64):
    """Residual stream of each instruction -> [n_prompts, n_layers, n_positions, d_model], float32, on the CPU.

    positions: negative, counted from the end of the prompt; None for the post-instruction tokens (model.positions).
    Raises ValueError for positions that are not in every prompt.
    """
    tokens = model.tokens(instructions)
    n_positions = len(positions or model.positions)
    streams = torch.empty(len(tokens), model.n_layers, n_positions, model.d_model)
    for rows, batch in _traced_batches(model, tokens, positions, batch_size):
        streams[rows] = batch
    return streams


def mean_residual_stream(model, instructions, positions=None, batch_size=64):
    """Mean over the instructions of `residual_stream` -> [n_layers, n_positions, d_model].

    Adds batch after batch, in float64, so that thousands of prompts take no more memory than one batch.
    """
    tokens = model.tokens(instructions)
    total = 0
    for _, batch in _traced_batches(model, tokens, positions, batch_size):
        total = total + batch.double().sum(dim=0)
    return (total / len(tokens)).float()


def _traced_batches(model, tokens, positions, batch_size):
    positions = list(positions or model.positions)
    shortest = min(len(prompt) for prompt in tokens)
    if not all(-shortest <= position < 0 for position in positions):
        raise ValueError(f"Positions count from the end of a prompt, and the shortest has {shortest} tokens: "
                         f"choose them from -{shortest} to -1, not {positions}.")
    for rows, inputs in model.batches(tokens, batch_size):
        yield rows, trace_residual_stream(model, inputs, positions).float().cpu()
