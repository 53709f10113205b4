"""Change what a model computes: erase a direction from its residual stream, or add one (paper, section 2.4).

    last_logits(model, instructions, Ablation(direction))
    generate(model, instructions, Addition(direction, layer=4))

One direction [d_model] serves all prompts; directions [n_prompts, d_model] give each prompt its own.

The same as an edit of the weights, undone at the end of the block (paper, section 4.1):

    with orthogonalized(model, direction):
        generate(model, instructions)
"""
from contextlib import ExitStack, contextmanager
from copy import copy

import torch
import torch.nn.functional as F

from utils.models import at_least_float32


def ablate(x, direction):
    """Directional ablation: x - r̂ r̂ᵀx, that is, x without what it has along the direction.

    x: [batch, n_tokens, d_model]. direction: [d_model], or [batch, d_model] for one per row; of any length.
    """
    unit = F.normalize(direction, dim=-1).to(x)
    if unit.dim() == 2:
        unit = unit[:, None]  # [batch, 1, d_model]: the same for every token of a row
    return x - (x * unit).sum(dim=-1, keepdim=True) * unit


def add(x, direction, coefficient=1.0):
    """Activation addition: x + coefficient · r. Shapes as in `ablate`; the direction's length counts."""
    direction = direction.to(x)
    if direction.dim() == 2:
        direction = direction[:, None]  # [batch, 1, d_model]: the same for every token of a row
    return x + coefficient * direction


def set_projection(x, direction, levels):
    """x with its projection on r̂ put at a level, and all else as it was.

    x: [batch, n_tokens, d_model]. direction: [d_model], of any length. levels: [n_tokens].
    """
    return ablate(x, direction) + levels.to(x)[:, None] * F.normalize(direction, dim=-1).to(x)


def ablate_everywhere(model, direction):
    """Within a trace: ablate a direction in each layer's input, in what attention writes, in what the MLP writes.

    Each layer in turn, in the order in which the model computes them.
    """
    for layer in model.layers:
        layer.input = ablate(layer.input, direction)
        for module in model.writers(layer):
            out = module.output
            if isinstance(out, tuple):  # attention gives (what it writes, its pattern)
                module.output = (ablate(out[0], direction), *out[1:])
            else:
                module.output = ablate(out, direction)


def add_at_layer(model, direction, layer, coefficient=1.0):
    """Within a trace: add coefficient · direction to the layer's input, at every position."""
    layer = model.layers[layer]
    layer.input = add(layer.input, direction, coefficient)


# Plain classes, for they are sent to NDIF with a trace, by their source; what a dataclass generates has none.

class Ablation:
    """Erase a direction from all that is written to the residual stream: at every layer and position."""

    def __init__(self, direction):
        _check_direction(direction)
        self.direction = direction

    def apply(self, model):
        """Within a trace: change each layer's input, what attention writes, what the MLP writes."""
        ablate_everywhere(model, self.direction)


class Addition:
    """Add coefficient · direction to the residual stream at the start of one layer, at every position."""

    def __init__(self, direction, layer, coefficient=1.0):
        _check_direction(direction)
        self.direction, self.layer, self.coefficient = direction, layer, coefficient

    def apply(self, model):
        """Within a trace: change the layer's input."""
        add_at_layer(model, self.direction, self.layer, self.coefficient)


def last_logits(model, instructions, intervention=None, batch_size=64):
    """Logits at the last position of each prompt, for the first token of the answer -> [n_prompts, vocab].

    float32 (float64 where the model is), on the CPU. Raises ValueError for an intervention that does not fit the model
    or the prompts.
    """
    found = {}
    for rows, inputs, change in changed_batches(model, model.tokens(instructions), intervention, batch_size):
        with model.lm.trace(inputs, use_cache=False, logits_to_keep=1):
            if change is not None:
                change.apply(model)
            logits = model.lm.output.logits[:, -1].save()
        found.update(zip(rows, at_least_float32(logits).cpu()))
    return torch.stack([found[row] for row in range(len(found))])


def trace_generation(model, inputs, change=None, max_new_tokens=64):
    """Prompts with their answers, decoded greedily -> token ids, [n_prompts, n_tokens + at most max_new_tokens].

    inputs: one encoded batch, as `model.encode` gives it. change: an intervention, to act at every token, or None.
    """
    with model.lm.generate(max_new_tokens=max_new_tokens, do_sample=False) as tracer:
        with tracer.invoke(inputs):
            if change is not None:
                for _ in tracer.all():  # without the loop only the prompt would be changed
                    change.apply(model)
        with tracer.invoke():  # apart, because nothing runs after an open loop
            ids = tracer.result.save()
    return ids


def generate(model, instructions, intervention=None, max_new_tokens=64, batch_size=64):
    """The model's answers, decoded greedily -> list of strings, each complete or max_new_tokens long.

    The intervention acts on the prompt's tokens and on generated ones. Raises ValueError as `last_logits`.
    """
    found = {}
    for rows, inputs, change in changed_batches(model, model.tokens(instructions), intervention, batch_size):
        ids = trace_generation(model, inputs, change, max_new_tokens)
        n_prompt = inputs["input_ids"].shape[1]
        found.update(zip(rows, model.decode(ids[:, n_prompt:])))
    return [found[row] for row in range(len(found))]


def changed_batches(model, tokens, intervention, batch_size):
    """Yield (rows, inputs, change) from `model.batches`: `change` is the intervention for these rows.

    Raises ValueError for an intervention that does not fit the model or the number of prompts.
    """
    if intervention is not None:
        _check_fit(intervention, model, len(tokens))
        intervention = copy(intervention)
        intervention.direction = intervention.direction.to(model.device)
    for rows, inputs in model.batches(tokens, batch_size):
        change = intervention
        if intervention is not None and intervention.direction.dim() == 2:
            change = copy(intervention)
            change.direction = intervention.direction[rows]
        yield rows, inputs, change


def every_pair(instructions, directions):
    """Every direction with every instruction -> (instructions, directions), as one batch with one per row.

    directions: [n_directions, d_model]. The first direction comes with all instructions, then the second;
    so what is measured, [n_directions * n_prompts], may be viewed as [n_directions, n_prompts].
    """
    instructions = list(instructions)
    return instructions * len(directions), directions.repeat_interleave(len(instructions), dim=0)


def orthogonalize(weight, direction):
    """Weight orthogonalization: W - r̂ r̂ᵀW, the same matrix, but it writes nothing along the direction.

    weight: [d_model, n_inputs], its columns being what it writes, or a bias [d_model]. direction: [d_model], of any
    length.
    """
    unit = F.normalize(direction, dim=-1).to(weight)
    return weight - torch.tensordot(unit, unit @ weight, dims=0)


def shifted_bias(bias, vector):
    """The bias with which a linear layer adds `vector` to all that it wrote before. Both [d_out]; bias may be None."""
    return vector if bias is None else bias + vector


def residual_writers(model):
    """All weights that write to the residual stream: a list of views [d_model, n_inputs], and of biases [d_model].

    The embedding, transposed; then, of each layer, attention's output matrix and the MLP's, with a bias behind each
    that has one. They are the model's own memory: what you write into them with `.copy_()` is what it then computes.
    """
    views = [model.lm.model.embed_tokens._module.weight.T]
    for layer in model.layers:
        for linear in (layer.self_attn.o_proj._module, layer.mlp.down_proj._module):
            views += [view for view in (linear.weight, linear.bias) if view is not None]
    return [view.detach() for view in views]


@contextmanager
def orthogonalized(model, direction):
    """Within the block, no weight of the model can write along the direction [d_model] (paper, section 4.1).

    Computes what `Ablation` computes. At the end of the block the weights are what they were, bit for bit; no file is
    touched. An unembedding that shares its weights with the embedding keeps its own copy meanwhile: it only reads.
    Where a family normalises what attention and MLP have written (Gemma 2, 3, OLMo 2), their weights stay, and the
    matrix I - r̂ r̂ᵀ comes behind these norms: a norm in between would undo an edit before it.
    Raises ValueError for a direction of another model, or several of them, and for a model that is not `editable`.
    """
    _check_edit(Ablation(direction), model)
    with ExitStack() as undo:
        embedding, unembedding = model.lm.model.embed_tokens._module, model.lm.lm_head._module
        if unembedding.weight is embedding.weight:
            undo.callback(setattr, unembedding, "weight", embedding.weight)
            unembedding.weight = torch.nn.Parameter(embedding.weight.clone(), requires_grad=False)
        writers = residual_writers(model)
        if model.post_norms:
            writers = writers[:1]  # the embedding
            for layer in model.layers:
                for norm in model.writers(layer):
                    hook = norm._module.register_forward_hook(lambda norm, args, out: ablate(out, direction))
                    undo.callback(hook.remove)
        for view in writers:
            undo.callback(view.copy_, view.clone())
            view.copy_(orthogonalize(view, direction))
        yield


@contextmanager
def added_bias(model, direction, layer, coefficient=1.0):
    """Within the block, the MLP before `layer` adds coefficient · direction [d_model] to all that it writes.

    Computes what `Addition` computes, without an intervention: a bias is a vector added at every token. Undone at the
    end of the block. Raises ValueError as `orthogonalized`, and for layer 0, which has no MLP before it.
    """
    _check_edit(Addition(direction, layer, coefficient), model)
    if layer == 0:
        raise ValueError("No MLP comes before layer 0: choose a layer from 1 on, or `Addition`.")
    before = model.layers[layer - 1]
    with ExitStack() as undo:
        if model.post_norms:
            norm = model.writers(before)[1]._module
            hook = norm.register_forward_hook(lambda norm, args, out: add(out, direction, coefficient))
            undo.callback(hook.remove)
        else:
            linear = before.mlp.down_proj._module
            undo.callback(setattr, linear, "bias", linear.bias)
            bias = shifted_bias(linear.bias, coefficient * direction.to(linear.weight))
            linear.bias = torch.nn.Parameter(bias, requires_grad=False)
        yield


def _check_edit(intervention, model):
    if model.remote:
        raise ValueError(f"The weights of {model.name!r} are on NDIF, where they serve others too: give Ablation or "
                         "Addition, which compute the same.")
    if not model.editable:
        raise ValueError(f"{model.name!r} does not write by one matrix in each attention and MLP, as where it has "
                         "experts: give Ablation or Addition, which compute what an edit would.")
    if intervention.direction.dim() != 1:
        raise ValueError("Weights serve all prompts alike: give one direction, [d_model]. "
                         "For one to each prompt, use Ablation or Addition.")
    _check_fit(intervention, model, n_prompts=1)


def _check_direction(direction):
    if not isinstance(direction, torch.Tensor) or direction.dim() not in (1, 2):
        raise ValueError("A direction is a tensor, [d_model] or [n_prompts, d_model]: "
                         "of a Direction, give its `.vector`.")
    lengths = direction.norm(dim=-1)
    if not (lengths.isfinite() & (lengths > 0)).all():
        raise ValueError("A direction of length zero (or not finite) points nowhere: choose another one "
                         "(at layer 0, the template's tokens are the same in every prompt).")


def _check_fit(intervention, model, n_prompts):
    *rows, width = intervention.direction.shape
    if width != model.d_model:
        raise ValueError(f"The direction has {width} entries, but {model.name!r} has d_model "
                         f"{model.d_model}: find a direction in this very model.")
    if rows and rows != [n_prompts]:
        raise ValueError(f"There are {rows[0]} directions for {n_prompts} prompts: give one for all, or one "
                         "for each (see `every_pair`).")
    layer = getattr(intervention, "layer", 0)
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"There is no layer {layer} in {model.name!r}: "
                         f"choose from 0 to {model.n_layers - 1}.")
