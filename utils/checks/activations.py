"""Checks of the exercises on reading activations, and on the heads that write a direction."""
import nnsight
import torch
import torch.nn.functional as F

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


def planted_heads():
    """Outputs of 2 layers with 3 heads of 4, for 5 prompts; the layers' matrices into a stream of 6; a direction."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return draw(5, 2, 3, 4), [draw(6, 12), draw(6, 12)], 3 * draw(6)


def attributed(outputs, matrices, vector, shape=lambda row, outputs: row.view(outputs.shape[2:])):
    reads = torch.stack([shape(vector @ matrix, outputs) for matrix in matrices])
    return (outputs * reads).sum(dim=-1)


register(
    activations.head_attributions,
    cases=lambda: [planted_heads()],
    axes="[n_prompts, n_layers, n_heads]",
    mistakes={
        "the direction's length counts in your answer. Use r̂: F.normalize(direction, dim=-1).":
            attributed,
        "the columns of the matrix are shared out wrongly: the first d_head belong to head 0. view(n_heads, d_head).":
            lambda outputs, matrices, direction: attributed(
                outputs, matrices, F.normalize(direction, dim=-1),
                lambda row, outputs: row.view(outputs.shape[3], outputs.shape[2]).T),
        "all layers use the first layer's matrix.":
            lambda outputs, matrices, direction: activations.head_attributions(
                outputs, matrices[:1] * len(matrices), direction),
        "this is the sum over all heads of a layer. Keep the heads apart.":
            lambda *args: activations.head_attributions(*args).sum(dim=-1),
        "take no absolute value: a head may write against r̂.":
            lambda *args: activations.head_attributions(*args).abs(),
    },
)


def planted_patterns():
    """Attention of 2 layers with 2 heads in 3 prompts of 6 tokens, the second and third padded on the left."""
    parts = torch.tensor([[0, 1, 1, 2, 2, 3], [-1, 0, 1, 1, 2, 3], [-1, -1, 0, 1, 1, 3]])
    scores = torch.randn(3, 2, 2, 6, generator=torch.Generator().manual_seed(4))
    return scores.masked_fill((parts < 0)[:, None, None], -torch.inf).softmax(dim=-1), parts, 4


register(
    activations.attention_shares,
    cases=lambda: [planted_patterns(), (*planted_patterns()[:2], 5)],
    axes="[n_prompts, n_layers, n_heads, n_parts]",
    mistakes={
        "this is the mean over a part's tokens. A share is their sum.":
            lambda patterns, parts, n_parts: torch.stack([
                (patterns * (parts == part)[:, None, None]).sum(dim=-1) /
                (parts == part).sum(dim=-1)[:, None, None].clamp(min=1) for part in range(n_parts)], dim=-1),
        "the parts of the first prompt are used for all. Each prompt has its own.":
            lambda patterns, parts, n_parts: activations.attention_shares(
                patterns, parts[:1].expand_as(parts), n_parts),
        "the axis of the parts should come last: torch.stack(..., dim=-1).":
            lambda *args: activations.attention_shares(*args).movedim(-1, 0),
        "the parts count from 0. range(n_parts), not range(1, n_parts + 1).":
            lambda patterns, parts, n_parts: activations.attention_shares(patterns, parts - 1, n_parts),
        "heads are averaged. Keep them apart.":
            lambda *args: activations.attention_shares(*args).mean(dim=2),
    },
)
