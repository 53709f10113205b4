"""The course's pictures. A condition has the same colour in all of them, and no two look alike to the
colour-blind (Okabe and Ito's palette, with greys)."""
from html import escape

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML
from matplotlib.patches import Rectangle

COLORS = {
    "harmful": "#D55E00", "harmless": "#0072B2", "baseline": "#555555", "ablated": "#009E73",
    "added": "#CC79A7", "random": "#BBBBBB", "suffix": "#E69F00", "orthogonalized": "#56B4E9",
}


def show_token(token):
    """A token as a label, its line breaks and spaces made visible."""
    return token.replace("\n", "\\n").replace(" ", "␣")


def plot_candidate_scores(scores, tokens, chosen=None):
    """Heatmaps of CandidateScores, layer x position; dots where the filters are passed, a frame on the choice.

    tokens: model.post_instruction. chosen: (layer, position index), from `select_direction`.
    Returns the Figure.
    """
    figure, axes = plt.subplots(1, 3, figsize=(8, 4.2), sharey=True, layout="constrained")
    _heatmap(axes[0], scores.bypass, "bypass\nrefusal metric (nats)\nharmful, ablated: want low")
    _heatmap(axes[1], scores.induce, "induce\nrefusal metric (nats)\nharmless, added: want > 0")
    _heatmap(axes[2], scores.kl, "kl\nKL divergence (nats)\nharmless, ablated: want < 0.1", signed=False)
    for axis in axes:
        for layer, index in scores.passing().nonzero().tolist():
            axis.plot(index, layer, "o", color="white", markeredgecolor="black", markersize=5)
        if chosen is not None:
            corner = (chosen[1] - 0.5, chosen[0] - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=2.5))
        axis.set_xticks(range(len(tokens)), map(show_token, tokens), rotation=90, fontsize=8)
    axes[1].set_xlabel("token after the instruction")
    axes[0].set_ylabel("layer")
    return figure


def plot_rates(rates, title="", ylabel="refusal (%)", axis=None):
    """Bars of Rates in per cent, with their 95% intervals. Returns the Axes.

    rates: {condition: Rate}, or {group: {condition: Rate}} for groups of bars. A condition in COLORS has
    its colour.
    """
    axis = axis or plt.subplots(figsize=(7, 4), layout="constrained")[1]
    grouped = all(isinstance(bars, dict) for bars in rates.values())
    ticks, drawn, start = {}, set(), 0
    for group, bars in rates.items() if grouped else [("", rates)]:
        places = range(start, start + len(bars))
        for place, (condition, rate) in zip(places, bars.items()):
            low, high = rate.interval
            axis.bar(place, 100 * rate.value, width=0.8, color=COLORS.get(condition, COLORS["random"]),
                     label=None if condition in drawn else condition)
            axis.errorbar(place, 50 * (low + high), yerr=50 * (high - low), color="black", capsize=4)
            drawn.add(condition)
        ticks.update({start + (len(bars) - 1) / 2: group} if grouped else zip(places, bars))
        start += len(bars) + 1
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set(ylim=(0, 105), ylabel=ylabel, title=title)
    axis.spines[["top", "right"]].set_visible(False)
    if grouped:
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return axis


def completions_table(instructions, **columns):
    """Answers side by side, an HTML table: a row for each instruction, a column for each named list of texts.

        completions_table(prompts, baseline=before, ablated=after)
    """
    for name, texts in columns.items():
        if len(texts) != len(instructions):
            raise ValueError(f"Column {name!r} has {len(texts)} texts for {len(instructions)} instructions: "
                             "give one for each.")
    columns = {"instruction": [getattr(i, "text", i) for i in instructions], **columns}
    style = "text-align:left;vertical-align:top;padding:4px 10px;max-width:26em;white-space:pre-wrap"
    colors = [COLORS.get(name, COLORS["random"]) for name in columns]
    head = [f'<th style="{style};border-bottom:3px solid {color}">{escape(name)}</th>'
            for name, color in zip(columns, colors)]
    rows = [[f'<td style="{style}">{escape(text)}</td>' for text in row] for row in zip(*columns.values())]
    return HTML("<table>" + "".join(f"<tr>{''.join(cells)}</tr>" for cells in [head, *rows]) + "</table>")


def token_strip(tokens, values, limit=None):
    """Tokens in a line, orange where the value is above 0, blue where below; hover for the value. HTML.

    tokens: list of strings. values: one number each. limit: which value has full colour; default, the largest.
    """
    values = torch.as_tensor(values, dtype=torch.float32).tolist()
    if len(values) != len(tokens):
        raise ValueError(f"There are {len(values)} values for {len(tokens)} tokens: give one for each.")
    limit = limit or max(map(abs, values), default=0) or 1.0
    spans = []
    for token, value in zip(tokens, values):
        color = COLORS["harmful"] if value > 0 else COLORS["harmless"]
        opacity = round(190 * min(1, abs(value) / limit))  # of 255, so that black letters stay readable
        style = f"background:{color}{opacity:02x};padding:2px 3px;margin:1px;display:inline-block"
        spans.append(f'<span title="{value:.3f}" style="{style}">{escape(show_token(token))}</span>')
    return HTML(f'<div style="font-family:monospace;line-height:1.9">{"".join(spans)}</div>')


def _heatmap(axis, values, title, signed=True):
    """One score [n_layers, n_positions]: signed ones are white at 0, others on a logarithmic scale."""
    limit = values.abs().max().item() or 1.0
    colours = dict(cmap="PuOr_r", vmin=-limit, vmax=limit) if signed else dict(cmap="viridis", norm="log")
    image = axis.imshow(values if signed else values.clamp(min=1e-5), aspect="auto", origin="lower", **colours)
    axis.figure.colorbar(image, ax=axis)
    axis.set_title(title, fontsize=9)
    axis.set_yticks(range(len(values)))
