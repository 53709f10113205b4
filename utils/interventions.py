"""Change what a model computes: erase a direction from its residual stream, or add one (paper, section 2.4).

    last_logits(model, instructions, Ablation(direction))
    generate(model, instructions, Addition(direction, layer=4))

A direction [d_model] serves every prompt; directions [n_prompts, d_model] give each prompt its own.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


def ablate(x, direction):
    """Directional ablation, x - r̂ r̂ᵀx: what x has along the direction is removed (paper, section 2.4).

    x: [batch, n_tokens, d_model]. direction: [d_model], or [batch, d_model] for one per row; its length is no matter.
    """
    unit = F.normalize(direction, dim=-1).to(x)
    if unit.dim() == 2:
        unit = unit[:, None]  # [batch, 1, d_model]: every token of a row meets the row's direction
    return x - (x * unit).sum(dim=-1, keepdim=True) * unit


def add(x, direction, coefficient=1.0):
    """Activation addition, x + coefficient · r (paper, section 2.4). Shapes as in `ablate`; here the length counts."""
    direction = direction.to(x)
    if direction.dim() == 2:
        direction = direction[:, None]  # [batch, 1, d_model]
    return x + coefficient * direction


@dataclass(frozen=True, eq=False)
class Ablation:
    """Erase a direction wherever the model writes to the residual stream: every layer, every position."""
    direction: torch.Tensor

    def __post_init__(self):
        _check_direction(self.direction)

    def apply(self, model):
        """Inside a trace: change each layer's input, attention output and MLP output, in the order of execution."""
        for layer in model.layers:
            layer.input = ablate(layer.input, self.direction)
            for module in model.writers(layer):
                out = module.output
                if isinstance(out, tuple):  # attention: (what it writes, its pattern)
                    module.output = (ablate(out[0], self.direction), *out[1:])
                else:
                    module.output = ablate(out, self.direction)


@dataclass(frozen=True, eq=False)
class Addition:
    """Add coefficient · direction to the residual stream at the start of one layer, at every position."""
    direction: torch.Tensor
    layer: int
    coefficient: float = 1.0

    def __post_init__(self):
        _check_direction(self.direction)

    def apply(self, model):
        """Inside a trace: change the input of the layer."""
        layer = model.layers[self.layer]
        layer.input = add(layer.input, self.direction, self.coefficient)


def last_logits(model, instructions, intervention=None, batch_size=64):
    """Logits at the last position of each prompt, from which its answer's first token is drawn -> [n_prompts, vocab].

    float32, on the CPU. Raises ValueError if the intervention does not fit the model or the number of prompts.
    """
    tokens = model.tokens(instructions)
    check_fit(intervention, model, len(tokens))
    found = {}
    for rows, inputs in model.batches(tokens, batch_size):
        change = for_rows(intervention, rows)
        with model.lm.trace(inputs, use_cache=False, logits_to_keep=1):
            if change is not None:
                change.apply(model)
            logits = model.lm.output.logits[:, -1].save()
        found.update(zip(rows, logits.float().cpu()))
    return torch.stack([found[row] for row in range(len(tokens))])


def generate(model, instructions, intervention=None, max_new_tokens=64, batch_size=64):
    """The model's answers, greedily decoded: a list of strings, each up to the end of the answer or max_new_tokens.

    The intervention acts on the prompt and on every generated token. Raises ValueError as `last_logits` does.
    """
    tokens = model.tokens(instructions)
    check_fit(intervention, model, len(tokens))
    found = {}
    for rows, inputs in model.batches(tokens, batch_size):
        change = for_rows(intervention, rows)
        with model.lm.generate(max_new_tokens=max_new_tokens, do_sample=False) as tracer:
            with tracer.invoke(inputs):
                if change is not None:
                    for _ in tracer.all():  # without this loop only the prompt would be changed
                        change.apply(model)
            with tracer.invoke():  # a second block, because nothing after an open loop runs
                ids = tracer.result.save()
        answers = ids[:, inputs["input_ids"].shape[1]:]
        found.update(zip(rows, model.decode(answers)))
    return [found[row] for row in range(len(tokens))]


def every_pair(instructions, directions):
    """Every direction with every instruction, in one batch: (instructions repeated, one direction for each).

    directions: [n_directions, d_model]. All instructions come with the first direction, then all with the second; so
    results of shape [n_directions * n_prompts, ...] are viewed as [n_directions, n_prompts, ...].
    """
    instructions = list(instructions)
    return instructions * len(directions), directions.repeat_interleave(len(instructions), dim=0)


def _check_direction(direction):
    if not isinstance(direction, torch.Tensor) or direction.dim() not in (1, 2):
        raise ValueError("A direction is a tensor [d_model], or [n_prompts, d_model] for one per prompt; "
                         "from a Direction, take its `.vector`.")
    lengths = direction.norm(dim=-1)
    if not (lengths.isfinite() & (lengths > 0)).all():
        raise ValueError("A direction has length zero or is not finite: choose another (at layer 0 the tokens after "
                         "the instruction are the same in every prompt, so their means do not differ).")


def check_fit(intervention, model, n_prompts):
    """Raise ValueError unless the intervention's widths, rows and layer are the model's and the prompts'."""
    if intervention is None:
        return
    *rows, width = intervention.direction.shape
    if width != model.d_model:
        raise ValueError(f"The direction has {width} entries, but the residual stream of {model.name!r} has "
                         f"{model.d_model}: find a direction in this very model.")
    if rows and rows != [n_prompts]:
        raise ValueError(f"There are {rows[0]} directions for {n_prompts} prompts: give one direction, or one for each "
                         "(`every_pair` repeats the prompts).")
    layer = getattr(intervention, "layer", 0)
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"There is no layer {layer}: {model.name!r} has layers 0 to {model.n_layers - 1}.")


def for_rows(intervention, rows):
    """The intervention for some of the prompts: where each has its own direction, theirs."""
    if intervention is None or intervention.direction.dim() == 1:
        return intervention
    return replace(intervention, direction=intervention.direction[rows])
