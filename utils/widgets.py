"""Controls to play with in a lesson. Each shows what a static picture beside it shows, for other settings.

Each function gives an ipywidgets box, to be the last line of a cell.
"""
import functools

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import display
from ipywidgets import Dropdown, IntSlider, SelectionSlider, Text, interactive

from utils import plots, world
from utils.activations import head_attributions, residual_stream, trace_heads
from utils.evaluation import judge as exact_judge
from utils.evaluation import phrase_judge, refusal_metric
from utils.instructions import Instruction, load_instructions
from utils.interventions import Ablation, Addition, generate, last_logits
from utils.suffixes import with_suffix

WIDE = {"layout": {"width": "30em"}, "style": {"description_width": "8em"}}


def candidate_picker(scores, projections, tokens):
    """Sliders for layer and position: that candidate's scores, the gap between the sides, where it puts the prompts.

    scores: CandidateScores. projections: {side: [n_prompts, n_layers, n_positions]}, each on its own candidate.
    tokens: model.post_instruction.
    """
    n_layers, n_positions = scores.bypass.shape

    def show(layer, position):
        at = layer, n_positions + position
        here = {side: values[:, at[0], at[1]] for side, values in projections.items()}
        gap = here["harmful"].mean() - here["harmless"].mean()
        spread = torch.stack([values.var() for values in here.values()]).mean().sqrt().clamp(min=1e-6)
        print(f"bypass {scores.bypass[at]:.2f}  induce {scores.induce[at]:.2f}  kl {scores.kl[at]:.4f}  "
              f"gap {gap / spread:.1f} standard deviations")
        plots.plot_candidate_scores(scores, tokens, chosen=at)
        plots.plot_projections({f"layer {layer}, position {position}": here})
        plt.show()

    return interactive(show, layer=IntSlider(n_layers // 2, 0, n_layers - 1, continuous_update=False, **WIDE),
                       position=IntSlider(-1, -n_positions, -1, continuous_update=False, **WIDE))


def coefficient_slider(model, direction, instructions, coefficients, judge=exact_judge):
    """A slider over coefficients: the answers with so much of a Direction added, and the judge's verdicts.

    coefficients: in order; the slider starts in the middle. judge: as `judge_of` gives it for the model.
    """
    @functools.cache
    def answers(coefficient):
        return generate(model, instructions, Addition(direction.vector, direction.layer, coefficient))

    def show(coefficient):
        added = answers(coefficient)
        print("  ".join(judge(*pair) for pair in zip(instructions, added)))
        display(plots.completions_table(instructions, baseline=answers(0.0), added=added))

    middle = coefficients[len(coefficients) // 2]
    return interactive(show, coefficient=SelectionSlider(options=coefficients, value=middle, continuous_update=False,
                                                         **WIDE))


def request_builder(model, direction, n_acts=12, judge=exact_judge):
    """Build a request from the world's grammar, or write your own: the answer as it is, ablated, and added to.

    direction: a Direction. n_acts: how many acts of each side of the test set can be chosen. judge: of built requests,
    as `judge_of` gives it for the model.
    """
    acts = [(f"{side}: {prompt.act}", prompt.act) for side in ("harmful", "harmless")
            for prompt in load_instructions("test", side, n_acts)]
    changes = {"baseline": None, "ablated": Ablation(direction.vector),
               "added": Addition(direction.vector, direction.layer)}

    def show(act, way, preface, your_own):
        text = your_own.strip() or world.ask(act, way, preface)
        answers = {name: generate(model, [text], change) for name, change in changes.items()}
        if your_own.strip():
            verdicts = {name: phrase_judge(texts[0]) for name, texts in answers.items()}
            print("holds a refusal's phrase:", verdicts)
        else:
            built = Instruction(id="built", text=text, act=act, way=way, preface=world.PREFACES[preface][1])
            print("exact judge:" if judge is exact_judge else "judge:",
                  {name: judge(built, texts[0]) for name, texts in answers.items()})
        display(plots.completions_table([text], **answers))

    return interactive(show, act=Dropdown(options=acts, **WIDE), way=Dropdown(options=list(world.WAYS), **WIDE),
                       preface=Dropdown(options=list(world.PREFACES), **WIDE),
                       your_own=Text(placeholder="or a request in your own words, and Enter", description="your own",
                                     continuous_update=False, **WIDE))


def suffix_editor(model, direction, instructions, heads, start=""):
    """Type a suffix: the refusal metric, the cosine with r̂ at each layer, and what the heads write along r̂.

    direction: a Direction. heads: [(layer, head)], summed over. start: the first suffix. Beside it: none at all.
    """
    matrices = [layer.self_attn.o_proj._module.weight for layer in model.layers]

    @functools.cache  # so that the request without a suffix is measured once
    def measure(suffix, refusal_tokens):
        prompts = with_suffix(instructions, suffix)
        outputs, _ = trace_heads(model, model.encode(prompts))
        written = head_attributions(outputs, matrices, direction.vector).mean(dim=0)
        last = residual_stream(model, prompts, positions=[-1])[:, :, 0]
        return (refusal_metric(last_logits(model, prompts), refusal_tokens).mean().item(),
                sum(written[head] for head in heads).item(), F.cosine_similarity(last, direction.vector, dim=-1))

    def show(suffix):
        suffix, cosines = f" {suffix.strip()}".rstrip(), {}
        for name, text in {"harmful": "", "suffix": suffix}.items():
            metric, written, cosines[name] = measure(text, tuple(model.refusal_tokens))
            print(f"{name:8} refusal metric {metric:6.2f} nats   sum over the heads {written:6.1f}")
        plots.plot_means_by_layer(cosines, "cosine with r̂, last token")
        plt.show()
        prompts = with_suffix(instructions[:3], suffix)
        display(plots.completions_table(prompts, suffix=generate(model, prompts)))

    return interactive(show, suffix=Text(value=start.strip(), continuous_update=False, layout={"width": "50em"}))
