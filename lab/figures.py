"""The paper's figures, drawn from measurements. Needs matplotlib, which nothing else does.

    python -m lab.figures pairs F.jsonl [G.jsonl] --policy M --grader F.py --out figure3.png
    python -m lab.figures log runs/toy/policy/log.jsonl [...] --out curves.png
"""

from functools import partial
from pathlib import Path

import eval as evaluation
from plumbing import cli
from plumbing.chat import load_chat
from plumbing.files import UserError, read_jsonl

try:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

COLORS = {"PBAA": "tab:orange", "SSO": "tab:blue", "chosen": "tab:green", "rejected": "tab:red",
          "original": "tab:gray", "y+ over yo": "tab:purple"}


def check_matplotlib():
    if pyplot is None:
        raise UserError("figures need matplotlib, which is optional: pip install matplotlib")


def draw(path, panels):
    """Draw panels, functions of a matplotlib axes, beside each other, and save them."""
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
        raise UserError(f"{path}: {error}") from None
    pyplot.close(figure)
    print(f"{path}: drawn")


# ---- Panels --------------------------------------------------------------------------------------

def both(measures):
    """Figure 3's x: the mean of p(chosen) and p(rejected), with half the sum of their spreads."""
    cells = measures["p(chosen)"], measures["p(rejected)"]
    spreads = [cell.get("sd", cell.get("se")) for cell in cells]
    return (cells[0]["mean"] + cells[1]["mean"]) / 2, sum(spreads) / 2


def figure3(rows, axes):
    """On-policy probability of both responses against accuracy of the pairs, of {name: measures};
    an arrow from the first to the second, PBAA to SSO."""
    points = []
    for name, measures in rows.items():
        x, x_spread = both(measures)
        y = measures["accuracy"]["mean"]
        y_spread = measures["accuracy"].get("sd", measures["accuracy"].get("se"))
        axes.errorbar(x, y, xerr=x_spread, yerr=y_spread, marker="o", capsize=2, label=name)
        points.append((x, y))
    if len(points) > 1:
        axes.annotate("", points[1], points[0],
                      arrowprops={"arrowstyle": "->", "shrinkA": 8, "shrinkB": 8})
    axes.margins(0.15)
    axes.legend(fontsize=8)
    axes.set(title="Quality of the pairs (Figure 3)", ylabel="accuracy of the pairs",
             xlabel="average probability of both responses under the policy")


def distributions(path, policy, recipe):
    """{column: p(·) of its responses under the policy}: what Figure 1 sketches."""
    chat, records = load_chat(policy), read_jsonl(path)
    lists = {}
    for column, role in (("chosen", "good"), ("rejected", "bad"), ("original", "original")):
        values = evaluation.probabilities(chat, path, records, role, recipe)
        if values:
            lists[column] = values
    return lists


def figure1(title, lists, axes):
    """How p(·) is distributed, of {name: list}."""
    for name, values in lists.items():
        axes.hist(values, bins=40, range=(0, 1), density=True, histtype="stepfilled", alpha=0.4,
                  label=name, color=COLORS[name])
    axes.set(title=title, xlabel="exp(mean token log-prob) under the policy", ylabel="density")
    axes.legend()


def over_rounds(title, curves, axes):
    """A measure over rounds, mean and sd over seeds: {name: {round: cell}}."""
    for name, cells in curves.items():
        rounds = [number for number, cell in cells.items() if cell]
        axes.errorbar([int(number) for number in rounds],
                      [cells[number]["mean"] for number in rounds],
                      yerr=[cells[number]["sd"] for number in rounds],
                      marker="o", capsize=2, label=name, color=COLORS.get(name))
    axes.set(title=title, xlabel="round")
    axes.legend()


def training_curve(key, logs, axes):
    """One number of log.jsonl over the steps, {path: rows}."""
    for path, rows in logs.items():
        if key in rows[0]:
            shown = [row for row in rows if key in row]
            axes.plot([row["step"] for row in shown], [row[key] for row in shown], label=path)
    axes.set(title=key, xlabel="step")
    axes.legend(fontsize=7)


# ---- Commands ------------------------------------------------------------------------------------

def draw_pairs(files, policy, out, recipe, grader=None, judge=None,
               judge_pairs: int = evaluation.JUDGE_PAIRS):
    """Figure 3, and Figure 1 measured, of preference files."""
    check_matplotlib()
    critic, limit = evaluation.load_critic(grader, judge, judge_pairs, recipe["prompts"])
    if critic is None:
        raise UserError("Figure 3 needs a critic: give --grader or --judge")
    rows, panels = {}, []
    for path in files:
        rows[path] = evaluation.measure_pairs(path, policy, critic, recipe, limit=limit)
        panels.append(partial(figure1, path, distributions(path, policy, recipe)))
    draw(out, [partial(figure3, rows), *panels])


def draw_logs(files, out):
    """Training curves, of log.jsonl files."""
    check_matplotlib()
    logs = {path: read_jsonl(path, needs=()) for path in files}
    keys = ("loss", "margin", "accuracy", "chosen_rewards", "rejected_rewards", "p(original)")
    draw(out, [partial(training_curve, key, logs) for key in keys])


if __name__ == "__main__":
    cli.run(__doc__, ("pairs", draw_pairs, []), ("log", draw_logs, []))
