"""Checks of the exercises on erasing, adding and editing weights."""
import torch
import torch.nn.functional as F

from utils import interventions
from utils.checks import PROMPTS, direction, model, randn, register

register(
    interventions.ablate,
    cases=lambda: [(randn(3, 4, 5), 3 * randn(5, seed=1))],
    axes="[batch, n_tokens, d_model]",
    mistakes={
        "the direction is not scaled to length 1 first: r̂ = r / |r|.":
            lambda x, r: x - (x @ r)[..., None] * r,
        "r̂ stands twice in the formula, and you scaled only one of the two to length 1.":
            lambda x, r: x - (x @ r)[..., None] * r / r.norm(),
        "you returned the part along the direction. Return x without it.":
            lambda x, r: (x @ r)[..., None] * r / (r @ r),
        "the sign is flipped: you added the part along the direction rather than taking it away.":
            lambda x, r: x + (x @ r)[..., None] * r / (r @ r),
        "you subtracted r̂ itself, whatever x holds of it. Subtract r̂ times (r̂ · x), which is different for each token.":
            lambda x, r: x - r / r.norm(),
    },
)

register(
    interventions.add,
    cases=lambda: [(randn(3, 4, 5), 3 * randn(5, seed=1)), (randn(3, 4, 5), 3 * randn(5, seed=1), -0.5)],
    axes="[batch, n_tokens, d_model]",
    mistakes={
        "you scaled the direction to length 1. In activation addition its length counts: add r itself.":
            lambda x, r, coefficient=1.0: x + coefficient * r / r.norm(),
        "the coefficient is not used.":
            lambda x, r, coefficient=1.0: x + r,
        "the coefficient multiplies the sum. Only the direction is multiplied.":
            lambda x, r, coefficient=1.0: coefficient * (x + r),
        "you added the direction at the last token only. Add it at every position.":
            lambda x, r, coefficient=1.0: torch.cat([x[:, :-1], x[:, -1:] + coefficient * r], dim=1),
        "the sign is flipped: you subtracted the direction.":
            lambda x, r, coefficient=1.0: x - coefficient * r,
    },
)

register(
    interventions.orthogonalize,
    cases=lambda: [(randn(5, 5), 3 * randn(5, seed=1)), (randn(5, 7), 3 * randn(5, seed=1)),
                   (randn(5), 3 * randn(5, seed=1))],
    axes="[d_model, n_inputs], as it came in",
    mistakes={
        "the direction is not scaled to length 1 first: r̂ = r / |r|.":
            lambda weight, r: weight - torch.tensordot(r, r @ weight, dims=0),
        "r̂ stands twice in the formula, and you scaled only one of the two to length 1.":
            lambda weight, r: weight - torch.tensordot(r, r @ weight, dims=0) / r.norm(),
        "you took the direction out of what the matrix reads, its rows. Take it out of what it writes, its columns: "
        "r̂ on the left of W.":
            lambda weight, r: weight - torch.outer(weight @ r, r) / (r @ r),
        "you returned what the matrix writes along the direction. Return the matrix without it.":
            lambda weight, r: torch.tensordot(r, r @ weight, dims=0) / (r @ r),
        "the sign is flipped: you added r̂ r̂ᵀW rather than taking it away.":
            lambda weight, r: weight + torch.tensordot(r, r @ weight, dims=0) / (r @ r),
        "matrices are right, but a bias [d_model] is not: r̂ times (r̂ · b). torch.tensordot(r̂, r̂ @ W, dims=0) does "
        "both.":
            lambda weight, r: weight - torch.outer(r, r @ weight) / (r @ r),
    },
)

register(
    interventions.shifted_bias,
    cases=lambda: [(None, randn(5)), (randn(5), randn(5, seed=1))],
    axes="[d_out]",
    mistakes={
        "where there is a bias already, add to it: it must not be lost.":
            lambda bias, vector: vector,
        "a linear layer may have no bias: None. Then the new bias is the vector itself.":
            lambda bias, vector: bias + vector,
        "you left a bias that was there as it is.":
            lambda bias, vector: vector if bias is None else bias,
        "the sign is flipped.":
            lambda bias, vector: -vector if bias is None else bias - vector,
    },
)


def linears(model, *names):
    """Weights of the layers' linear parts of these names, as `residual_writers` gives them."""
    parts = {"o_proj": lambda layer: layer.self_attn.o_proj, "down_proj": lambda layer: layer.mlp.down_proj,
             "up_proj": lambda layer: layer.mlp.up_proj}
    return [parts[name](layer)._module.weight.detach() for layer in model.layers for name in names]


def embedding(model):
    return [model.lm.model.embed_tokens._module.weight.detach()]


def views_of(residual_writers, model):
    """The answer, and how many of its tensors are the model's own memory."""
    views = residual_writers(model)
    return list(views), len({view.data_ptr() for view in views} & {own.data_ptr() for own in model.lm.parameters()})


register(
    interventions.residual_writers,
    cases=lambda: [(model(),)],
    call=views_of,
    mistakes={
        "the embedding is missing: it writes the first vector of every token.":
            lambda model: linears(model, "o_proj", "down_proj"),
        "the embedding is a table with a row for each token, [vocab, d_model]. Transpose it: what it writes shall be "
        "its columns.":
            lambda model: embedding(model) + linears(model, "o_proj", "down_proj"),
        "attention's output matrices are missing: `layer.self_attn.o_proj`.":
            lambda model: [embedding(model)[0].T, *linears(model, "down_proj")],
        "the MLPs' output matrices are missing: `layer.mlp.down_proj`.":
            lambda model: [embedding(model)[0].T, *linears(model, "o_proj")],
        "up_proj reads the residual stream; it does not write to it. Take down_proj.":
            lambda model: [embedding(model)[0].T, *linears(model, "o_proj", "up_proj")],
        "the order is that of the layers: attention and MLP of layer 0, then of layer 1, and so on.":
            lambda model: [embedding(model)[0].T, *linears(model, "o_proj"), *linears(model, "down_proj")],
        "the unembedding reads the last stream, it does not write to it. Leave it out.":
            lambda model: [*interventions.residual_writers(model), embedding(model)[0].T],
        "these are copies. Return the model's own memory, or an edit of them changes nothing: no `.clone()`.":
            lambda model: [view.clone() for view in interventions.residual_writers(model)],
    },
)


def all_logits(model, prompts, intervention=None, batch_size=64):
    """Logits at every position -> [n_prompts, n_tokens, vocab]."""
    with model.lm.trace(model.encode(prompts), use_cache=False):
        if intervention is not None:
            intervention.apply(model)
        logits = model.lm.output.logits.save()
    return logits


register(
    interventions.last_logits,
    cases=lambda: [(model(), PROMPTS), (model(), PROMPTS, interventions.Ablation(direction()))],
    axes="[n_prompts, vocab]",
    mistakes={
        "the intervention changes nothing. Inside the trace call intervention.apply(model), then read the logits.":
            lambda model, prompts, intervention=None, batch_size=64: all_logits(model, prompts)[:, -1],
        "these are the logits at every position. Keep the last one: [:, -1].":
            all_logits,
        "these are the logits at the first position. The last is -1.":
            lambda *args: all_logits(*args)[:, 0],
        "these are probabilities. Return the logits as they are.":
            lambda *args: all_logits(*args)[:, -1].softmax(dim=-1),
    },
)


def logits_with(change, model, *args):
    """Logits [2 prompts, n_tokens, vocab] of a trace in which `change(model, *args)` is called."""
    with model.lm.trace(model.encode(PROMPTS[:2]), use_cache=False):
        change(model, *args)
        logits = model.lm.output.logits.save()
    return logits


def ablate_at(places="input attention mlp", layers=slice(None), change=interventions.ablate):
    """Like `ablate_everywhere`, at some of the places and layers, or with another change."""
    def ablate_everywhere(model, direction):
        for layer in model.layers[layers]:
            attention, mlp = model.writers(layer)
            if "input" in places:
                layer.input = change(layer.input, direction)
            if "attention" in places:
                layer.self_attn.output = (change(attention.output[0], direction), *attention.output[1:])
            if "mlp" in places:
                mlp.output = change(mlp.output, direction)
    return ablate_everywhere


def without_tuple(model, direction):
    """`ablate_everywhere`, but what attention gives is no tuple any more."""
    for layer in model.layers:
        layer.input = interventions.ablate(layer.input, direction)
        layer.self_attn.output = interventions.ablate(layer.self_attn.output[0], direction)
        layer.mlp.output = interventions.ablate(layer.mlp.output, direction)


def last_position_only(x, direction):
    return torch.cat([x[:, :-1], interventions.ablate(x[:, -1:], direction)], dim=1)


def mlp_first(model, direction):
    for layer in model.layers:
        layer.input = interventions.ablate(layer.input, direction)
        layer.mlp.output = interventions.ablate(layer.mlp.output, direction)
        layer.self_attn.output = (interventions.ablate(layer.self_attn.output[0], direction), None)


register(
    interventions.ablate_everywhere,
    cases=lambda: [(model(), direction())],
    call=logits_with,
    axes="[n_prompts, n_tokens, vocab]",
    mistakes={
        "nothing is changed. Assign what `ablate` returns: layer.input = ablate(layer.input, direction).":
            ablate_at(change=lambda x, direction: x),
        "attention's output is a tuple (what it writes, its pattern). You put a tensor in its place, and two prompts "
        "were taken for the tuple's two parts: no error, and a wrong result. Assign (ablate(out[0], direction), "
        "*out[1:]).":
            without_tuple,
        "you ablate each layer's input alone. Within a layer the MLP reads what attention has just written: ablate "
        "what the two write as well.":
            ablate_at("input"),
        "you ablate what attention and MLP write, but the first layer's input, the embeddings, still has the "
        "direction.":
            ablate_at("attention mlp"),
        "you left out what attention writes.":
            ablate_at("input mlp"),
        "you left out what the MLP writes.":
            ablate_at("input attention"),
        "you ablate in the last layer only. Indent all three assignments under the loop.":
            ablate_at(layers=slice(-1, None)),
        "you ablate in the first layer only: later layers write the direction again.":
            ablate_at(layers=slice(1)),
        "you ablate at the last token only. Take them all.":
            ablate_at(change=last_position_only),
        "the order is that of the computation: in each layer its input, then attention, then the MLP. You asked for "
        "attention's output when the model had run past it.":
            mlp_first,
    },
)


def adding(where=lambda layer: layer, change=lambda x, direction, coefficient: interventions.add(
        x, direction, coefficient), part="input"):
    """`add_at_layer` with a fault."""
    def add_at_layer(model, direction, layer, coefficient=1.0):
        here = model.layers[where(layer)]
        setattr(here, part, change(getattr(here, part), direction, coefficient))
    return add_at_layer


register(
    interventions.add_at_layer,
    cases=lambda: [(model(), direction(), 2), (model(), direction(), 1, -0.5)],
    call=logits_with,
    axes="[n_prompts, n_tokens, vocab]",
    mistakes={
        "nothing is changed. Assign what `add` returns: layer.input = add(layer.input, direction, coefficient).":
            adding(change=lambda x, direction, coefficient: x),
        "you add to the layer's output, which is the next layer's input. r was read at the start of the layer: its "
        "input.":
            adding(part="output"),
        "the direction is added at layer 0, whatever the layer.":
            adding(where=lambda layer: 0),
        "the coefficient is not used.":
            adding(change=lambda x, direction, coefficient: x + direction),
        "you add at the last token only. Take them all.":
            adding(change=lambda x, direction, coefficient: torch.cat(
                [x[:, :-1], x[:, -1:] + coefficient * direction], dim=1)),
        "you scaled the direction to length 1. In activation addition its length counts.":
            adding(change=lambda x, direction, coefficient: x + coefficient * F.normalize(direction, dim=-1)),
        "the sign is flipped: you subtracted the direction.":
            adding(change=lambda x, direction, coefficient: x - coefficient * direction),
    },
)


def generated_ids(model, prompts, max_new_tokens, intervention=None):
    """Prompts and answers as token ids, the intervention acting on the prompt alone."""
    with model.lm.generate(max_new_tokens=max_new_tokens, do_sample=False) as tracer:
        with tracer.invoke(model.encode(prompts)):
            if intervention is not None:
                intervention.apply(model)
        with tracer.invoke():
            ids = tracer.result.save()
    return ids


def longest(model, prompts):
    """The number of tokens of the longest prompt."""
    return max(map(len, model.tokens(prompts)))


register(
    interventions.generate,
    cases=lambda: [(model(), PROMPTS, None, 12), (model(), PROMPTS, interventions.Addition(direction(), 1), 12)],
    mistakes={
        "the intervention changes nothing. Call intervention.apply(model) inside the trace.":
            lambda model, prompts, intervention=None, max_new_tokens=64, batch_size=64:
                interventions.generate(model, prompts, None, max_new_tokens),
        "the intervention acts on the prompt, but not on the generated tokens. Put it under `for _ in tracer.all():`.":
            lambda model, prompts, intervention=None, max_new_tokens=64, batch_size=64: model.decode(
                generated_ids(model, prompts, max_new_tokens, intervention)[:, longest(model, prompts):]),
        "the prompt is still in front of the answer. Cut off as many tokens as went in.":
            lambda model, prompts, intervention=None, max_new_tokens=64, batch_size=64: model.decode(
                generated_ids(model, prompts, max_new_tokens)),
    },
)

def saved_after_the_loop(model, inputs, change, max_new_tokens=64):
    """`trace_generation` with a statement that is never reached."""
    with model.lm.generate(max_new_tokens=max_new_tokens, do_sample=False) as tracer:
        with tracer.invoke(inputs):
            for _ in tracer.all():
                change.apply(model)
            ids = tracer.result.save()
    return ids


register(
    interventions.trace_generation,
    # Never change=None: `for _ in tracer.all():` with nothing to do in it would go round for ever.
    cases=lambda: [(model(), model().encode(PROMPTS), interventions.Addition(direction(), 1), 12)],
    axes="[n_prompts, n_tokens of prompt and answer]",
    mistakes={
        "the change acts on the prompt, but not on the generated tokens. Put it under `for _ in tracer.all():`.":
            lambda model, inputs, change, max_new_tokens=64:
                generated_ids(model, PROMPTS, max_new_tokens, change),
        "nothing is changed. Call change.apply(model) in the loop.":
            lambda model, inputs, change, max_new_tokens=64: generated_ids(model, PROMPTS, max_new_tokens),
        "nothing runs after an open loop: `ids` was never saved. Save it in a second `with tracer.invoke():`, which "
        "stands beside the first one.":
            saved_after_the_loop,
        "these are the answers alone. Return the ids of prompts and answers, all of tracer.result.":
            lambda model, inputs, change, max_new_tokens=64:
                interventions.trace_generation(model, inputs, change, max_new_tokens)[:, inputs["input_ids"].shape[1]:],
        "these are texts. Return token ids; decoding them comes later.":
            lambda *args: args[0].decode(interventions.trace_generation(*args)),
        "max_new_tokens is not used.":
            lambda model, inputs, change, max_new_tokens=64:
                interventions.trace_generation(model, inputs, change, 64),
    },
)

register(
    interventions.every_pair,
    cases=lambda: [(PROMPTS, randn(2, 4))],
    mistakes={
        "you repeated the directions in turn: r1, r2, r1, r2. All prompts come with r1, then all with r2: "
        "repeat_interleave.":
            lambda prompts, directions: (prompts * len(directions), directions.repeat(len(prompts), 1)),
        "you repeated each prompt in a row. All prompts come with r1, then all with r2.":
            lambda prompts, directions: ([p for p in prompts for _ in directions],
                                         directions.repeat_interleave(len(prompts), dim=0)),
        "you paired the first prompt with the first direction, and so on. Pair every prompt with every direction.":
            lambda prompts, directions: (prompts, directions),
    },
)


def planted_levels():
    generator = torch.Generator().manual_seed(5)
    x, direction = torch.randn(2, 3, 8, generator=generator), 4 * torch.randn(8, generator=generator)
    return x, direction, torch.tensor([5.0, 0, -2])


register(
    interventions.set_projection,
    cases=lambda: [planted_levels()],
    axes="[batch, n_tokens, d_model]",
    mistakes={
        "the level is added to what was there. Ablate first.":
            lambda x, direction, levels: x + levels[:, None] * F.normalize(direction, dim=-1),
        "the level is multiplied with the direction as it is. r̂ has length 1: F.normalize(direction, dim=-1).":
            lambda x, direction, levels: interventions.ablate(x, direction) + levels[:, None] * direction,
        "the projection is set to zero, whatever the level.":
            lambda x, direction, levels: interventions.ablate(x, direction),
        "all tokens get the first level. There is one for each token: levels[:, None].":
            lambda x, direction, levels: interventions.set_projection(x, direction, levels[:1].expand_as(levels)),
    },
)
