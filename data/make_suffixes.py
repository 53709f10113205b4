"""Search for adversarial suffixes, for the organism alone. `make suffixes` runs this.

Interrupt it when you like: run again, it goes on where it was.
"""
import json
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F

from utils.activations import residual_stream
from utils.directions import difference_in_means, find_direction
from utils.instructions import SIDES, load_instructions
from utils.interventions import set_projection
from utils.models import load_model
from utils.suffixes import SuffixSearch, targets_of

HERE = Path(__file__).parent
STEPS, N_PROMPTS, N_TOKENS = 40, 12, 12
SEEDS = {"plain": range(6), "quiet": range(2), "pinned": range(2)}


@contextmanager
def pinned(model, direction, level):
    """Within the block, the projection on r̂ is at this level at every token of the direction's layer."""
    def hold(layer, args):
        x, *others = args
        return set_projection(x, direction.vector, torch.full(x.shape[1:2], level)), *others

    hook = model.layers[direction.layer]._module.register_forward_pre_hook(hold)
    try:
        yield
    finally:
        hook.remove()


def make(model, direction, unfinished):
    """{kind: [{"seed", "suffix", "first_loss", "loss"}]}: what was found, each kept in a file until all are done."""
    searched = load_instructions("train", "harmful", n=N_PROMPTS, seed=0)
    harmful, harmless = (residual_stream(model, load_instructions("train", side), positions=[-1])[:, :, 0]
                         for side in ("harmful", "harmless"))
    units = F.normalize(difference_in_means(harmful, harmless), dim=-1)  # [n_layers, d_model]
    limits = (harmless * units).sum(dim=-1).mean(dim=0)  # where harmless prompts are, [n_layers]
    level = (harmful[:, direction.layer] @ direction.unit).mean().item()

    def loud(streams):
        """How far above the harmless mean the projections are, averaged over the layers, in units of 20."""
        return ((streams * units).sum(dim=-1) - limits).clamp(min=0).mean(dim=-1) / 20

    kinds = {}
    for kind, seeds in SEEDS.items():
        kinds[kind] = []
        for seed in seeds:
            with pinned(model, direction, level) if kind == "pinned" else nullcontext():
                search = SuffixSearch(
                    model, searched, targets_of(searched), N_TOKENS, seed=seed, file=unfinished / f"{kind}-{seed}.json",
                    penalty=loud if kind == "quiet" else None)
                search.run(STEPS + 1 - len(search.losses), progress=True)
            kinds[kind].append({"seed": seed, "suffix": search.suffix, "first_loss": round(search.losses[0], 4),
                                "loss": round(search.losses[-1], 4)})
            print(kinds[kind][-1], flush=True)
    return kinds


def main():
    model = load_model("organism")
    train, val = ({side: load_instructions(split, side) for side in SIDES} for split in ("train", "val"))
    direction, _ = find_direction(model, train, val)
    unfinished = HERE / "unfinished-suffixes"
    unfinished.mkdir(exist_ok=True)
    kinds = make(model, direction, unfinished)
    (HERE / "suffixes.json").write_text(json.dumps(kinds, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(unfinished)


if __name__ == "__main__":
    main()
