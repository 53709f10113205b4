"""Pictures show the numbers they were given, say what their axes mean, and let no markup through."""
import inspect
import warnings
from html import escape

import matplotlib
import pytest
import torch
from matplotlib.cbook import is_math_text
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from utils import plots
from utils.candidates import CandidateScores
from utils.evaluation import Rate
from utils.plots import (
    COLORS,
    PLAIN,
    as_label,
    completions_table,
    draw_residual_stream,
    markdown_table,
    plot_bars,
    plot_by_layer,
    plot_candidate_scores,
    plot_clouds,
    plot_cosines,
    plot_estimates,
    plot_grids,
    plot_heads,
    plot_line_panels,
    plot_lines,
    plot_means_by_layer,
    plot_models,
    plot_next_tokens,
    plot_points,
    plot_projections,
    plot_rate_lines,
    plot_rates,
    plot_roc,
    plot_shadow,
    plot_spread,
    show_token,
    token_strip,
)

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    matplotlib.pyplot.close("all")


def test_candidate_scores():
    generator = torch.Generator().manual_seed(0)
    bypass, induce, kl = torch.randn(3, 6, 2, generator=generator)
    scores = CandidateScores(bypass, induce, kl.abs())
    figure = plot_candidate_scores(scores, ["<|eot|>", "\n\n"], chosen=(3, 1))
    panels = [axis for axis in figure.axes if axis.images and axis.get_title()]
    assert [axis.get_title().split("\n")[0] for axis in panels] == ["bypass", "induce", "kl"]
    for axis, values in zip(panels, (bypass, induce, kl.abs())):
        assert torch.allclose(torch.as_tensor(axis.images[0].get_array().data), values)
        assert [label.get_text() for label in axis.get_xticklabels()] == ["<|eot|>  -2", "\\n\\n  -1"]
        [frame] = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
        assert frame.get_xy() == (0.5, 2.5)
        dots = {(int(line.get_ydata()[0]), int(line.get_xdata()[0])) for line in axis.lines}
        assert dots == set(map(tuple, scores.passing().nonzero().tolist()))
    assert any(list(line.get_ydata()) == [0.1, 0.1] for axis in figure.axes for line in axis.lines)  # on kl's colours
    assert panels[0].get_ylabel() == "layer" and "token" in panels[1].get_xlabel()


def test_grids_show_their_numbers_on_one_scale():
    figure = plot_grids({"seen": torch.tensor([[50.0, 60], [70, 80]]), "unseen": torch.tensor([[50.0, 55], [90, 100]])},
                        ["<|eot|>", "\n\n"], "right (%)")
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["seen", "unseen"]
    assert [text.get_text() for text in panels[1].texts] == ["50", "55", "90", "100"]
    assert {axis.images[0].get_clim() for axis in panels} == {(50, 100)}
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["<|eot|>  -2", "\\n\\n  -1"]


def test_scores_that_are_all_zero_can_be_drawn():
    zeros = torch.zeros(4, 2)
    plot_candidate_scores(CandidateScores(zeros, zeros, zeros), ["a", "b"]).canvas.draw()


@pytest.mark.parametrize("n_scored", [0, 1, 3])
def test_scores_that_were_not_computed_are_grey(n_scored):
    """As the screen leaves them, which scores a few finalists."""
    values = torch.full((4, 2), torch.nan)
    values.view(-1)[:n_scored] = torch.tensor([0.3, -2.0, 0.05])[:n_scored]
    figure = plot_candidate_scores(CandidateScores(values, values, values.abs()), ["a", "b"])
    figure.canvas.draw()
    panels = [axis for axis in figure.axes if axis.images and axis.get_title()]
    for axis in panels:
        assert (~axis.images[0].get_array().mask).sum() == n_scored
        assert to_hex(axis.get_facecolor()) == "#dddddd"
    low, high = panels[0].images[0].get_clim()
    assert high == -low == pytest.approx({0: 1.0, 1: 0.3, 3: 2.0}[n_scored])


@pytest.mark.parametrize("x", [torch.tensor([2.0, 1.5]), torch.tensor([-1.0, 1.5])])
def test_shadow_and_what_is_left_add_up(x):
    direction = torch.tensor([3.0, 1.0])
    axis = plot_shadow(x, direction)
    tips = {label.get_text(): torch.tensor(arrow.xy) for arrow, label in zip(axis.texts[::2], axis.texts[1::2])}
    assert torch.allclose(tips["its shadow: r̂ (r̂ · x)"] + tips["what is left: x′"], x)
    assert abs(tips["what is left: x′"] @ direction) < 1e-6
    assert tips["r̂"].norm() == pytest.approx(1)


def test_clouds():
    points = {"harmful": torch.randn(5, 2), "harmless": torch.randn(3, 2)}
    figure = plot_clouds({"layer 1": points, "layer 4": points})
    assert [axis.get_title() for axis in figure.axes] == ["layer 1", "layer 4"]
    for axis in figure.axes:
        for drawn, (condition, xy) in zip(axis.collections, points.items()):
            assert torch.allclose(torch.as_tensor(drawn.get_offsets().data).float(), xy)
            assert to_hex(drawn.get_facecolor()[0]).upper() == COLORS[condition]


def test_projections_count_every_prompt():
    groups = {"harmful": torch.randn(50) + 3, "harmless": torch.randn(40)}
    figure = plot_projections({"layer 1": groups}, "metric (nats)")
    [axis] = figure.axes
    assert sum(bar.get_height() for bar in axis.patches) == 90
    assert axis.get_xlabel() == "metric (nats)" and axis.get_ylabel() == "prompts"


def test_lines_over_the_layers():
    values = torch.randn(6, 2)
    axis = plot_by_layer(values, ["<|eot|>", "\n"], "gap", predicted=3)
    assert [list(line.get_ydata()) for line in axis.lines[:2]] == [values[:, 0].tolist(), values[:, 1].tolist()]
    assert [line.get_label() for line in axis.lines] == ["-2  <|eot|>", "-1  \\n", "your prediction"]
    assert list(axis.lines[2].get_xdata()) == [3, 3]
    assert len(plot_by_layer(values, ["a", "b"], "gap").lines) == 2


def test_cosines_are_written_in_their_cells():
    matrix = torch.tensor([[1, -0.25], [-0.25, 1]])
    figure = plot_cosines({"layers": (matrix, [1, 2]), "one": (torch.ones(1, 1), ["a"])})
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.0", "-0.2", "-0.2", "1.0"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["1", "2"]


def test_points_and_intervals():
    figure = plot_points({"bypass": {"baseline": torch.tensor([1.0, 2, 4]), "ablated": (0.5, 0.2, 1.0)}})
    [axis] = figure.axes
    assert list(axis.lines[0].get_ydata()) == [1, 2, 4]
    assert len(set(axis.lines[0].get_xdata())) == 3  # side by side
    assert list(axis.lines[1].get_ydata()) == pytest.approx([7 / 3, 7 / 3])  # the baseline's mean, across the panel
    [mean], [interval] = [segments.get_segments() for segments in axis.collections]
    assert mean[:, 1].tolist() == pytest.approx([7 / 3, 7 / 3])
    assert interval[:, 1].tolist() == pytest.approx([0.2, 1.0])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["baseline", "ablated"]


def test_bars_and_the_line_across_them():
    axis = plot_bars({"none": 1e-6, "mlp 3": 2.0}, "difference", log=True, mark=1e-5)
    assert [bar.get_height() for bar in axis.patches] == [1e-6, 2.0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["none", "mlp 3"]
    assert axis.get_yscale() == "log" and axis.get_ylabel() == "difference"
    assert list(axis.lines[0].get_ydata()) == [1e-5, 1e-5]


def test_rates():
    axis = plot_rates({"baseline": Rate(9, 10), "ablated": Rate(0, 10)}, title="harmful prompts")
    assert [bar.get_height() for bar in axis.patches] == [90, 0]
    assert [to_hex(bar.get_facecolor()).upper() for bar in axis.patches] == [COLORS["baseline"], COLORS["ablated"]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["baseline", "ablated"]
    low, high = Rate(0, 10).interval
    [segment] = axis.collections[-1].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([100 * low, 100 * high])
    assert axis.get_ylabel() == "refusal (%)"


def test_groups_of_rates_share_a_legend():
    axis = plot_rates({"harmful": {"baseline": Rate(9, 10), "ablated": Rate(0, 10)},
                       "harmless": {"baseline": Rate(1, 10), "added": Rate(8, 10)}})
    assert [bar.get_height() for bar in axis.patches] == [90, 0, 10, 80]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["harmful", "harmless"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["baseline", "ablated", "added"]


def test_lines_of_rates():
    figure = plot_rate_lines({"r": {"refusal": {-1.0: Rate(0, 10), 2.0: Rate(9, 10)}}}, "coefficient")
    [axis] = figure.axes
    assert list(axis.lines[0].get_xdata()) == [-1, 2] and list(axis.lines[0].get_ydata()) == [0, 90]
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(100 * Rate(9, 10).interval[1])
    assert axis.get_xlabel() == "coefficient" and axis.get_ylabel() == "answers (%)"


def test_the_likeliest_next_tokens():
    class Tokenizer:
        def decode(self, ids):
            return f" {ids[0]}"
    figure = plot_next_tokens({"harmful": torch.tensor([0.2, 0.5, 0.3]), "harmless": torch.tensor([0.9, 0, 0.1])},
                              Tokenizer(), n=2)
    assert [axis.get_title() for axis in figure.axes] == ["harmful", "harmless"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([0.2, 0.5])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["␣0", "␣1"]
    # .9 in one condition, .5 in the other
    assert [text.get_text() for text in figure.axes[1].texts] == ["0.9000", "0.0000"]


def test_means_by_layer():
    values = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    axis = plot_means_by_layer({"pair": values, "random": values + 5}, "distance")
    assert torch.tensor(axis.lines[0].get_ydata()).tolist() == pytest.approx(values.mean(dim=0).tolist(), abs=1e-6)
    assert [to_hex(line.get_color()).upper() for line in axis.lines] == [COLORS["chosen"], COLORS["random"]]
    lowest = axis.collections[0].get_paths()[0].vertices[:, 1].min()
    assert lowest < values.mean(dim=0).min()
    assert axis.get_ylabel() == "distance"


def test_the_residual_stream_is_drawn():
    axis = draw_residual_stream(["<b>", " cake", "\n"], 2, mark=(1, -1))
    assert [label.get_text() for label in axis.get_xticklabels()] == ["<b>", "␣cake", "\\n"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1", "logits"]
    [point] = [line for line in axis.lines if line.get_label().startswith("layer 1's input")]
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([2], [1])


def test_colours_differ():
    assert len(set(COLORS.values())) == len(COLORS)


def test_completions_are_escaped():
    html = completions_table(["<script>bake"], baseline=["a & b"], ablated=["<i>"]).data
    assert "&lt;script&gt;bake" in html and "a &amp; b" in html and "&lt;i&gt;" in html
    assert "<script>" not in html and "<i>" not in html
    assert html.index("baseline") < html.index("ablated")


def test_completions_that_do_not_match():
    with pytest.raises(ValueError, match="Column 'ablated' has 2 texts for 1 instructions: give one for each"):
        completions_table(["bake"], ablated=["a", "b"])


def test_a_table_in_markdown():
    assert markdown_table(["model", "n"], [["a", 1], ["b", 2.5]]).data == \
        "| model | n |\n| --- | --- |\n| a | 1 |\n| b | 2.5 |"
    with pytest.raises(ValueError, match="The row .* has 1 cells, and there are 2 columns: give as many."):
        markdown_table(["model", "n"], [["a"]])


@pytest.mark.parametrize("text, cell", [("a | b", r"a \| b"), ("a\nb", "a b"), ("a\r\n|", r"a \|"), ("", "")])
def test_no_text_breaks_out_of_its_cell_in_markdown(text, cell):
    *_, row = markdown_table([text, "n"], [[text, 1]]).data.splitlines()
    assert row == f"| {cell} | 1 |" and len(markdown_table([text], [[text]]).data.splitlines()) == 3


def test_token_strip():
    html = token_strip(["<b>", " cake\n", "!"], [2.0, -1.0, 0.0]).data
    assert "&lt;b&gt;" in html and "␣cake\\n" in html and "<b>" not in html
    assert 'title="2.000" style="background:#D55E00be' in html
    assert 'title="-1.000" style="background:#0072B25f' in html
    assert 'title="0.000" style="background:#0072B200' in html
    with pytest.raises(ValueError, match="2 values for 1 tokens: give one for each"):
        token_strip(["a"], [1, 2])


def test_framed_tokens():
    html = token_strip(["a", "b", "c"], framed=[-1, 0]).data
    assert [span.count("2px solid") for span in html.split("<span")[1:]] == [1, 0, 1]


def test_spread_shows_medians_and_the_middle_95_percent():
    values = {4: [float(x) for x in range(101)], 8: [50.0] * 101}
    axis = plot_spread({"means": values, "PCA": values}, "prompts of each side", "cosine")
    line, other = axis.lines
    assert list(line.get_xdata()) == [4, 8] and list(line.get_ydata()) == [50, 50]
    assert to_hex(other.get_color()) == COLORS["PCA"].lower()
    band = axis.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 2.5 and band[:, 1].max() == 97.5
    assert [label.get_text() for label in axis.get_xticklabels()] == ["4", "8"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("prompts of each side", "cosine")


def test_heads_share_a_scale_and_some_are_framed():
    grids = {"harmful": torch.tensor([[1.0, -2.0], [0.0, 3.0]]), "suffix": torch.zeros(2, 2)}
    figure = plot_heads(grids, framed=[(1, 0)])
    for axis, values in zip(figure.axes, grids.values()):
        assert axis.images[0].get_clim() == (-3, 3)
        assert torch.equal(torch.as_tensor(axis.images[0].get_array().data), values)
        assert axis.patches[0].get_xy() == (-0.5, 0.5)  # layer 1, head 0


def test_lines_through_numbers():
    axis = plot_lines({"suffix": [3.0, 1.0], "harmful": {2: 0.5, 4: 0.7}}, "step", "loss")
    assert [list(line.get_xdata()) for line in axis.lines] == [[0, 1], [2, 4]]
    assert [list(line.get_ydata()) for line in axis.lines] == [[3, 1], [0.5, 0.7]]
    assert to_hex(axis.lines[0].get_color()) == COLORS["suffix"].lower()


def test_roc_in_per_cent():
    axis = plot_roc({"suffix": (torch.tensor([0, 0.5, 1]).numpy(), torch.tensor([0, 0.9, 1]).numpy())})
    assert [round(y) for y in axis.lines[1].get_ydata()] == [0, 90, 100]
    assert list(axis.lines[1].get_xdata()) == [0, 50, 100]


@pytest.mark.parametrize("token, shown", [(" a\n\n", "␣a\\n\\n"), ("Größe", "Größe"), ("抱歉", "抱歉"), ("", ""),
                                          ("\t\u200b\x00", "\\t\\u200b\\x00")])
def test_tokens_are_shown_with_all_that_leaves_no_ink(token, shown):
    assert show_token(token) == shown


@pytest.mark.parametrize("text, label", [
    ("Größe", "Größe"), ("Größe 抱", "Größe \\u62b1"), ("two\nlines", "two\nlines"), ("$5 or $6", r"\$5 or \$6"),
    ("_x", " _x"), (3, "3"), ("", "")])
def test_texts_as_labels(text, label):
    assert as_label(text) == label


HOSTILE = ["$$", "x$^$", "$x$", r"$\frac{$", r"\$", r"\$ $", "_hidden", "क\t抱"]


def drawn_texts(figure):
    """All that a figure shows as text, as it is seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as where the font lacks a letter
        figure.canvas.draw()
    texts = [text.get_text() for text in figure.findobj(Text) if "10^" not in text.get_text()]  # but for log scales
    assert not any(map(is_math_text, texts))
    return [text.replace(r"\$", "$") for text in texts]


def with_codes(text):
    """The text, but for what the pictures' font lacks."""
    return text.replace("क", r"\u0915").replace("\t", r"\t").replace("抱", r"\u62b1")


def test_labels_are_seen_as_they_are():
    figure, axis = matplotlib.pyplot.subplots()
    for text in HOSTILE:
        axis.plot([0, 1], label=as_label(text))
    axis.legend()
    assert {with_codes(text) for text in HOSTILE} <= {text.strip() for text in drawn_texts(figure)}


# what a model or a learner may have written, at every place of every picture where a text can stand

GRID, NUMBERS, RATES = torch.rand(2, 2), {0: 1.0, 1: 2.0}, {0: Rate(1, 2), 1: Rate(2, 2)}
SCORES = CandidateScores(GRID, GRID, GRID)
PICTURES = {
    plots.plot_candidate_scores: lambda text: plot_candidate_scores(SCORES, [text(), text()]),
    plots.plot_grids: lambda text: plot_grids({text(): GRID, text(): GRID}, [text(), text()], text()),
    plots.plot_shadow: lambda text: plot_shadow(torch.ones(2), torch.tensor([1.0, 0])),
    plots.plot_clouds: lambda text: plot_clouds({text(): {text(): GRID, text(): GRID}}),
    plots.plot_projections: lambda text: plot_projections({text(): {text(): GRID[0], text(): GRID[1]}}, text()),
    plots.plot_by_layer: lambda text: plot_by_layer(GRID, [text(), text()], text()),
    plots.plot_cosines: lambda text: plot_cosines({text(): (GRID, [text(), text()])}),
    plots.plot_estimates: lambda text: plot_estimates(torch.randn(4), torch.randn(4), torch.arange(4) < 2),
    plots.plot_points: lambda text: plot_points({text(): {text(): [1.0], text(): (1, 0, 2)}}),
    plots.plot_next_tokens: lambda text: plot_next_tokens({text(): GRID[0]}, Decoder(text), n=2),
    plots.plot_means_by_layer: lambda text: plot_means_by_layer({text(): GRID}, text()),
    plots.plot_bars: lambda text: plot_bars({text(): 1, text(): 2}, text()),
    plots.plot_rates: lambda text: plot_rates({text(): {text(): Rate(1, 2)}}, text(), text()),
    plots.plot_rate_lines: lambda text: plot_rate_lines({text(): {text(): RATES}}, text(), text()),
    plots.plot_spread: lambda text: plot_spread({text(): {2: [1.0], 4: [2.0]}}, text(), text()),
    plots.plot_heads: lambda text: plot_heads({text(): GRID, text(): GRID}),
    plots.plot_lines: lambda text: plot_lines({text(): NUMBERS}, text(), text()),
    plots.plot_roc: lambda text: plot_roc({text(): (GRID[0].numpy(), GRID[1].numpy())}),
    plots.plot_models: lambda text: plot_models({text(): {text(): {text(): 1}, text(): {text(): 2}}}),
    plots.plot_line_panels: lambda text: plot_line_panels({text(): {text(): NUMBERS}}, text()),
    plots.draw_residual_stream: lambda text: draw_residual_stream([text(), text()], 2),
}
TABLES = {
    plots.completions_table: lambda text: completions_table([text()], **{text(): [text()]}),
    plots.token_strip: lambda text: token_strip([text(), text()]),
}


class Decoder:
    """A tokenizer whose every token is a text of the test."""
    def __init__(self, text): self.text = text
    def decode(self, ids): return self.text()


def test_no_picture_is_left_out():
    public = {function for name, function in vars(plots).items()
              if inspect.isfunction(function) and function.__module__ == plots.__name__ and name[0] != "_"}
    assert public == {*PICTURES, *TABLES, show_token, as_label, markdown_table}


class Texts:
    """Calls give a text that no picture should trip over, with another number each time; `given` holds them all."""
    def __init__(self): self.given = []

    def __call__(self):
        self.given.append(f"_$x$^$$<b>抱{len(self.given)}")
        return self.given[-1]


@pytest.mark.parametrize("draw", PICTURES.values(), ids=[picture.__name__ for picture in PICTURES])
def test_pictures_show_texts_as_they_are(draw):
    texts = Texts()
    picture = draw(texts)
    drawn = drawn_texts(getattr(picture, "figure", picture))
    assert [text for text in texts.given if not any(with_codes(text) in seen for seen in drawn)] == []


@pytest.mark.parametrize("draw", TABLES.values(), ids=[table.__name__ for table in TABLES])
def test_tables_show_texts_as_they_are(draw):
    texts = Texts()
    html = draw(texts).data
    assert html.partition(">")[0].split('"')[1] == PLAIN  # or notebooks would read formulas
    assert [text for text in texts.given if escape(text) not in html] == []


def test_models_in_rows():
    panels = {"depth (%)": {"chosen": {"A 7B": 40, "yours": 55}},
              "refused (%)": {"baseline": {"A 7B": 91, "B 2B": 70, "yours": 100}, "ablated": {"A 7B": 0, "yours": 2}}}
    figure = plot_models(panels, yours="yours", marks={"refused (%)": 50})
    depth, refused = figure.axes
    assert [label.get_text() for label in depth.get_yticklabels()] == ["A 7B", "yours", "B 2B"]
    assert depth.yaxis_inverted() and [axis.get_title() for axis in figure.axes] == list(panels)
    baseline, ablated, mark = refused.lines
    assert list(baseline.get_xdata()) == [91, 70, 100] and list(baseline.get_ydata()) == [-0.1, 1.9, 0.9]
    assert list(ablated.get_xdata()) == [0, 2] and list(ablated.get_ydata()) == [0.1, 1.1]  # beside the others
    assert to_hex(ablated.get_color()) == COLORS["ablated"].lower() and list(mark.get_xdata()) == [50, 50]
    assert [text.get_text() for text in refused.get_legend().get_texts()] == ["baseline", "ablated"]
    for axis in figure.axes:
        [band] = axis.patches
        assert (band.get_y(), band.get_height()) == (0.5, 1)


def test_models_without_a_row_of_ones_own():
    assert not plot_models({"depth (%)": {"chosen": {"A 7B": 40}}}).axes[0].patches


def test_lines_in_panels():
    panels = {title: {name: {-1: 1.0, 0: 2.0, 1: start} for start, name in enumerate("ABC")}
              for title in ("bypass", "induce")}
    figure = plot_line_panels(panels, "layer", marks={"induce": 0})
    bypass, induce = figure.axes
    assert len(bypass.lines) == 3 and list(induce.lines[3].get_ydata()) == [0, 0]
    assert [list(line.get_ydata()) for line in bypass.lines] == [[1, 2, 0], [1, 2, 1], [1, 2, 2]]
    assert len({(to_hex(line.get_color()), line.get_marker()) for line in bypass.lines}) == 3
    assert [text.get_text() for text in induce.get_legend().get_texts()] == ["A", "B", "C"]
    assert bypass.get_xlabel() == "layer"


def test_estimates_stand_against_what_was_measured():
    estimates, exact, chosen = torch.randn(9), torch.randn(9), torch.arange(9) < 4
    axis = plot_estimates(estimates, exact, chosen)
    drawn = {points.get_label(): torch.as_tensor(points.get_offsets().data).float() for points in axis.collections}
    pairs = torch.stack([estimates, exact], dim=1)
    assert torch.allclose(drawn["finalists"], pairs[chosen]) and torch.allclose(drawn["all others"], pairs[~chosen])
    assert "estimate" in axis.get_xlabel() and "exact" in axis.get_ylabel()
