"""Numbers in print: means with their spread, as Markdown tables."""

import math
import statistics


def stat(values):
    """Mean, standard error and number of a list of numbers."""
    error = 0.0
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "se": error, "n": len(values)}


def show(cell):
    if cell is None:
        return "-"
    if isinstance(cell, dict):
        return f"{cell['mean']:.3f} ± {cell.get('sd', cell.get('se')):.3f}"
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return str(cell)


def print_table(rows, columns):
    """Print {row: {column: cell}} as Markdown. A cell is a mean with its spread, a number or a
    word."""
    lines = [["", *columns]]
    for name, row in rows.items():
        lines.append([str(name)] + [show(row.get(column)) for column in columns])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("|", " | ".join(map(str.ljust, line, widths)), "|")
