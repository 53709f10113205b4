"""What tests compare the course with: plain transformers models with plain PyTorch hooks, written by the formulas.

They share no code with `utils`. A model is read from its folder once more, as transformers reads it, and a prompt goes
through the tokenizer's own chat template.
"""
import functools
from contextlib import ExitStack

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

POST_NORM = {"Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Olmo2ForCausalLM",
             "Olmo3ForCausalLM", "Exaone4ForCausalLM"}
WRITERS = {"self_attn", "attention", "linear_attn", "conv", "mlp", "feed_forward"}  # whatever has one of these names


@functools.cache
def plain_model(folder):
    """(model, tokenizer) as transformers reads them, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager",
                                                 experts_implementation="eager")
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(folder, padding_side="left")


def encoded(model, prompts):
    """{"input_ids", "attention_mask"}, each [n_prompts, n_tokens], padded on the left."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return dict(plain_model(model.name)[1].apply_chat_template(
        chats, add_generation_prompt=True, enable_thinking=False, padding=True, return_dict=True, return_tensors="pt"))


def decoder(plain):
    """The part of a plain model that holds its layers."""
    base = getattr(plain, "model", None) or plain.gpt_neox
    return getattr(base, "language_model", base)


def erase(x, directions):
    """x [batch, n_tokens, d_model] without its part along each row's direction."""
    rows = []
    for row, direction in zip(x, directions):
        projection = torch.outer(direction, direction) / direction.dot(direction)
        rows.append(row - row @ projection)
    return torch.stack(rows)


class Hooks:
    """Plain PyTorch hooks on a plain model: `with Hooks(plain, ablate=directions)`, or `add=(layer, vectors)`.

    directions, vectors: [n_prompts, d_model]. layers, positions: those where to ablate, if not all; positions in the
    prompt alone. prompt_only: generated tokens stay as they are.
    """

    def __init__(self, plain, ablate=None, add=None, prompt_only=False, layers=None, positions=None):
        self.plain, self.ablate, self.add = plain, ablate, add
        self.prompt_only, self.layers, self.positions = prompt_only or positions is not None, layers, positions

    def __enter__(self):
        self.stack = ExitStack()
        for number, layer in enumerate(decoder(self.plain).layers):
            if self.ablate is not None and (self.layers is None or number in self.layers):
                self.before(layer, self.erased)
                if type(self.plain).__name__ in POST_NORM:
                    writers = [layer.post_attention_layernorm, layer.post_feedforward_layernorm]
                else:
                    writers = [part for name, part in layer.named_children() if name in WRITERS]
                for writer in writers:
                    self.after(writer, self.erased)
            if self.add is not None and self.add[0] == number:
                self.before(layer, lambda x: x + self.add[1][:, None])

    def __exit__(self, *error):
        self.stack.close()

    def erased(self, x):
        if self.positions is None:
            return erase(x, self.ablate)
        x = x.clone()
        for position in self.positions:
            x[:, position] = erase(x[:, position, None], self.ablate)[:, 0]
        return x

    def before(self, module, change):
        def hook(module, args, kwargs):
            if args:
                return (self.changed(args[0], change), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self.changed(kwargs["hidden_states"], change)}
        self.stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module, change):
        def hook(module, args, output):
            if isinstance(output, tuple):
                return (self.changed(output[0], change), *output[1:])
            return self.changed(output, change)
        self.stack.callback(module.register_forward_hook(hook).remove)

    def changed(self, x, change):
        return x if self.prompt_only and x.shape[1] == 1 else change(x)


def plain_logits(model, prompts, **hooks):
    """Logits at the last token, [n_prompts, vocab], of the plain twin of a ChatModel."""
    plain, _ = plain_model(model.name)
    with Hooks(plain, **hooks):
        return plain(**encoded(model, prompts)).logits[:, -1]


def plain_tokens(model, prompts, n=6, **hooks):
    """The ids that plain transformers generates after the prompts."""
    inputs, (plain, _) = encoded(model, prompts), plain_model(model.name)
    with Hooks(plain, **hooks):
        ids = plain.generate(**inputs, max_new_tokens=n, do_sample=False)
    return ids[:, inputs["input_ids"].shape[1]:].tolist()


def plain_streams(model, prompts, positions):
    """What enters each layer, one prompt at a time: [n_prompts, n_layers, n_positions, d_model]."""
    plain, _ = plain_model(model.name)
    streams = []
    for prompt in prompts:
        with ExitStack() as stack:
            entered = []
            for layer in decoder(plain).layers:
                hook = layer.register_forward_pre_hook(
                    lambda layer, args, kwargs, entered=entered:
                        entered.append((args[0] if args else kwargs["hidden_states"])[0, positions]), with_kwargs=True)
                stack.callback(hook.remove)
            plain(**encoded(model, [prompt]))
        streams.append(torch.stack(entered))
    return torch.stack(streams)


def plain_metric(logits, refusal_tokens):
    """log P/(1 - P), P being the probability of all refusal tokens -> [n_prompts]"""
    refusal = logits.double().softmax(dim=-1)[:, refusal_tokens].sum(dim=-1)
    return refusal.log() - (1 - refusal).log()


def plain_scores(model, candidates, harmful, harmless):
    """bypass, induce, kl of each candidate by itself -> [3, n_layers, n_positions]

    A candidate of length zero changes nothing.
    """
    def metric(prompts, **hooks):
        return plain_metric(plain_logits(model, prompts, **hooks), model.refusal_tokens).mean()

    def distribution(**hooks):
        return torch.distributions.Categorical(logits=plain_logits(model, harmless, **hooks).double())

    scores = torch.zeros(3, *candidates.shape[:2], dtype=torch.float64)
    for layer, index in torch.cartesian_prod(*map(torch.arange, candidates.shape[:2])).tolist():
        vector = candidates[layer, index]
        if vector.norm() < 1e-5:
            scores[:, layer, index] = torch.tensor([metric(harmful), metric(harmless), 0])
            continue
        kl = torch.distributions.kl_divergence(
            distribution(), distribution(ablate=vector.expand(len(harmless), -1))).mean()
        scores[:, layer, index] = torch.stack([
            metric(harmful, ablate=vector.expand(len(harmful), -1)),
            metric(harmless, add=(layer, vector.expand(len(harmless), -1))), kl])
    return scores


def plain_selection(scores, max_kl, min_induce, max_layer=0.8):
    """The paper's rule, read aloud: of [3, n_layers, n_positions], the (layer, index) that is selected."""
    _, n_layers, n_positions = scores.shape
    best, lowest = None, float("inf")
    for layer in range(n_layers):
        for index in range(n_positions):
            bypass, induce, kl = scores[:, layer, index].tolist()
            if kl < max_kl and induce > min_induce and layer < max_layer * n_layers and bypass < lowest:
                best, lowest = (layer, index), bypass
    return best
