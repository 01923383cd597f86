"""The paper's figures, drawn from measurements. Needs matplotlib, which nothing else does.

Called by `python eval.py data --plot`, `python eval.py log --plot` and `python toy.py study --plot`.
"""

from pathlib import Path

import generate
from sso import UserError

try:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
except ImportError:
    raise UserError("--plot needs matplotlib, which is optional: pip install matplotlib") from None

COLORS = {"PBAA": "tab:orange", "SSO": "tab:blue", "chosen": "tab:green", "rejected": "tab:red",
          "original": "tab:gray", "y+ over yo": "tab:purple"}


def draw(path, panels):
    """Draw panels, functions of a matplotlib axes, beside each other, and save them in the file `path`."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels):
        panel(axis)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:                     # an ending that names no format
        raise UserError(f"--plot {path}: {error}") from None
    pyplot.close(figure)
    print(f"{path}: drawn")


def figure3(axes, rows):
    """Figure 3: on-policy probability of both responses against accuracy of the pairs, of {name: measures};
    an arrow from the first to the second, PBAA to SSO."""
    points = {}
    for name, measures in rows.items():
        points[name] = measures["p(both)"]["mean"], measures["accuracy"]["mean"]
        spread = [cell.get("sd", cell.get("se")) for cell in (measures["p(both)"], measures["accuracy"])]
        axes.errorbar(*points[name], xerr=spread[0], yerr=spread[1], marker="o", capsize=2, label=name)
    first, second, *_ = [*points.values(), None, None]
    if second:
        axes.annotate("", second, first, arrowprops={"arrowstyle": "->", "shrinkA": 8, "shrinkB": 8})
    axes.margins(0.15)
    axes.legend(fontsize=8)
    axes.set(title="Quality of the pairs (Figure 3)", ylabel="accuracy of the pairs",
             xlabel="average probability of both responses under the policy")


def distribution(axes, title, probabilities):
    """Figure 1, measured: how exp(mean token log-prob) under the policy is distributed, of {name: list}."""
    for name, values in probabilities.items():
        axes.hist(values, bins=40, range=(0, 1), density=True, histtype="stepfilled", alpha=0.4, label=name,
                  color=COLORS[name])
    axes.set(title=title, xlabel="exp(mean token log-prob) under the policy", ylabel="density")
    axes.legend()


def over_rounds(axes, title, curves):
    """A measure over rounds, mean and sd over seeds: {name: {round: cell}}."""
    for name, cells in curves.items():
        cells = {int(k): cell for k, cell in cells.items() if cell}
        means, spreads = zip(*((cell["mean"], cell["sd"]) for cell in cells.values()))
        axes.errorbar(list(cells), means, yerr=spreads, marker="o", capsize=2, label=name, color=COLORS[name])
    axes.set(title=title, xlabel="round")
    axes.legend()


def training(files):
    """Panels of training curves from any log.jsonl: loss, margin, accuracy, rewards, gradient norm."""
    logs = {str(path): generate.read_jsonl(path, needs=()) for path in files}
    keys = ("loss", "margin", "accuracy", "chosen_rewards", "rejected_rewards", "grad_norm")

    def panel(key):
        def draw_panel(axes):
            for path, rows in logs.items():
                if key in rows[0]:
                    axes.plot([row["step"] for row in rows], [row[key] for row in rows], label=path)
            axes.set(title=key, xlabel="step")
            if key == keys[0]:
                axes.legend(fontsize=7)
        return draw_panel
    return [panel(key) for key in keys]
