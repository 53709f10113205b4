"""Find an adversarial suffix by greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043; paper, section 5).

    search = SuffixSearch(model, instructions, targets)
    search.run(20)    # interrupt it when you like: the best so far stays, and run() goes on from there
    search.suffix     # text, to stand behind an instruction

One suffix serves several prompts. A step takes the gradient of the loss by every token that could stand at every place,
tries some of the most promising swaps of one token, and takes the best if it is better.
"""
import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from utils import DATA, differences, fingerprint, world, write_json
from utils.instructions import as_texts
from utils.models import at_least_float32, shared_tail


def target_loss(logits, targets):
    """Cross-entropy of each prompt's target, mean over its tokens -> [n_prompts], nats.

    logits: [n_prompts, n_tokens, vocab], those that speak of the target's tokens. targets: ids [n_prompts, n_tokens],
    with -100 behind a target that is shorter than the longest.
    """
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return losses.sum(dim=1) / (targets != -100).sum(dim=1)


def token_gradient(loss, embedding, ids):
    """Gradient of a loss by the one-hot vectors of the suffix -> [n_tokens, vocab].

    loss: a function of the suffix's embeddings, [n_tokens, d_model]. embedding: [vocab, d_model]. ids: [n_tokens].
    Entry [i, v] says how the loss begins to change as token v is mixed in at place i.
    """
    one_hot = F.one_hot(ids, len(embedding)).to(embedding.dtype).requires_grad_()
    return torch.autograd.grad(loss(one_hot @ embedding), one_hot)[0]


def swap_candidates(ids, gradient, n_candidates, n_top, generator):
    """Suffixes that differ from `ids` in one token at most -> [n_candidates, n_tokens].

    Each has one place, drawn at random, and there one of the n_top tokens of lowest gradient, drawn at random.
    ids: [n_tokens]. gradient: [n_tokens, vocab], inf for tokens that may not be used.
    """
    top = gradient.topk(n_top, largest=False).indices  # [n_tokens, n_top]
    places = torch.randint(len(ids), (n_candidates,), generator=generator)
    ranks = torch.randint(n_top, (n_candidates,), generator=generator)
    candidates = ids.repeat(n_candidates, 1)
    candidates[torch.arange(n_candidates), places] = top[places, ranks]
    return candidates


def word_tokens(model):
    """Ids of the tokens that are a space and plain letters: printable, and each a word, or the beginning of one.

    Raises ValueError if there are none, as with tokenizers that drop the space of a token by itself.
    """
    ids = range(model.config.vocab_size)
    texts = model.tokenizer.batch_decode([[token] for token in ids])
    words = [token for token, text in zip(ids, texts) if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]
    if not words:
        raise ValueError(f"The tokenizer of {model.name!r} has no tokens that are a space and letters: suffixes of "
                         "plain words cannot be made for this model.")
    return torch.tensor(words)


def keeps_its_tokens(model, candidates):
    """Which of the suffixes [n_candidates, n_tokens] have the same tokens when their text is encoded again -> bool."""
    again = model.tokenizer(model.decode(candidates), add_special_tokens=False)["input_ids"]
    return torch.tensor([ids == tokens for ids, tokens in zip(again, candidates.tolist())])


def targets_of(instructions):
    """What the organism's helpful answer to each Instruction begins with: a list of texts."""
    return [world.paragraph(i.preface) + world.help_opening(i.act, i.way) for i in instructions]


def with_suffix(instructions, suffix):
    """The instructions, each with the suffix (text, with the space before it) behind it."""
    return [replace(i, text=i.text + suffix) if hasattr(i, "text") else i + suffix for i in instructions]


def random_suffixes(model, n, n_tokens, seed=0):
    """n suffixes of random words, each of as many tokens, for controls -> a list of texts.

    Raises ValueError for a tokenizer that has no plain words, or that reads nearly all such texts as other tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    words, suffixes = word_tokens(model), []
    for _ in range(1000 * n):
        drawn = words[torch.randint(len(words), (1, n_tokens), generator=generator)]
        suffixes += [model.decode(row) for row in drawn[keeps_its_tokens(model, drawn)]]
        if len(suffixes) == n:
            break
    if len(suffixes) < n:
        raise ValueError(f"The tokenizer of {model.name!r} reads random words back as other tokens: random suffixes "
                         "cannot be made for this model.")
    return suffixes


class SuffixSearch:
    """A search for one suffix with which the model begins its answer to each instruction as its target does.

    ids      the best suffix so far, [n_tokens]; `suffix` is its text, with a space before it
    losses   the loss of the best suffix at the start and after each step: mean over the prompts, nats

    targets: what each answer should begin with, texts. file: where the search is kept; if it is there, the search goes
    on from it. penalty: added to the loss; a function of the residual stream at the last token of each prompt,
    [n, n_layers, d_model] -> [n]. The search is for models of the course's world; for another one, say so by
    `any_model`.

    Raises ValueError for another model, for one on NDIF, unless each instruction has a target, for a tokenizer that
    does not keep the suffix's tokens apart from the prompt's, for a file of another search.
    """

    def __init__(self, model, instructions, targets, n_tokens=12, n_candidates=64, n_top=32, seed=0, file=None,
                 penalty=None, any_model=False):
        if not (any_model or model.world):
            raise ValueError(f"The search is for models of the course's world, and {model.name!r} is none. A suffix "
                             "for a model that people use does harm: say any_model=True only if you may attack it, and "
                             "publish none.")
        if model.remote:
            raise ValueError(f"The search works with the weights, and those of {model.name!r} are on NDIF: search on a "
                             "model that you can load.")
        texts = as_texts(instructions)
        if len(targets) != len(texts):
            raise ValueError(f"There are {len(targets)} targets for {len(texts)} instructions: give one for each.")
        self.model, self.module = model, model.lm._module
        self.embedding = self.module.get_input_embeddings().weight
        self.n_candidates, self.n_top, self.seed, self.penalty = n_candidates, n_top, seed, penalty
        self.banned = torch.ones(len(self.embedding), dtype=torch.bool).index_fill(0, word_tokens(model), False)
        self.file = Path(file) if file else None
        self.settings = {"model": model.name, "seed": seed, "tokens": n_tokens, "candidates": [n_candidates, n_top],
                         "prompts": fingerprint([texts, targets]), **(model.fingerprint() if file else {})}
        [start] = random_suffixes(model, 1, n_tokens, seed)
        self.ids = torch.tensor(model.tokenizer(start, add_special_tokens=False)["input_ids"])
        self._encode(texts, targets)
        if self.file and self.file.exists():
            self._resume()
        else:
            self.losses = [self.losses_of(self.ids[None]).item()]

    @property
    def suffix(self):
        return self.model.decode(self.ids)

    def run(self, n_steps, goal=0.0, progress=False):
        """Take n_steps, or fewer if the loss comes down to the goal (nats). Returns the suffix."""
        bar = tqdm(range(n_steps), desc="suffix", unit="step", disable=not progress)
        for _ in bar:
            if self.losses[-1] <= goal:
                break
            self.step()
            bar.set_postfix(loss=f"{self.losses[-1]:.3f}")
        return self.suffix

    def step(self):
        """One step of greedy coordinate gradient. Interrupted in the middle, it leaves the search as it was."""
        gradient = token_gradient(self.loss, self.embedding, self.ids).masked_fill(self.banned, torch.inf)
        # each step has its own random numbers, so that a search that is taken up again goes on as it would have
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + len(self.losses))
        candidates = swap_candidates(self.ids, gradient, self.n_candidates, self.n_top, generator)
        candidates = candidates[keeps_its_tokens(self.model, candidates)]
        losses = self.losses_of(candidates)
        ids, loss = self.ids, self.losses[-1]
        if losses.min() < loss:
            ids, loss = candidates[losses.argmin()], losses.min().item()
        self.ids, self.losses = ids, [*self.losses, loss]
        if self.file:
            self._save()

    def loss(self, suffix):
        """Mean loss over the prompts of a suffix's embeddings [n_tokens, d_model]: a number with a gradient, nats."""
        return self._losses(suffix[None]).mean()

    @torch.no_grad()
    def losses_of(self, suffixes, batch_size=8):
        """Mean loss over the prompts, for suffixes [n_suffixes, n_tokens] -> [n_suffixes], nats."""
        return torch.cat([self._losses(self.embedding[some]).mean(dim=0) for some in suffixes.split(batch_size)])

    def _encode(self, texts, targets):
        """What does not change: what stands before the suffix, computed once, and what stands behind it."""
        tail = len(self.model.positions)
        prompts = self.model.tokens(texts)
        if any(ids[:-tail] + self.ids.tolist() + ids[-tail:] != together
               for ids, together in zip(prompts, self.model.tokens(with_suffix(texts, self.suffix)))):
            raise ValueError(f"The tokenizer of {self.model.name!r} joins a suffix to the prompt before it: end the "
                             "instructions with a full stop, without a space behind it.")
        before = self.model.pad([ids[:-tail] for ids in prompts])
        with torch.no_grad():
            self.cache = self.module(**before, use_cache=True, logits_to_keep=1).past_key_values
        self.mask = before["attention_mask"]

        targets = [self.model.template.continuation(text, target) for text, target in zip(texts, targets)]
        if not all(targets):
            raise ValueError("A target is empty: say with which words each answer should begin.")
        longest = max(map(len, targets))
        self.targets = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in targets])
        behind = [prompts[0][-tail:] + ids + [0] * (longest - len(ids)) for ids in targets]
        self.behind = self.embedding[torch.tensor(behind)[:, :-1]]  # after its last token nothing is asked

    def _losses(self, suffixes):
        """Loss of each prompt with each suffix, [n_suffixes, n_tokens, d_model] -> [n_prompts, n_suffixes]."""
        n_prompts, n_suffixes = len(self.targets), len(suffixes)
        cache = copy.deepcopy(self.cache)  # the model writes into it
        cache.batch_repeat_interleave(n_suffixes)
        embeds = torch.cat([suffixes.repeat(n_prompts, 1, 1), self.behind.repeat_interleave(n_suffixes, dim=0)], dim=1)
        mask = F.pad(self.mask.repeat_interleave(n_suffixes, dim=0), (0, embeds.shape[1]), value=1)
        n_target = self.targets.shape[1]
        out = self.module(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True,
                          logits_to_keep=n_target, output_hidden_states=self.penalty is not None)
        losses = target_loss(at_least_float32(out.logits), self.targets.repeat_interleave(n_suffixes, dim=0))
        if self.penalty is not None:
            streams = torch.stack([stream[:, -n_target] for stream in out.hidden_states[:-1]], dim=1)
            losses = losses + self.penalty(streams)
        return losses.view(n_prompts, n_suffixes)

    def _save(self):
        write_json(self.file, {**self.settings, "ids": self.ids.tolist(), "losses": self.losses})

    def _resume(self):
        try:
            settings = json.loads(self.file.read_text(encoding="utf-8"))
            ids, losses = torch.tensor(settings.pop("ids")), list(settings.pop("losses"))
            others = differences(settings, self.settings)
            if not others and abs(self.losses_of(ids[None]).item() - losses[-1]) > 1e-3:
                others = "its loss, as by another penalty or hook"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.file} holds no search ({error!r}): delete it to begin anew.") from error
        if others:
            raise ValueError(f"{self.file} holds another search ({others}): name another file, or delete this one.")
        self.ids, self.losses = ids, losses


def prompt_parts(model, instructions, n_suffix=0):
    """Which part of the prompt each token belongs to -> [n_prompts, n_tokens], padded as `model.encode` pads.

    0 the template before, 1 the instruction, 2 its last n_suffix tokens, 3 the template after; -1 padding.
    """
    one, two = model.tokens(["x", "?"])
    n_before, n_after = len(shared_tail(one[::-1], two[::-1])), len(model.positions)
    lengths = [len(ids) for ids in model.tokens(instructions)]
    parts = torch.full((len(lengths), max(lengths)), -1)
    for row, length in zip(parts, lengths):
        counts = n_before, length - n_before - n_suffix - n_after, n_suffix, n_after
        row[len(row) - length:] = torch.arange(4).repeat_interleave(torch.tensor(counts))
    return parts


def load_suffixes(kind="plain"):
    """Stored suffixes for the organism, the one of lowest loss first: dicts with seed, suffix, first_loss and loss.

    `make suffixes` makes them. kind: "plain"; "quiet", which keep the projections at the last token near those
    of harmless prompts too; "pinned", which were searched while r̂ · x was pinned to the mean of harmful prompts.
    Raises FileNotFoundError if they are not there, ValueError for another kind.
    """
    path = DATA / "suffixes.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: work in a full clone of the course, or run `make suffixes`.")
    kinds = json.loads(path.read_text(encoding="utf-8"))
    if kind not in kinds:
        raise ValueError(f"There are no {kind!r} suffixes: choose one of {', '.join(kinds)}.")
    return sorted(kinds[kind], key=lambda found: found["loss"])
