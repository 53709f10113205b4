"""Checks of the exercises on reading activations."""
import nnsight
import torch

from utils import activations
from utils.checks import PROMPTS, model, register


def blockwise(read):
    """A function like `trace_residual_stream` that reads `read(layer)` of each layer."""
    def trace_residual_stream(model, inputs, positions):
        with model.lm.trace(inputs, use_cache=False):
            streams = nnsight.save([read(layer)[:, positions] for layer in model.layers])
        return torch.stack(streams, dim=1)
    return trace_residual_stream


register(
    activations.trace_residual_stream,
    cases=lambda: [(model(), model().encode(PROMPTS), [-2, -1])],
    axes="[n_prompts, n_layers, n_positions, d_model]",
    mistakes={
        "you read each layer's output. x^(l) is the stream at the start of layer l: its input.":
            blockwise(lambda layer: layer.output),
        "your axes are in the order [n_layers, n_prompts, ...]. Stack the layers along dim=1, after the prompts.":
            lambda *args: activations.trace_residual_stream(*args).transpose(0, 1),
        "you keep one position only. `layer.input[:, positions]` keeps all that were asked for.":
            lambda *args: activations.trace_residual_stream(*args)[:, :, -1],
        "you averaged over the prompts already. Keep one row for each.":
            lambda *args: activations.trace_residual_stream(*args).mean(dim=0),
    },
)

register(
    activations.residual_stream,
    cases=lambda: [(model(), PROMPTS), (model(), PROMPTS, [-1], 2)],
    axes="[n_prompts, n_layers, n_positions, d_model]",
    mistakes={
        "you read each layer's output. x^(l) is the stream at the start of layer l: its input.":
            lambda model, prompts, positions=None, batch_size=64:
                blockwise(lambda layer: layer.output)(model, model.encode(prompts), positions or model.positions),
        "your axes are in the order [n_layers, n_prompts, ...]. Stack the layers along dim=1, after the prompts.":
            lambda *args: activations.residual_stream(*args).transpose(0, 1),
        "you keep the last position only. Without `positions`, keep all of model.positions.":
            lambda *args: activations.residual_stream(*args[:2], [-1]),
        "you averaged over the prompts already. Keep one row for each.":
            lambda *args: activations.residual_stream(*args).mean(dim=0),
    },
)

register(
    activations.mean_residual_stream,
    cases=lambda: [(model(), PROMPTS), (model(), PROMPTS, [-1], 2)],
    axes="[n_layers, n_positions, d_model]",
    mistakes={
        "you did not average over the prompts: the first axis of your answer still counts them.":
            lambda *args: activations.residual_stream(*args),
        "you averaged over the layers (dim 1) rather than the prompts (dim 0).":
            lambda *args: activations.residual_stream(*args).mean(dim=1),
        "you averaged the batches' means, but the last batch is smaller. Add up the sums, then divide by the number "
        "of prompts.":
            lambda model, prompts, positions=None, batch_size=64: torch.stack([
                activations.residual_stream(model, batch, positions).mean(dim=0) for batch in
                (prompts[start:start + batch_size] for start in range(0, len(prompts), batch_size))]).mean(dim=0),
    },
)
