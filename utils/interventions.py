"""Change what a model computes: erase a direction from its residual stream, or add one (paper, section 2.4).

    last_logits(model, instructions, Ablation(direction))
    generate(model, instructions, Addition(direction, layer=4))

One direction [d_model] serves all prompts; directions [n_prompts, d_model] give each prompt its own. An intervention of
your own is any object with `.apply(model)`, called within the trace. If it has a `.direction`, a tensor of one of these
shapes, it too gets each prompt's own.

The same as an edit of the weights, undone at the end of the block (paper, section 4.1):

    with orthogonalized(model, direction):
        generate(model, instructions)
"""
from contextlib import ExitStack, contextmanager
from copy import copy

import torch
import torch.nn.functional as F

from utils.activations import check_positions
from utils.models import PLAIN_NUMBERS, at_least_float32, rewrite


def cast_like(direction, x):
    """The direction on x's device and in its kind of numbers.

    Raises TypeError where these are whole ones, which would leave nothing of it.
    """
    if x.dtype not in PLAIN_NUMBERS:
        raise TypeError(f"A direction cannot be told in {x.dtype}: change activations, or weights of 16 bits or more.")
    return direction.to(x)


def ablate(x, direction):
    """Directional ablation: x - r̂ r̂ᵀx, that is, x without what it has along the direction.

    x: [batch, n_tokens, d_model]. direction: [d_model], or [batch, d_model] for one per row; of any length.
    Raises TypeError where x isn't of floating-point numbers.
    """
    unit = cast_like(F.normalize(direction, dim=-1), x)
    if unit.dim() == 2:
        unit = unit[:, None]  # [batch, 1, d_model]: the same for every token of a row
    return x - (x * unit).sum(dim=-1, keepdim=True) * unit


def add(x, direction, coefficient=1.0):
    """Activation addition: x + coefficient · r. Shapes and errors as in `ablate`; the direction's length counts."""
    direction = cast_like(direction, x)
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
    """Erase a direction from all that is written to the residual stream, at every layer and position or at some.

    direction: [d_model], or [n_prompts, d_model], or a Direction.
    layers: the numbers of those layers whose input is changed, and what attention and MLP write there; None for all.
    positions: counted from the prompt's end, -1 being its last token; generated tokens then stay as they are. None for
    all, generated ones too.
    Raises ValueError for a direction that is none, and for layers or positions that no model or prompt has.
    """

    def __init__(self, direction, layers=None, positions=None):
        self.direction = _checked_vector(direction)
        self.layers = _checked_numbers(layers, "layers")
        self.positions = _checked_numbers(positions, "positions")
        self.ends = None  # where each row's prompt ends, [batch]; unless told otherwise, where the tokens end

    def apply(self, model):
        """Within a trace: change each layer's input, what attention writes, what the MLP writes."""
        if self.layers is None and self.positions is None:
            ablate_everywhere(model, self.direction)
            return
        for number in range(model.n_layers) if self.layers is None else self.layers:
            layer = model.layers[number]
            layer.input = self.change(layer.input)
            for module in model.writers(layer):
                rewrite(module, self.change)

    def change(self, x):
        """x [batch, n_tokens, d_model] without what it has along the direction, at the positions."""
        if self.positions is None:
            return ablate(x, self.direction)
        if x.shape[1] == 1:  # a generated token: a prompt has more, those of its template
            return x
        ends = torch.tensor([x.shape[1]]) if self.ends is None else self.ends
        places = torch.arange(x.shape[1]) - ends[:, None]  # [batch, n_tokens]: -1 at a prompt's last token
        chosen = torch.isin(places, torch.tensor(self.positions))[..., None]
        return torch.where(chosen.to(x.device), ablate(x, self.direction), x)


class Addition:
    """Add coefficient · direction to the residual stream at the start of one layer, at every position.

    direction: as in `Ablation`. layer: may be left out for a Direction, which has been found at one.
    """

    def __init__(self, direction, layer=None, coefficient=1.0):
        self.direction, self.coefficient = _checked_vector(direction), coefficient
        self.layer = getattr(direction, "layer", None) if layer is None else layer
        if self.layer is None:
            raise ValueError("Say at which layer to add: Addition(vector, layer=4). A Direction alone has its own.")

    def apply(self, model):
        """Within a trace: change the layer's input."""
        add_at_layer(model, self.direction, self.layer, self.coefficient)


def last_logits(model, instructions, intervention=None, batch_size=64):
    """Logits at the last position of each prompt, for the first token of the answer -> [n_prompts, vocab].

    float32 (float64 where the model is), on the CPU. Raises ValueError for an intervention that does not fit the model
    or the prompts, TypeError for what is none.
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

    The intervention acts on the prompt's tokens and on generated ones. Raises as `last_logits`.
    """
    found = {}
    for rows, inputs, change in changed_batches(model, model.tokens(instructions), intervention, batch_size):
        ids = trace_generation(model, inputs, change, max_new_tokens)
        n_prompt = inputs["input_ids"].shape[1]
        found.update(zip(rows, model.decode(ids[:, n_prompt:])))
    return [found[row] for row in range(len(found))]


def changed_batches(model, tokens, intervention, batch_size, n_after=None):
    """Yield (rows, inputs, change) from `model.batches`: `change` is the intervention for these rows.

    n_after: of each list of tokens, how many stand behind the prompt's end; None for none.
    Raises ValueError for an intervention that does not fit the model or the prompts, TypeError for what is none.
    """
    n_after = torch.tensor(n_after or [0] * len(tokens))
    if intervention is not None:
        _check_fit(intervention, model, [len(ids) - n for ids, n in zip(tokens, n_after.tolist())])
    for rows, inputs in model.batches(tokens, batch_size):
        yield rows, inputs, _for_rows(intervention, model, rows, inputs["input_ids"].shape[1] - n_after[rows])


def _for_rows(intervention, model, rows, ends):
    """The intervention for these prompts alone: a copy, where it differs. ends: how many tokens come before the end of
    each prompt, padding included, [batch]."""
    changes, direction = {}, getattr(intervention, "direction", None)
    if isinstance(direction, torch.Tensor):
        here = direction.to(model.device)
        changes["direction"] = here[rows] if here.dim() == 2 else here
    if isinstance(intervention, Ablation) and intervention.positions is not None:
        changes["ends"] = ends
    if all(value is getattr(intervention, name) for name, value in changes.items()):
        return intervention
    change = copy(intervention)
    for name, value in changes.items():
        object.__setattr__(change, name, value)  # a frozen dataclass may stand here too
    return change


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
    length. Raises TypeError for a weight that isn't of floating-point numbers.
    """
    unit = cast_like(F.normalize(direction, dim=-1), weight)
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
        for linear in model.matrices(layer):
            views += [view for view in (linear._module.weight, linear._module.bias) if view is not None]
    return [view.detach() for view in views]


@contextmanager
def orthogonalized(model, direction):
    """Within the block, no weight of the model can write along the direction (paper, section 4.1).

    direction: [d_model], or a Direction.
    Computes what `Ablation` computes. At the end of the block the weights are what they were, bit for bit; no file is
    touched. An unembedding that shares its weights with the embedding keeps its own copy meanwhile: it only reads.
    Where a family normalises what attention and MLP have written, as Gemma 2 does, their weights stay, and the matrix
    I - r̂ r̂ᵀ comes behind these norms: a norm in between would undo an edit before it.
    Raises ValueError for a direction of another model, or several of them, and for a model that is not `editable`.
    """
    direction = _check_edit(Ablation(direction), model)
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
def added_bias(model, direction, layer=None, coefficient=1.0):
    """Within the block, the MLP before `layer` adds coefficient · direction [d_model] to all that it writes.

    direction, layer: as in `Addition`, but one direction.
    Computes what `Addition` computes, without an intervention: a bias is a vector added at every token. Undone at the
    end of the block. Raises ValueError as `orthogonalized`, and for layer 0, which has no MLP before it.
    """
    addition = Addition(direction, layer, coefficient)
    direction = _check_edit(addition, model)
    if addition.layer == 0:
        raise ValueError("No MLP comes before layer 0: choose a layer from 1 on, or `Addition`.")
    before = model.layers[addition.layer - 1]
    with ExitStack() as undo:
        if model.post_norms:
            norm = model.writers(before)[1]._module
            hook = norm.register_forward_hook(lambda norm, args, out: add(out, direction, coefficient))
            undo.callback(hook.remove)
        else:
            linear = before.mlp.down_proj._module
            undo.callback(setattr, linear, "bias", linear.bias)
            bias = shifted_bias(linear.bias, coefficient / model.multiplier * direction.to(linear.weight))
            linear.bias = torch.nn.Parameter(bias, requires_grad=False)
        yield


def _check_edit(intervention, model):
    """The direction [d_model], if the model's weights can be edited with it."""
    if model.remote:
        raise ValueError(f"The weights of {model.name!r} are on NDIF, where they serve others too: give Ablation or "
                         "Addition, which compute the same.")
    if not (model.editable and model.has_plain_matrices()):  # they may have been quantized, or adapted, since
        raise ValueError(f"{model.name!r} does not write by one plain matrix in each attention and MLP, as where there "
                         "are experts or 8-bit weights: give Ablation or Addition, which compute what an edit would.")
    if intervention.direction.dim() != 1:
        raise ValueError("Weights serve all prompts alike: give one direction, [d_model]. "
                         "For one to each prompt, use Ablation or Addition.")
    _check_fit(intervention, model, [1])
    return intervention.direction


def _checked_vector(direction):
    """The tensor, of a tensor or of a Direction, if it is one that points somewhere."""
    vector = getattr(direction, "vector", direction)
    if not isinstance(vector, torch.Tensor) or vector.dim() not in (1, 2) or vector.dtype not in PLAIN_NUMBERS:
        raise ValueError("A direction is a tensor of floating-point numbers, [d_model] or [n_prompts, d_model], or a "
                         "Direction.")
    lengths = vector.norm(dim=-1)
    if not (lengths.isfinite() & (lengths > 0)).all():
        raise ValueError("A direction of length zero (or not finite) points nowhere: choose another one "
                         "(at layer 0, the template's tokens are the same in every prompt).")
    return vector


def _checked_numbers(numbers, name):
    """Layers or positions, in order, as a list; None stays None."""
    if numbers is None:
        return None
    if not isinstance(numbers, (list, tuple, range)) or not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"Give {name} as a list of whole numbers, such as {[-2, -1] if name == 'positions' else [4]}, "
                         f"not {numbers!r}.")
    if not numbers:
        raise ValueError(f"Without any {name} nothing is erased: name some, or leave {name} out for all.")
    if name == "positions" and max(numbers) >= 0:
        raise ValueError(f"Positions count from the prompt's end, -1 being its last token: {max(numbers)} is none.")
    return sorted(set(numbers))


def _check_fit(intervention, model, lengths):
    """lengths: how many tokens each prompt has."""
    if isinstance(intervention, type) or not callable(getattr(intervention, "apply", None)):
        raise TypeError("An intervention is an object with a method `.apply(model)`, such as Ablation(direction), and "
                        f"not a {type(intervention).__name__}.")
    direction = getattr(intervention, "direction", None)
    if isinstance(direction, torch.Tensor):
        *rows, width = direction.shape
        if width != model.d_model:
            raise ValueError(f"The direction has {width} entries, but {model.name!r} has d_model "
                             f"{model.d_model}: find a direction in this very model.")
        if rows and rows != [len(lengths)]:
            raise ValueError(f"There are {rows[0]} directions for {len(lengths)} prompts: give one for all, or one "
                             "for each (see `every_pair`).")
    if isinstance(intervention, Addition):
        _check_layers([intervention.layer], model)
    if isinstance(intervention, Ablation):
        _check_layers(intervention.layers or [], model)
        check_positions(intervention.positions or [-1], lengths)


def _check_layers(layers, model):
    for layer in layers:
        if not isinstance(layer, int) or layer not in range(model.n_layers):
            raise ValueError(f"There is no layer {layer} in {model.name!r}: "
                             f"choose from 0 to {model.n_layers - 1}.")
