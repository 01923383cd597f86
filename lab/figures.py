"""The paper's figures, drawn from measurements. They need matplotlib; nothing else does.

    python -m lab.figures pairs F.jsonl [G.jsonl] --policy M --grader F.py --out figure3.png
    python -m lab.figures report results/qwen-gpu.json --out figure3.svg
    python -m lab.figures log runs/toy/policy/log.jsonl [...] --out curves.png
"""

from functools import partial
from pathlib import Path

import eval as evaluation
import sso
from plumbing import command
from plumbing.models import load_chat
from plumbing.recipes import stage_settings
from plumbing.records import UserError, read_json, read_jsonl

try:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

COLORS = {"chosen": "tab:green", "rejected": "tab:red", "original": "tab:gray"}
LOGGED = ("loss", "margin", "reward_accuracy", "chosen_rewards", "rejected_rewards", "p(original)")


def check_matplotlib():
    if pyplot is None:
        raise UserError("figures need matplotlib, which is optional: pip install matplotlib")


def draw(path, panels):
    """Draw panels, functions of a matplotlib axes, beside each other, and save them."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels):
        panel(axis)
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:                     # an ending that names no format
        raise UserError(f"{path}: {error}") from None
    pyplot.close(figure)
    print(f"{path}: drawn")


# ---- Panels --------------------------------------------------------------------------------------

def figure3(rows, axes):
    """The probability of both responses against the accuracy of the pairs, for {name: measures},
    with standard errors. An arrow leads from the first point, PBAA, to the second, SSO."""
    points = []
    for name, measures in rows.items():
        chosen, rejected, y = (measures[key] for key in ("p(chosen)", "p(rejected)", "accuracy"))
        x = (chosen["mean"] + rejected["mean"]) / 2
        axes.errorbar(x, y["mean"], xerr=(chosen["se"] + rejected["se"]) / 2, yerr=y["se"],
                      marker="o", capsize=2, label=name)
        points.append((x, y["mean"]))
    if len(points) > 1:
        axes.annotate("", points[1], points[0], arrowprops={"arrowstyle": "->"})
    axes.legend()
    axes.set(title="Quality of the pairs (Figure 3)", ylabel="accuracy of the pairs",
             xlabel="average probability of both responses under the policy")


def distributions(path, policy, recipe):
    """{column: p(·) of its responses under the policy}: what Figure 1 sketches."""
    chat = load_chat(policy, "fast")
    records = read_jsonl(path)
    settings = stage_settings(recipe, "policy")
    return {column: evaluation.probabilities(chat, records, role, settings, recipe["prompts"])
            for role, column in sso.COLUMNS.items()}


def figure1(title, lists, axes):
    """How p(·) is distributed, for {column: list}."""
    for column, values in lists.items():
        if values:
            axes.hist(values, bins=40, range=(0, 1), density=True, histtype="stepfilled",
                      alpha=0.4, label=column, color=COLORS[column])
    axes.set(title=title, xlabel="exp(mean token log-prob) under the policy", ylabel="density")
    axes.legend()


def training_curve(key, logs, axes):
    """One number of log.jsonl over the steps, {path: rows}."""
    for path, rows in logs.items():
        shown = [row for row in rows if key in row]
        axes.plot([row["step"] for row in shown], [row[key] for row in shown], label=path)
    axes.set(title=key, xlabel="step")
    axes.legend()


# ---- Commands ------------------------------------------------------------------------------------

def pairs(files, policy, out, recipe, grader=None, judge=None,
          judge_pairs: int = evaluation.JUDGE_PAIRS):
    """Draw Figure 3, and Figure 1 measured, of preference files."""
    check_matplotlib()
    critic, limit = evaluation.load_critic(grader, judge, judge_pairs, recipe["prompts"])
    if critic is None:
        raise UserError("Figure 3 needs a critic: give --grader or --judge")
    rows = {}
    panels = [partial(figure3, rows)]
    for path in files:
        rows[path] = evaluation.measure_pairs(path, policy, critic, recipe, limit=limit)
        panels.append(partial(figure1, path, distributions(path, policy, recipe)))
    draw(out, panels)


def report(files, out):
    """Draw Figure 3 of the arms in reports, or in files of results."""
    check_matplotlib()
    panels = []
    for path in files:
        rows = read_json(path)["rows"]
        arms = {name: row for name, row in rows.items() if "accuracy" in row}
        panels.append(partial(figure3, arms))
    draw(out, panels)


def log(files, out):
    """Draw training curves, of log.jsonl files."""
    check_matplotlib()
    logs = {path: read_jsonl(path, needs=()) for path in files}
    draw(out, [partial(training_curve, key, logs) for key in LOGGED])


if __name__ == "__main__":
    command.run(__doc__, pairs, report, log)
