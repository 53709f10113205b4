"""The course's pictures. Colours mean the same in every one, and are told apart by colour-blind readers (Okabe, Ito)."""
from html import escape

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML
from matplotlib.patches import Rectangle

COLORS = {
    "harmful": "#D55E00", "harmless": "#0072B2", "baseline": "#000000", "ablated": "#009E73", "added": "#CC79A7",
    "random": "#999999", "suffix": "#E69F00", "orthogonalized": "#56B4E9",
}
SCORE_TITLES = {"bypass": "bypass: refusal metric, harmful,\nablated (nats; lower is better)",
                "induce": "induce: refusal metric, harmless,\nadded (nats; above 0)",
                "kl": "KL on harmless, ablated\n(nats; below 0.1)"}


def show_token(token):
    """A token as a label: its line breaks and spaces made visible."""
    return token.replace("\n", "\\n").replace(" ", "␣")


def plot_candidate_scores(scores, tokens, chosen=None):
    """Three heatmaps, layer x position, of a CandidateScores; dots mark candidates that pass, a frame the chosen one.

    tokens: model.post_instruction. chosen: (layer, position index), as `select_direction` gives. Returns the Figure.
    """
    figure, axes = plt.subplots(1, 3, figsize=(9, 4.2), sharey=True, layout="constrained")
    passing = scores.passing().nonzero().tolist()
    for axis, (name, title) in zip(axes, SCORE_TITLES.items()):
        values = getattr(scores, name)
        if name == "kl":  # spans orders of magnitude
            image = axis.imshow(values.clamp(min=1e-5), aspect="auto", origin="lower", cmap="viridis", norm="log")
        else:  # signed: white is 0, where refusing and answering are equally likely
            limit = float(values.abs().max()) or 1.0
            image = axis.imshow(values, aspect="auto", origin="lower", cmap="PuOr", vmin=-limit, vmax=limit)
        figure.colorbar(image, ax=axis, shrink=0.8)
        for layer, index in passing:
            axis.plot(index, layer, "o", color="white", markeredgecolor="black", markersize=5)
        if chosen is not None:
            axis.add_patch(Rectangle((chosen[1] - 0.5, chosen[0] - 0.5), 1, 1, fill=False, edgecolor="black", lw=2.5))
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(tokens)), [show_token(token) for token in tokens], rotation=90, fontsize=8)
        axis.set_xlabel("token after the instruction")
    axes[0].set_yticks(range(len(scores.bypass)))
    axes[0].set_ylabel("layer")
    return figure


def plot_rates(rates, title="", ylabel="refusal (%)", axis=None):
    """Bars of Rates with their 95% intervals. Returns the Axes.

    rates: {condition: Rate}, or {group: {condition: Rate}} for groups of bars; a condition named in COLORS has its colour.
    """
    grouped = all(isinstance(value, dict) for value in rates.values())
    groups = rates if grouped else {"": rates}
    axis = axis or plt.subplots(figsize=(7, 4), layout="constrained")[1]
    labelled, ticks, x = set(), {}, 0
    for group, bars in groups.items():
        if grouped:
            ticks[x + (len(bars) - 1) / 2] = group
        for condition, rate in bars.items():
            low, high = rate.interval
            axis.bar(x, 100 * rate.value, color=COLORS.get(condition, COLORS["random"]), width=0.85,
                     label=None if condition in labelled or not grouped else condition)
            axis.errorbar(x, 50 * (low + high), yerr=50 * (high - low), fmt="none", ecolor="dimgrey", capsize=4)
            labelled.add(condition)
            if not grouped:
                ticks[x] = condition
            x += 1
        x += 1
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set(ylim=(0, 105), ylabel=ylabel, title=title)
    if grouped:
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axis.spines[["top", "right"]].set_visible(False)
    return axis


def completions_table(instructions, **columns):
    """Completions side by side, as an HTML table: a row for each instruction, a column for each named list of texts.

        completions_table(prompts, baseline=before, ablated=after)
    """
    for name, texts in columns.items():
        if len(texts) != len(instructions):
            raise ValueError(f"Column {name!r} has {len(texts)} texts for {len(instructions)} instructions: give one each.")
    style = "text-align:left;vertical-align:top;padding:4px 10px;max-width:24em;white-space:pre-wrap"
    head = "".join(f'<th style="{style};border-bottom:3px solid {COLORS.get(name, COLORS["random"])}">{escape(name)}</th>'
                   for name in ("instruction", *columns))
    body = ""
    for instruction, *texts in zip(instructions, *columns.values()):
        cells = (getattr(instruction, "text", instruction), *texts)
        body += "<tr>" + "".join(f'<td style="{style}">{escape(cell)}</td>' for cell in cells) + "</tr>"
    return HTML(f"<table><tr>{head}</tr>{body}</table>")


def token_strip(tokens, values, limit=None):
    """Tokens in a line, coloured by value: orange above 0, blue below, white at 0; the value shows under the mouse.

    tokens: list of strings. values: one number for each. limit: the value of full colour; the largest, by default.
    """
    values = torch.as_tensor(values, dtype=torch.float32).tolist()
    if len(values) != len(tokens):
        raise ValueError(f"There are {len(values)} values for {len(tokens)} tokens: give one each.")
    limit = limit or max(map(abs, values), default=0) or 1.0
    spans = ""
    for token, value in zip(tokens, values):
        color = COLORS["harmful"] if value > 0 else COLORS["harmless"]
        alpha = round(255 * 0.75 * min(1, abs(value) / limit))
        spans += (f'<span title="{value:.3f}" style="background:{color}{alpha:02x};padding:2px 3px;margin:1px;'
                  f'border-radius:3px;display:inline-block">{escape(show_token(token))}</span>')
    return HTML(f'<div style="font-family:monospace;line-height:1.9">{spans}</div>')
