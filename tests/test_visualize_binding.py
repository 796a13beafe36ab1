"""Figures of mode=train_binding: a reader can distinguish every line and label."""

import torch
from matplotlib.figure import Figure

from binding.figures import N_NAMES, draw_examples, draw_layer_curve

COLUMNS = [("binding", "", "images", "ratio", "binding ratio"), ("binding", "", "images", "loss_Y", "L_Y, bits")]


def curve(names: list[tuple[str, str]], layers: list) -> Figure:
    rows = [
        {"row": name[0], "control": name[1], "layer": layer, "layer_index": index, "question": "binding", "readout": "",
         "subset": "images",
         "metric": metric, "value": 0.1 * index, "low": 0.1 * index - 0.1, "high": 0.1 * index + 0.1}
        for name in names for index, layer in enumerate(layers) for metric in ("ratio", "loss_Y")
    ]  # fmt: skip
    return draw_layer_curve(rows, COLUMNS)


def test_a_control_has_the_colour_of_its_probe_and_no_interval_hides_another() -> None:
    names = [(row, control) for row in ("cls-linear", "all-attention_quadratic") for control in ("", "random")]
    figure = curve(names, ["embed", 3, 7])
    lines = [container.lines[0] for container in figure.axes[0].containers]
    colors = [line.get_color() for line in lines]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-", "--"]
    assert len({float(line.get_xdata()[0]) for line in lines}) == 4
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[2:] == [f"{label}, random weights" for label in labels[:2]]  # probes left, their controls beside them


def test_a_run_of_one_probe_tells_its_controls_from_it() -> None:
    names = [("probe", ""), ("probe", "random"), ("probe", "pixels")]
    lines = [container.lines[0] for container in curve(names, [0, 1]).axes[0].containers]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 3


def test_the_last_of_many_layers_has_a_tick() -> None:
    labels = [text.get_text() for text in curve([("probe", "")], ["embed", *range(40)]).axes[0].get_xticklabels()]
    assert "39" in labels and len(labels) <= 14


def test_examples_stay_readable_where_a_code_has_hundreds_of_bits() -> None:
    image = torch.zeros(3, 8, 12, dtype=torch.uint8)
    many = [f"thing {i}" for i in range(300)]
    examples = [{"key": "a", "layer": 3, "true": many[:2], "predicted": many[1:], "image": image},
                {"key": "b", "layer": 3, "true": [], "predicted": [], "image": image}]  # fmt: skip
    figure = draw_examples(examples)
    shown = [text.get_text() for text in figure.axes[1].texts]
    assert shown[0] == "2 objects, 299 read" and shown[1:3] == ["thing 1", "thing 0  (missed)"]
    assert shown[-1] == f"and {300 - N_NAMES} more" and len(shown) == N_NAMES + 2 and figure.get_figheight() < 8
