"""Learning curves and what is said of fits that had not converged."""

import pytest

from show.convergence import marks, sentences
from show.learning import draw_learning_curves
from tasks import FitReport, ProbeResult


def history(layers: list, n_epochs: int = 4, variants: tuple = ("all",), name: str = "probe", stop: int = 99) -> list[dict]:
    fits = [[variant, seed] for variant in variants for seed in (0, 1)]
    loss = lambda epoch: [[None if epoch > stop else 1 / epoch] * len(layers)] * len(fits)
    return [
        {"kind": "epoch", "name": name, "layer": str(layers), "epoch": epoch, "fits": fits, "train_loss": loss(epoch),
         "val_loss": loss(epoch)}
        for epoch in range(1, n_epochs + 1)
    ]  # fmt: skip


def report(layer: int | str, **changes: object) -> FitReport:
    fit = FitReport("", "all", 0, layer, 4, 3, 0.5, False, 4, False)
    return fit._replace(**changes)


def as_record(fit: FitReport, name: str = "probe") -> dict:
    return {"kind": "fit", "name": name, **fit._asdict()}


def test_every_subject_has_a_panel_and_every_layer_a_colour() -> None:
    layers = ["embed", *range(24)]
    figure = draw_learning_curves(history(layers[:9]) + history(layers[9:]) + history([0], name="random/Y"), [])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["probe", "random/Y"]
    full = [line for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    assert len(full) == 25 == len({str(line.get_color()) for line in full})


def test_the_kept_epoch_is_marked_and_so_is_a_fit_that_still_fell() -> None:
    fits = [as_record(report(0)), as_record(report(1, still_falling=True, best_epoch=4))]
    axes = draw_learning_curves(history([0, 1]), fits).axes[0]
    marked = [(line.get_marker(), float(line.get_xdata()[0])) for line in axes.lines if line.get_marker() in "ov"]
    assert marked == [("o", 3.0), ("o", 4.0), ("v", 4.0)]


def test_a_curve_ends_where_its_fit_was_stopped_and_one_epoch_is_visible() -> None:
    (axes,) = draw_learning_curves(history([0], stop=2), []).axes
    assert sum(value == value for value in axes.lines[1].get_ydata()) == 2
    (axes,) = draw_learning_curves(history([0], n_epochs=1), []).axes
    assert all(line.get_marker() == "." for line in axes.lines)


def test_variants_have_panels_of_their_own_and_losses_their_unit() -> None:
    figure = draw_learning_curves(history([0], variants=("all", "foreground")), [])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["probe, all", "probe, foreground"]
    (axes,) = draw_learning_curves(history([0], name="cls/Y"), [], {"Y": (36.0, "bits per image")}).axes
    assert axes.get_ylabel() == "loss, bits per image" and axes.lines[1].get_ydata()[0] == pytest.approx(36.0)


def test_bad_endings_have_a_mark_and_a_sentence_with_the_epochs_that_would_do() -> None:
    fits = [report(0), report(3, still_falling=True, epochs_needed=11), report(7, still_falling=True, epochs_needed=17)]
    probe = ProbeResult("probe", "", "probe", [0, 3, 7], [0], [], fits=fits)
    random = ProbeResult("probe", "random", "random", [0], [0], [], fits=[report(0, worse_than_constant=True)])
    assert [marks(probe, layer) for layer in (0, 3, 7)] == ["", "↓", "↓"] and marks(random) == "!"
    falling, worse = sentences([probe, random])
    assert "probe (layer 3, 7)" in falling and "about 17 epochs would do (trainer.epochs=17)" in falling
    assert worse.startswith("! worse than a constant answer on validation: random (layer 0)")
    assert sentences([probe._replace(fits=fits[:1])]) == []


def test_a_fit_too_short_to_judge_gets_no_number_of_epochs() -> None:
    fits = [report(0, still_falling=True, epochs_needed=0, epochs=2)]
    (sentence,) = sentences([ProbeResult("probe", "", "probe", [0], [0], [], fits=fits)])
    assert "too few epochs" in sentence and "trainer.epochs=8" in sentence
