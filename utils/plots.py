"""The course's pictures. A condition has the same colour in all of them, and no two look alike to the
colour-blind (Okabe and Ito's palette, with greys)."""
from html import escape

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, Markdown
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

from utils.evaluation import bootstrap_mean

COLORS = {
    "harmful": "#D55E00", "harmless": "#0072B2", "baseline": "#555555", "ablated": "#009E73",
    "added": "#CC79A7", "random": "#BBBBBB", "suffix": "#E69F00", "orthogonalized": "#56B4E9",
    "shuffled": "#F0E442", "balanced": "#FFFFFF", "chosen": "#000000",
    "one layer": "#9FD8C6", "prompt only": "#CDE6A5", "subtracted": "#882255",
    "refusal": "#AA4499", "compliance": "#117733", "broken": "#999933",
    "probe": "#332288", "words": "#44AA99", "untrained": "#661100", "PCA": "#DDCC77", "means": "#1A1A1A",
    "one layer, last token": "#6699CC", "embeddings": "#88CCEE", "equal shadow": "#A0522D",
}

PLAIN = "mathjax_ignore tex2jax_ignore"  # classes of HTML in which notebooks set no formulas between two `$`


def show_token(token):
    """A token with its spaces, line breaks and whatever else leaves no ink made visible."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in token).replace(" ", "␣")


def as_label(text):
    """Any text, so that a picture shows it as it is: a `$` begins no formula, and a legend lists it.

    What the pictures' font lacks is written by its code.
    """
    font = get_font(findfont(FontProperties()))
    drawn = "".join(letter if letter == "\n" or font.get_char_index(ord(letter)) else ascii(letter)[1:-1]
                    for letter in str(text))
    hidden = drawn.startswith("_")  # matplotlib's legends leave such names out
    return " " * hidden + drawn.replace("$", r"\$")


def _labels(texts):
    return [as_label(text) for text in texts]


def plot_candidate_scores(scores, tokens, chosen=None):
    """Heatmaps of CandidateScores, layer x position; dots where the filters are passed, a frame on the choice.

    Grey where no score was computed.

    tokens: model.post_instruction. chosen: (layer, position index), from `select_direction`.
    Returns the Figure.
    """
    figure, axes = plt.subplots(1, 3, figsize=(8, 4.2), sharey=True, layout="constrained")
    _heatmap(axes[0], scores.bypass, "bypass\nrefusal metric (nats)\nharmful, ablated: want low")
    _heatmap(axes[1], scores.induce, "induce\nrefusal metric (nats)\nharmless, added: want > 0")
    _heatmap(axes[2], scores.kl, "kl\nKL divergence (nats)\nharmless, ablated: want < 0.1", limit=0.1)
    for axis in axes:
        for layer, index in scores.passing().nonzero().tolist():
            axis.plot(index, layer, "o", color="white", markeredgecolor="black", markersize=5)
        if chosen is not None:
            _frame(axis, *chosen, linewidth=2.5)
        axis.set_xticks(range(len(tokens)), _token_ticks(tokens), rotation=90, fontsize=8)
    axes[1].set_xlabel("token after the instruction, and its position")
    axes[0].set_ylabel("layer")
    return figure


def plot_grids(grids, tokens, label):
    """Layer x position in colour, with the numbers, a panel for each title. Returns the Figure.

    grids: {title: values [n_layers, n_positions]}, nan where there is none. tokens: model.post_instruction.
    """
    size = (1.5 + 3.4 * len(grids), 4.2)
    figure, axes = plt.subplots(1, len(grids), figsize=size, squeeze=False, sharey=True, layout="constrained")
    shown = torch.stack(list(grids.values()))
    low, high = shown[~shown.isnan()].aminmax()
    for axis, (title, values) in zip(axes[0], grids.items()):
        image = axis.imshow(values.numpy(), aspect="auto", origin="lower", cmap="viridis", vmin=low, vmax=high)
        for layer, index in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
            value = values[layer, index].item()
            axis.text(index, layer, "" if value != value else f"{value:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if value < (low + high) / 2 else "black")
        axis.set_xticks(range(len(tokens)), _token_ticks(tokens), rotation=90, fontsize=8)
        axis.set(title=as_label(title), yticks=_layer_ticks(len(values)),
                 xlabel="token after the instruction, and its position")
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0].tolist(), label=as_label(label), shrink=0.7)
    return figure


def plot_shadow(x, direction):
    """A vector in the plane, its shadow on the line of a direction, and what is left without it. Returns the Axes.

    x, direction: [2].
    """
    axis = plt.subplots(figsize=(6, 3.4), layout="constrained")[1]
    unit = direction / direction.norm()
    shadow = (x @ unit) * unit
    axis.axline((0, 0), unit.tolist(), color=COLORS["random"], linewidth=1)
    for foot in (shadow, x - shadow):
        axis.plot(*torch.stack([x, foot]).T.tolist(), ":", color=COLORS["baseline"], linewidth=1.5)
    arrows = {"x": (x, "baseline"), "its shadow: r̂ (r̂ · x)": (shadow, "harmful"), "r̂": (unit, "chosen"),
              "what is left: x′": (x - shadow, "ablated")}
    for label, (tip, condition) in arrows.items():
        axis.annotate("", tip.tolist(), (0, 0), arrowprops=dict(arrowstyle="-|>", color=COLORS[condition], linewidth=2))
        side, gap = ("left", 2) if tip[0] > 0 else ("right", -8)
        axis.annotate(label, tip.tolist(), xytext=(gap, -14 if label != "x" else 6), textcoords="offset points",
                      color=COLORS[condition], ha=side)
    corners = torch.stack([torch.zeros(2), x, unit, shadow, x - shadow])
    (left, bottom), (right, top) = corners.amin(dim=0).tolist(), corners.amax(dim=0).tolist()
    axis.set(aspect="equal", xlim=(left - 1, right + 1.4), ylim=(bottom - 0.5, top + 0.3))
    axis.axis("off")
    return axis


def plot_clouds(clouds):
    """Prompts as points, a panel for each title. Returns the Figure.

    clouds: {title: {condition: points [n_prompts, 2]}}. The axes have no unit of their own, so no ticks.
    """
    figure, axes = plt.subplots(1, len(clouds), figsize=(8, 3.2), squeeze=False, layout="constrained")
    for axis, (title, points) in zip(axes[0], clouds.items()):
        for condition, xy in points.items():
            axis.scatter(*xy.T, s=14, alpha=0.6, linewidths=0, label=as_label(condition),
                         color=COLORS.get(condition, COLORS["random"]))
        axis.set(title=as_label(title), xticks=[], yticks=[], xlabel="first component")
    axes[0, 0].set_ylabel("second component")
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_projections(projections, xlabel="projection on r̂"):
    """Histograms of one number per prompt, a panel for each title. Returns the Figure.

    projections: {title: {condition: values [n_prompts]}}
    """
    size = (2 + 2 * len(projections), 3)
    figure, axes = plt.subplots(1, len(projections), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, groups) in zip(axes[0], projections.items()):
        low, high = torch.cat(list(groups.values())).aminmax()
        bins = torch.linspace(low, high, 19).tolist()
        for condition, values in groups.items():
            axis.hist(values.tolist(), bins, alpha=0.7, label=as_label(condition),
                      color=COLORS.get(condition, COLORS["random"]))
        axis.set(title=as_label(title), xlabel=as_label(xlabel))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("prompts")
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_by_layer(values, tokens, ylabel, predicted=None):
    """A line over the layers for each position, light for the first token, dark for the last. Returns the Axes.

    values: [n_layers, n_positions]. tokens: model.post_instruction. predicted: a layer to mark, or None.
    """
    axis = plt.subplots(figsize=(7, 3.6), layout="constrained")[1]
    for index, token in enumerate(tokens):
        shade = plt.get_cmap("viridis_r")((index + 1) / len(tokens))
        label = as_label(f"{index - len(tokens)}  {show_token(token)}")
        axis.plot(range(len(values)), values[:, index].tolist(), marker="o", markersize=4, color=shade, label=label)
    if predicted is not None:
        axis.axvline(predicted, color=COLORS["baseline"], linestyle="--", label="your prediction")
    axis.set(xlabel="layer", ylabel=as_label(ylabel), xticks=range(len(values)))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), title="position", fontsize=9)
    return axis


def plot_cosines(cosines):
    """Tables of cosines in colour, a panel for each title. Returns the Figure.

    cosines: {title: (matrix [n, n], labels)}
    """
    figure, axes = plt.subplots(1, len(cosines), figsize=(8, 4), squeeze=False, layout="constrained")
    for axis, (title, (matrix, labels)) in zip(axes[0], cosines.items()):
        image = axis.imshow(matrix.numpy(), cmap="PuOr_r", vmin=-1, vmax=1)
        for row, column in torch.cartesian_prod(*map(torch.arange, matrix.shape)).tolist():
            value = matrix[row, column].item()
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8,
                      color="white" if abs(value) > 0.7 else "black")
        ticks = [as_label(show_token(str(label))) for label in labels]
        axis.set_xticks(range(len(ticks)), ticks, rotation=90 if max(map(len, ticks)) > 2 else 0, fontsize=8)
        axis.set_yticks(range(len(ticks)), ticks, fontsize=8)
        axis.set_title(as_label(title))
    figure.colorbar(image, ax=axes[0].tolist(), label="cosine", shrink=0.7)
    return figure


def plot_points(panels):
    """A point for each number and a bar at their mean, a column for each condition, a panel for each title.

    panels: {title: {condition: values}}. values: [n]; or (mean, low, high), as `bootstrap_mean` gives them, for a
    point with its interval. A dashed line carries the baseline's mean across its panel. Returns the Figure.
    """
    size = (2 + 2 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, columns) in zip(axes[0], panels.items()):
        for place, (condition, values) in enumerate(columns.items()):
            look = dict(color=COLORS.get(condition, COLORS["random"]), markeredgecolor="black", markeredgewidth=0.5)
            if isinstance(values, tuple):
                mean, low, high = values
                axis.errorbar(place, mean, [[mean - low], [high - mean]], fmt="D", capsize=5, ecolor="black", **look)
            else:
                spread = torch.linspace(-0.25, 0.25, len(values))  # side by side, so that none is hidden
                spread = spread + place if len(values) > 1 else torch.tensor([place])
                axis.plot(spread.tolist(), list(values), "o", markersize=5, **look)
                mean = sum(values) / len(values)
                if len(values) > 1:
                    axis.hlines(mean, place - 0.35, place + 0.35, color="black", linewidth=2)
            if condition == "baseline":
                axis.axhline(mean, color=COLORS["baseline"], linestyle="--", linewidth=1)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_xticks(range(len(columns)), _labels(columns), rotation=30)
        axis.set_xlim(-0.6, len(columns) - 0.4)
        axis.set_title(as_label(title), fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def plot_next_tokens(probabilities, tokenizer, n=5):
    """The n next tokens that are likeliest in any condition, a panel for each condition. Returns the Figure.

    probabilities: {condition: [vocab]}. tokenizer: to write the tokens.
    """
    size = (7, 2.6)
    figure, axes = plt.subplots(1, len(probabilities), figsize=size, squeeze=False, sharey=True, layout="constrained")
    top = torch.stack(list(probabilities.values())).amax(dim=0).topk(n).indices
    for axis, (condition, given) in zip(axes[0], probabilities.items()):
        bars = axis.barh(range(n), given[top].tolist(), color=COLORS.get(condition, COLORS["random"]))
        axis.bar_label(bars, [f"{value:.4f}" for value in given[top].tolist()], padding=3, fontsize=9)
        axis.set_yticks(range(n), _labels(show_token(tokenizer.decode([token])) for token in top.tolist()))
        axis.set(title=as_label(condition), xlim=(0, 1.25), xlabel="probability", xticks=[0, 0.5, 1])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()  # the likeliest on top
    axes[0, 0].set_ylabel("next token")
    return figure


def plot_means_by_layer(curves, ylabel):
    """A mean over the prompts for each layer, with its 95% interval, a line for each condition. Returns the Axes.

    curves: {condition: values [n_prompts, n_layers]}
    """
    axis = plt.subplots(figsize=(7, 3.6), layout="constrained")[1]
    for condition, values in curves.items():
        means, lows, highs = zip(*(bootstrap_mean(layer) for layer in values.T))
        color = COLORS.get(condition, COLORS["chosen"])
        axis.plot(range(len(means)), means, marker="o", markersize=4, color=color, label=as_label(condition))
        axis.fill_between(range(len(means)), lows, highs, color=color, alpha=0.25, linewidth=0)
    axis.set(xlabel="layer", ylabel=as_label(ylabel), xticks=range(len(means)))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return axis


def plot_bars(values, ylabel, log=False, mark=None):
    """A bar for each named number. Returns the Axes.

    values: {name: number}. log: a logarithmic scale. mark: where to draw a dashed line, or None.
    """
    axis = plt.subplots(figsize=(7, 3.6), layout="constrained")[1]
    colors = [COLORS.get(name, COLORS["baseline"]) for name in values]
    axis.bar(range(len(values)), list(values.values()), color=colors, log=log)
    if mark is not None:
        axis.axhline(mark, color=COLORS["chosen"], linestyle="--", linewidth=1)
    axis.set_xticks(range(len(values)), _labels(values), rotation=45, ha="right")
    axis.set_ylabel(as_label(ylabel))
    axis.spines[["top", "right"]].set_visible(False)
    return axis


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
            color = COLORS.get(condition, COLORS["random"])
            axis.bar(place, 100 * rate.value, width=0.8, color=color, edgecolor=color, linewidth=2,  # seen at 0 too
                     label=None if condition in drawn else as_label(condition))
            axis.annotate(f"{100 * rate.value:.0f}", (place, 100 * high), xytext=(0, 2), textcoords="offset points",
                          ha="center", fontsize=8)
            axis.errorbar(place, 50 * (low + high), yerr=50 * (high - low), color="black", capsize=4)
            drawn.add(condition)
        ticks.update({start + (len(bars) - 1) / 2: group} if grouped else zip(places, bars))
        start += len(bars) + 1
    axis.set_xticks(list(ticks), _labels(ticks.values()))
    axis.set(ylim=(0, 110), yticks=range(0, 101, 20), ylabel=as_label(ylabel), title=as_label(title))
    axis.spines[["top", "right"]].set_visible(False)
    if grouped:
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return axis


def plot_rate_lines(panels, xlabel, ylabel="answers (%)"):
    """Rates in per cent, with their 95% intervals, along a number; a panel for each title. Returns the Figure.

    panels: {title: {condition: {number: Rate}}}
    """
    size = (1.5 + 3.2 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, (title, lines) in zip(axes[0], panels.items()):
        for condition, rates in lines.items():
            color = COLORS.get(condition, COLORS["chosen"])
            lows, highs = zip(*(rate.interval for rate in rates.values()))
            axis.plot(list(rates), [100 * rate.value for rate in rates.values()], marker="o", markersize=4, color=color,
                      label=as_label(condition))
            axis.fill_between(list(rates), [100 * low for low in lows], [100 * high for high in highs], color=color,
                              alpha=0.2, linewidth=0)
        axis.set(title=as_label(title), xlabel=as_label(xlabel), ylim=(-3, 103))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(as_label(ylabel))
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_spread(curves, xlabel, ylabel):
    """Medians along a number that doubles, in a band that holds 95% of the values; one for each condition. The Axes.

    curves: {condition: {number: values}}
    """
    axis = plt.subplots(figsize=(7, 3.6), layout="constrained")[1]
    for condition, values in curves.items():
        drawn = torch.stack([torch.as_tensor(some, dtype=torch.float32) for some in values.values()])
        low, median, high = drawn.quantile(torch.tensor([0.025, 0.5, 0.975]), dim=1).tolist()
        color = COLORS.get(condition, COLORS["chosen"])
        axis.plot(list(values), median, marker="o", markersize=4, color=color, label=as_label(condition))
        axis.fill_between(list(values), low, high, color=color, alpha=0.2, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(values), _labels(values))
    axis.set(xlabel=as_label(xlabel), ylabel=as_label(ylabel))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return axis


def plot_heads(grids, framed=()):
    """What each head writes along r̂, layer x head in colour, a panel for each condition. Returns the Figure.

    grids: {condition: values [n_layers, n_heads]}. framed: [(layer, head)], heads to frame.
    """
    size = (1.5 + 2.6 * len(grids), 3.6)
    figure, axes = plt.subplots(1, len(grids), figsize=size, squeeze=False, sharey=True, layout="constrained")
    largest = torch.stack(list(grids.values())).abs().max().item() or 1.0
    for axis, (condition, values) in zip(axes[0], grids.items()):
        image = axis.imshow(values.numpy(), aspect="auto", origin="lower", cmap="PuOr_r", vmin=-largest, vmax=largest)
        for layer, head in framed:
            _frame(axis, layer, head, linewidth=1.5)
        axis.set(title=as_label(condition), xlabel="head", xticks=range(values.shape[1]),
                 yticks=_layer_ticks(len(values)))
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0].tolist(), label="along r̂", shrink=0.7)
    return figure


def plot_lines(lines, xlabel, ylabel):
    """A line through one number for each place, for each condition. Returns the Axes.

    lines: {condition: {place: number}}, or a list of numbers for the places 0, 1, 2 ...
    """
    axis = plt.subplots(figsize=(7, 3.6), layout="constrained")[1]
    for condition, values in lines.items():
        values = values if isinstance(values, dict) else dict(enumerate(values))
        axis.plot(list(values), list(values.values()), marker="o", markersize=4, label=as_label(condition),
                  color=COLORS.get(condition, COLORS["chosen"]))
    axis.set(xlabel=as_label(xlabel), ylabel=as_label(ylabel))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return axis


def plot_roc(curves):
    """ROC curves: how many are caught, against how many false alarms that costs. Returns the Axes.

    curves: {condition: (false alarms [n], caught [n])}, shares, as scikit-learn's `roc_curve` gives them.
    """
    axis = plt.subplots(figsize=(5.5, 4), layout="constrained")[1]
    axis.plot([0, 100], [0, 100], color=COLORS["random"], linestyle="--", linewidth=1, label="a coin")
    for condition, (false_alarms, caught) in curves.items():
        axis.plot(100 * false_alarms, 100 * caught, label=as_label(condition),
                  color=COLORS.get(condition, COLORS["chosen"]))
    axis.set(xlabel="harmless requests flagged (%)", ylabel="harmful requests flagged (%)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return axis


def plot_estimates(estimates, exact, chosen):
    """A point for each candidate: what was estimated, against what was measured. Returns the Axes.

    estimates, exact: numbers [n_candidates], nats. chosen: bool [n_candidates], those to be marked as finalists.
    """
    axis = plt.subplots(figsize=(5.5, 4), layout="constrained")[1]
    for name, which, marker in (("finalists", chosen, "o"), ("all others", ~chosen, "x")):
        axis.scatter(estimates[which].tolist(), exact[which].tolist(), s=24, marker=marker, label=name,
                     color=COLORS["ablated" if name == "finalists" else "baseline"])
    axis.set(xlabel="first-order estimate of bypass (nats)", ylabel="exact bypass (nats)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return axis


def plot_models(panels, yours=None, marks=None):
    """A row for each model, a panel for each title, a point for each condition. Returns the Figure.

    panels: {title: {condition: {model: number}}}; rows stand in the order in which models first appear. yours: the
    model whose row has a band behind it. marks: {title: where to draw a dashed line}.
    """
    rows = [row for conditions in panels.values() for row in conditions.values()]
    models = list(dict.fromkeys(model for row in rows for model in row))
    size = (2 + 1.7 * len(panels), 1.3 + 0.24 * len(models))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, (title, conditions) in zip(axes[0], panels.items()):
        for number, (condition, row) in enumerate(conditions.items()):
            aside = 0.2 * (number - (len(conditions) - 1) / 2)  # so that no point lies on another
            axis.plot(list(row.values()), [models.index(model) + aside for model in row], "o", markersize=5,
                      color=COLORS.get(condition, COLORS["chosen"]), label=as_label(condition))
        if yours in models:
            place = models.index(yours)
            axis.axhspan(place - 0.5, place + 0.5, color="black", alpha=0.08, linewidth=0, zorder=0)
        if title in (marks or {}):
            axis.axvline(marks[title], color=COLORS["chosen"], linestyle="--", linewidth=1)
        if len(conditions) > 1:
            axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
        axis.set_title(as_label(title), fontsize=9)
        axis.locator_params(axis="x", nbins=4)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="y", linewidth=0.4)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(models)), _labels(models))
    axes[0, 0].set_ylim(len(models) - 0.5, -0.5)  # the first on top
    return figure


def plot_line_panels(panels, xlabel, marks=None):
    """A line for each name, with a shade and a marker of its own, a panel for each title. Returns the Figure.

    panels: {title: {name: {number: value}}}, the same names in all. marks: {title: where to draw a dashed line}.
    """
    size = (1.5 + 2.6 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes[0], panels.items()):
        shades = plt.get_cmap("viridis")([place / len(lines) for place in range(len(lines))])
        for place, (name, values) in enumerate(lines.items()):  # smaller and smaller, so that none is hidden
            axis.plot(list(values), list(values.values()), marker="osD^vP*X"[place % 8], markersize=max(3, 9 - place),
                      color=shades[place], label=as_label(name))
        if title in (marks or {}):
            axis.axhline(marks[title], color=COLORS["chosen"], linestyle="--", linewidth=1)
        axis.set_title(as_label(title), fontsize=9)
        axis.set_xlabel(as_label(xlabel))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def markdown_table(columns, rows):
    """A table of texts and numbers, as Markdown. columns: the names on top; rows: a list of lists, each as long.

    A text may hold Markdown; what would end its cell or its line is kept from doing so.
    Raises ValueError for a row that is longer or shorter.
    """
    lines = [columns, ["---"] * len(columns), *rows]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"The row {row} has {len(row)} cells, and there are {len(columns)} columns: give as many.")
    cells = [[" ".join(str(cell).replace("|", r"\|").splitlines()) for cell in line] for line in lines]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in cells))


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
    lines = "".join(f"<tr>{''.join(cells)}</tr>" for cells in [head, *rows])
    return HTML(f'<table class="{PLAIN}">{lines}</table>')


def token_strip(tokens, values=None, limit=None, framed=()):
    """Tokens in a line, orange where the value is above 0, blue where below; hover for the value. HTML.

    tokens: list of strings. values: one number each, or None for no colour. limit: which value has full colour;
    default, the largest. framed: places of tokens to frame, such as [-2, -1].
    """
    values = torch.as_tensor([0] * len(tokens) if values is None else values, dtype=torch.float32).tolist()
    if len(values) != len(tokens):
        raise ValueError(f"There are {len(values)} values for {len(tokens)} tokens: give one for each.")
    limit = limit or max(map(abs, values), default=0) or 1.0
    framed = {place % len(tokens) for place in framed}
    spans = []
    for place, (token, value) in enumerate(zip(tokens, values)):
        color = COLORS["harmful"] if value > 0 else COLORS["harmless"]
        opacity = round(190 * min(1, abs(value) / limit))  # of 255, so that black letters stay readable
        border = "2px solid currentColor" if place in framed else f"1px solid {COLORS['random']}"
        style = f"background:{color}{opacity:02x};border:{border};padding:2px 3px;margin:1px;display:inline-block"
        spans.append(f'<span title="{value:.3f}" style="{style}">{escape(show_token(token))}</span>')
    return HTML(f'<div class="{PLAIN}" style="font-family:monospace;line-height:1.9">{"".join(spans)}</div>')


def draw_residual_stream(tokens, n_layers, mark=None):
    """A drawing of the residual stream: one line for each token, from its embedding up; layers add to it. The Axes.

    mark: (layer, position) of one vector x^(l) to point out, the position counted from the end, as in (4, -1).
    """
    axis = plt.subplots(figsize=(8, 5), layout="constrained")[1]
    last = len(tokens) - 1
    mlp = dict(marker="s", linestyle="", color=COLORS["random"], markeredgecolor=COLORS["baseline"])
    axis.vlines(range(len(tokens)), 0, n_layers, color=COLORS["baseline"], linewidth=2)
    for layer in range(n_layers):
        for place in range(last):  # attention brings to the last token what earlier ones hold; drawn for it alone
            axis.annotate("", (last, layer + 0.5), (place, layer + 0.1),
                          arrowprops=dict(arrowstyle="-", color=COLORS["random"], linewidth=0.8))
        axis.plot(range(len(tokens)), [layer + 0.8] * len(tokens), **mlp)
    axis.plot([], [], color=COLORS["baseline"], linewidth=2, label="residual stream\nof a token")
    axis.plot([], [], color=COLORS["random"], label="attention, from\nearlier tokens\n(drawn for the last)")
    axis.plot([], [], **mlp, label="MLP, at each\ntoken by itself")
    if mark is not None:
        layer, position = mark
        axis.plot(len(tokens) + position, layer, "o", color=COLORS["chosen"], markersize=9, zorder=3,
                  label=f"layer {layer}'s input\nat position {position}")
    axis.set_xticks(range(len(tokens)), _labels(map(show_token, tokens)), rotation=60, ha="right", fontsize=8)
    axis.set(ylabel="layer, at its start", yticks=range(n_layers + 1), ylim=(-0.3, n_layers + 0.3))
    axis.set_yticklabels([*range(n_layers), "logits"])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), labelspacing=1.5)
    return axis


def _token_ticks(tokens):
    """Each token with its position, counted from the end."""
    return [as_label(f"{show_token(token)}  {index - len(tokens)}") for index, token in enumerate(tokens)]


def _frame(axis, row, column, linewidth):
    """A black frame around one field of a heatmap."""
    axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=linewidth))


def _layer_ticks(n_layers):
    """Every layer has a tick where there is room, else every second, third ... one."""
    return range(0, n_layers, 1 + (n_layers - 1) // 16)


def _heatmap(axis, values, title, limit=None):
    """One score [n_layers, n_positions]: white at 0; or on a logarithmic scale, with a line at the limit.

    Grey where it is nan.
    """
    axis.set_facecolor("#DDDDDD")
    if limit is None:
        largest = values.nan_to_num().abs().max().item() or 1.0
        colors = dict(cmap="PuOr_r", vmin=-largest, vmax=largest)
    else:
        values = values.clamp(min=1e-5)
        colors = dict(cmap="viridis", norm="log" if values.isfinite().any() else None)
    image = axis.imshow(values.numpy(), aspect="auto", origin="lower", **colors)
    bar = axis.figure.colorbar(image, ax=axis)
    if limit is not None:
        bar.ax.axhline(limit, color="white", linewidth=3)
    axis.set_title(title, fontsize=9)
    axis.set_yticks(_layer_ticks(len(values)))
