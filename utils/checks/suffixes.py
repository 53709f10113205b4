"""Checks of the exercises on adversarial suffixes."""
import torch
import torch.nn.functional as F

from utils import suffixes
from utils.checks import register


def planted_targets():
    """Logits and targets of three prompts, the second with a shorter target."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([[1, 4, 2], [3, 0, -100], [2, 2, 1]])
    return 3 * torch.randn(3, 3, 6, generator=generator), targets


def token_losses(logits, targets):
    return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")


register(
    suffixes.target_loss,
    cases=lambda: [planted_targets(), tuple(x[:1] for x in planted_targets())],
    axes="[n_prompts]",
    mistakes={
        "a shorter target is divided by the length of the longest. Divide by how many of its tokens are not -100.":
            lambda logits, targets: token_losses(logits, targets).mean(dim=1),
        "this is the sum over the tokens: a long target would count more. Divide by how many there are.":
            lambda logits, targets: token_losses(logits, targets).sum(dim=1),
        "the -100 count as token 0. Leave them out: ignore_index=-100.":
            lambda logits, targets: token_losses(logits, targets.clamp(min=0)).mean(dim=1),
        "this is one number for all prompts. Keep one for each: reduction=\"none\".":
            lambda logits, targets: token_losses(logits, targets).sum() / (targets != -100).sum(),
        "the sign is flipped: a loss is low where the target is likely.":
            lambda logits, targets: -suffixes.target_loss(logits, targets),
    },
)


def planted_loss(suffix):
    """A loss of a suffix's embeddings [n_tokens, d_model] in which every place counts differently."""
    weights = torch.arange(1.0, suffix.shape[0] + 1)[:, None]
    return (weights * suffix).sin().sum() + (suffix[:-1] * suffix[1:]).sum()


def planted_suffix():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 4, generator=generator), torch.tensor([2, 5, 2])


def gradient_of_embeddings(loss, embedding, ids):
    rows = embedding[ids].requires_grad_()
    return torch.autograd.grad(loss(rows), rows)[0]


register(
    suffixes.token_gradient,
    cases=lambda: [(planted_loss, *planted_suffix())],
    axes="[n_tokens, vocab]",
    mistakes={
        "this is the gradient by the embeddings, [n_tokens, d_model]. Take it by the one-hot vectors.":
            gradient_of_embeddings,
        "the sign is flipped: the lowest entries should be the most promising.":
            lambda *args: -suffixes.token_gradient(*args),
        "this is the gradient by the table, in which equal tokens share a row. Take it by the one-hot vectors.":
            lambda loss, embedding, ids: torch.autograd.grad(
                loss(F.embedding(ids, embedding.requires_grad_())), embedding)[0],
        "this is the one-hot matrix itself. Take the gradient of the loss by it: torch.autograd.grad(...)[0].":
            lambda loss, embedding, ids: F.one_hot(ids, len(embedding)).float(),
        "torch.autograd.grad returns a tuple. Take its first entry: [0].":
            lambda *args: (suffixes.token_gradient(*args),),
    },
)


def planted_gradient():
    """A suffix of 5 tokens, and a gradient over 20 tokens of which the first three may not be used."""
    gradient = torch.randn(5, 20, generator=torch.Generator().manual_seed(2))
    return torch.tensor([3, 9, 12, 7, 3]), gradient.index_fill(1, torch.tensor([0, 1, 2]), torch.inf)


def swapped(ids, top, n_candidates, generator, ranks_first=False):
    """`swap_candidates` with these tokens to choose from, [n_tokens, n_top]."""
    draw = lambda n: torch.randint(n, (n_candidates,), generator=generator)
    if ranks_first:
        ranks, places = draw(top.shape[1]), draw(len(ids))
    else:
        places, ranks = draw(len(ids)), draw(top.shape[1])
    candidates = ids.repeat(n_candidates, 1)
    candidates[torch.arange(n_candidates), places] = top[places, ranks]
    return candidates


def swap_all(ids, gradient, n_candidates, n_top, generator):
    top = gradient.topk(n_top, largest=False).indices
    ranks = torch.randint(n_top, (n_candidates, len(ids)), generator=generator)
    return top[torch.arange(len(ids)), ranks]


register(
    suffixes.swap_candidates,
    cases=lambda: [(*planted_gradient(), 12, 4, 0), (*planted_gradient(), 30, 10, 1)],
    call=lambda function, ids, gradient, n_candidates, n_top, seed: function(
        ids, gradient, n_candidates, n_top, torch.Generator().manual_seed(seed)),
    axes="[n_candidates, n_tokens]",
    mistakes={
        "these are the tokens with the highest gradient, which make the loss rise. topk(..., largest=False).":
            lambda ids, gradient, n_candidates, n_top, generator: swapped(
                ids, gradient.topk(n_top).indices, n_candidates, generator),
        "every place is swapped. A candidate differs in one token only.":
            swap_all,
        "each place takes its very best token, so most candidates are the same. Draw one of the n_top.":
            lambda ids, gradient, n_candidates, n_top, generator: swapped(
                ids, gradient.argmin(dim=1)[:, None].expand(-1, n_top), n_candidates, generator),
        "draw the places first, then the ranks, so that the same seed gives the same candidates.":
            lambda ids, gradient, n_candidates, n_top, generator: swapped(
                ids, gradient.topk(n_top, largest=False).indices, n_candidates, generator, ranks_first=True),
        "these are the swaps, and not yet the suffixes: start from ids.repeat(n_candidates, 1).":
            lambda ids, *args: suffixes.swap_candidates(torch.zeros_like(ids), *args),
    },
)
