"""What `mptrain sweep` shows of a sweep: a table, a plot, and what to do."""

from __future__ import annotations

import math
import shlex
import shutil
import statistics
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mpcli.cli.console import show_table, write
from mpcli.recipe.render import visible
from mpcli.sizes import metric_text
from mpcli.sweep.text import power_text, share_text

if TYPE_CHECKING:
    from mpcli.sweep.prediction import Prediction
    from mpcli.sweep.results import SweepResult

_Row = Mapping[str, Any]

_PIPED, _WIDEST = 80, 120  # columns of the plot: where there is no terminal, and on a wide one
_HEIGHT = 14  # its lines
_MARKS = {  # in the order of drawing
    ("predicted", "overflow"): ":",
    ("measured", "overflow"): "x",
    ("predicted", "underflow"): ".",
    ("measured", "underflow"): "o",
}
_LARGE = 1000  # elements: the shares of smaller layers are coarse
_NAMES = {"underflow": "lost", "overflow": "overflow"}


def show_loss_scale(result: SweepResult, prediction: Prediction) -> None:
    """Predicted beside measured, as a table and as a plot."""
    header = ("scale", "predicted\nlost", "subn.", "inf", "measured\nlost", "inf", "loss", "skips",
              "cosine")  # fmt: skip
    losses = [trial.loss for trial in result.trials if trial.label == "fp32"]
    known = [loss for loss in losses if loss is not None]
    loss = statistics.fmean(known) if known else None
    reference = ("fp32", *["-"] * 5, _loss(loss), "-", "-")
    show_table(
        f"{result.name}: {result.steps:,} steps at each loss scale",
        header,
        [reference, *map(_scale_row, result.rows)],
    )
    write(
        _wrapped(
            "Shares of the gradients that are not zero in fp32: lost become zero in fp16, subn. "
            "keep fewer bits, inf overflow. cosine: of the gradient with that in fp32."
        )
    )
    for trial in result.trials:
        if trial.status != "done":
            why = f": {trial.reason}" if trial.reason else ""
            text = f"{trial.label} seed {trial.seed}: {trial.status}{why}"
            write(_wrapped(visible(text)))
    if prediction.histograms:
        write(f"\n{_plot(result.rows, prediction)}")
    if result.recommended and (worst := _worst(result.recommended, prediction)):
        text = f"Predicted to lose most, of those with more than {_LARGE:,} elements: {worst}."
        write(f"\n{_wrapped(visible(text))}")


def _worst(recommended: _Row, prediction: Prediction) -> str:
    """The layer that loses most at the knee, and that at the recommended scale."""
    from mpcli.sweep.recommendation import RELIABLE

    scales = {recommended["knee"]: "the knee", recommended["init_scale"]: "the recommended"}
    found = []
    for scale, name in scales.items():
        if scale is None or scale < RELIABLE:
            continue
        layers = [one for one in prediction.layers(scale) if one.elements > _LARGE]
        worst = max(layers, key=lambda one: one.fractions.underflow, default=None)
        if worst and worst.fractions.underflow:
            lost = share_text(worst.fractions.underflow)
            found.append(f"at {name} {power_text(scale)} `{worst.name}`, {lost}")
    return "; ".join(found)


def _scale_row(row: _Row) -> tuple[str, ...]:
    predicted, measured = row["predicted"] or {}, row["measured"] or {}
    expected = tuple(_share(predicted.get(name)) for name in ("underflow", "subnormal", "overflow"))
    if predicted and not predicted["reliable"]:
        expected = ("unreliable", "-", "-")
    seen = tuple(_share(measured.get(name)) for name in ("underflow", "overflow"))
    cosine = row["cosine"]
    return (
        _label(row),
        *expected,
        *seen,
        _loss(row["loss"]),
        _share(row["skip_rate"]),
        "-" if cosine is None else f"{cosine:.4f}",
    )


def _label(row: _Row) -> str:
    """Of a run that confirms an answer: `advised`, `advised-2`, ..."""
    _, confirming, number = row["label"].partition("recommended")
    return f"advised{number}" if confirming else scale_text(row["scale"])


def scale_text(scale: float | str) -> str:
    """`2^16 65536`; a number that is long without its power is left out."""
    if isinstance(scale, str):
        return scale
    power, plain = power_text(scale), f"{scale:.10g}"
    return f"{power} {plain}" if power != plain and len(plain) <= 5 else power


def _share(value: float | None) -> str:
    return "-" if value is None else share_text(value)


def _loss(value: float | None) -> str:
    """In at most 7 cells."""
    if value is None:
        return "-"
    if not value or 1e-3 <= abs(value) < 100:
        return f"{value:.4f}"
    return f"{value:.4g}" if 1 <= abs(value) < 1e4 else f"{value:.1e}"


def _plot(rows: Iterable[_Row], prediction: Prediction) -> str:
    """The shares over the loss scale, in plain characters."""
    import plotext

    from mpcli.sweep.prediction import SCALES
    from mpcli.sweep.recommendation import RELIABLE

    measured = [row for row in rows if row["scale"] != "dynamic" and row["measured"]]
    tried = {row["scale"]: row["measured"] for row in measured}
    expected = {s: prediction.total(s).model_dump() for s in SCALES if s >= RELIABLE}
    plotext.terminal.limit(False, False)
    figure = plotext.figure
    figure.clear()
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPED
    figure.plot_size(min(columns, _WIDEST), _HEIGHT)
    figure.ruler(1, 0).lim(0, 100)
    low, high = (math.log2(end({*tried, *expected})) for end in (min, max))
    ticks = range(4 * math.ceil(low / 4), math.floor(high) + 1, 4)
    figure.ruler(0, 0).ticks(list(ticks), [f"2^{power}" for power in ticks])
    for (source, name), mark in _MARKS.items():
        shares = {"predicted": expected, "measured": tried}[source]
        powers = [math.log2(scale) for scale in shares]
        percent = [100 * share[name] for share in shares.values()]
        if powers:
            signal = figure.signal(powers, percent, marker=mark)
            signal.lines(source == "predicted")
            figure.draw(signal)
    lines = plotext.uncolorize(figure.build().string()).splitlines()
    legend = ", ".join(
        f"`{mark}` {source} {_NAMES[name]}" for (source, name), mark in _MARKS.items()
    )
    title = _wrapped(f"% of the gradients over the loss scale: {legend}")
    return "\n".join([title, *(line.rstrip() for line in lines if line.strip())])


def show_recommended(recommended: _Row, patch: str | None, *, given: bool) -> None:
    """What to do about the loss scale, and why; the recipe's change as a patch.

    Args:
        given: the command had `--set`, which the patch holds.
    """
    write("")
    write(_wrapped(visible(recommended["why"])))
    if setting := recommended["set"]:
        write(f"\n  --set {shlex.quote(setting)}")
    if patch:
        if given:
            write("\nThe patch holds every `--set` of this command as well:")
        write("\n" + patch.removesuffix("\n"))


def show_precision(result: SweepResult) -> None:
    """Modes side by side, and which differences are more than chance."""
    rows, seeds = result.rows, len(result.seeds)
    metric, reference = rows[0]["metric"], rows[0]["reference"]
    show_table(
        _title(result),
        ("mode", metric, f"minus {reference}", "p", "a step", "time", "memory"),
        [_mode_row(row) for row in rows],
    )
    if seeds == 1:
        write("One seed: no standard errors and no test. `--seeds 5` says what is chance.")
    else:
        compared = [row["p"] for row in rows if row["mode"] != reference]
        tested = sum(p is not None for p in compared)
        corrected = f", after Holm's correction for {tested} tests" if tested > 1 else ""
        untested = " No p: fewer than two pairs, or all with the same difference."
        write(
            _wrapped(
                f"± standard error of the mean; differences are of pairs with the same seed. "
                f"* significant: p < 0.05 of a paired t-test{corrected}."
                f"{untested if tested < len(compared) else ''}"
            )
        )
    _show_failed((row["mode"], row) for row in rows)


def _mode_row(row: _Row) -> tuple[str, ...]:
    metric = row["metric"]
    difference, p = "-", "-"
    if (mean := row.get("difference")) is not None:
        difference = _signed(metric, mean, row["difference_standard_error"])
        if (adjusted := row["p_holm"]) is not None:
            p = f"{adjusted:.3f}" + (" *" if row["significant"] else "")
    return (
        row["mode"],
        _mean(row),
        difference,
        p,
        seconds_text(row["seconds_per_step"]),
        _times(row["seconds_per_step_ratio"]),
        _times(row["peak_memory_bytes_ratio"]),
    )


def show_grid(result: SweepResult) -> None:
    """Settings by what they reach, the best first, as they are typed."""
    rows = result.rows
    seeds = len(result.seeds)
    show_table(
        _title(result),
        (rows[0]["metric"], "skipped", "a step", "setting"),
        [
            (_mean(row), f"{row['skipped']:.4g}", seconds_text(row["seconds_per_step"]),
             " ".join(row["set"]))
            for row in rows
        ],
    )  # fmt: skip
    if seeds == 1:
        write("One seed: no standard errors. `--seeds 5` says what is chance.")
    _show_failed((" ".join(row["set"]), row) for row in rows)
    if result.recommended:
        typed = " ".join(f"--set {shlex.quote(s)}" for s in result.recommended["set"])
        write(f"\nThe best:\n  {typed}")


def _show_failed(rows: Iterable[tuple[str, _Row]]) -> None:
    for name, row in rows:
        if left_out := row["runs"] - row["finished"]:
            runs = f"{left_out} of {row['runs']} runs are left out"
            write(_wrapped(visible(f"{name}: {runs} ({'; '.join(row['failed'])})")))


def _title(result: SweepResult) -> str:
    """The recipe, how long its runs are where all are as long, and how often each is run."""
    seeds = len(result.seeds)
    lengths = {trial.steps for trial in result.trials if trial.status == "done"}
    steps = f"{lengths.pop():,} steps, " if len(lengths) == 1 else ""
    return f"{result.name}: {steps}{seeds} {'seed' if seeds == 1 else 'seeds'}"


def _mean(row: _Row) -> str:
    if row["mean"] is None:
        return "-"
    error = row["standard_error"]
    text = metric_text(row["metric"], row["mean"])
    return text if error is None else f"{text} ± {_plain(row['metric'], error)}"


def _signed(metric: str, mean: float, error: float | None) -> str:
    text = _plain(metric, mean)
    text = text if text.startswith("-") else f"+{text}"
    return text if error is None else f"{text} ± {_plain(metric, error)}"


def _plain(metric: str, value: float) -> str:
    """Without the percent sign of what it is added to."""
    return metric_text(metric, value).removesuffix("%")


def seconds_text(value: float | None) -> str:
    """A step's time for people."""
    if value is None:
        return "-"
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _wrapped(text: str) -> str:
    """A paragraph in the width of the terminal; of other streams in one line."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
