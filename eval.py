"""The paper's measurements: how accurate and how on-policy pairs are (Figure 3), how good policies are.

    python eval.py data pairs.jsonl [more.jsonl] --policy M
    python eval.py policy M [N ...] --queries heldout.jsonl
    python eval.py report runs/NAME [runs/OTHER ...]    # a run's table; of several, mean ± sd

A response's on-policy probability is exp(mean token log-prob) under the policy without principle. Accuracy
and quality are what the toy world's grader says; a real model has no judge yet, and the tables say so.
"""

import argparse
import json
import math
import re
import statistics
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

import generate
import sso
import toy

REPORT = ["pairs", "answers", "accuracy", "ties", "p(chosen)", "p(rejected)", "quality", "win rate", "words"]


def stat(values):
    """Mean, standard error and number of a list of numbers."""
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "se": se, "n": len(values)}


def win(a, b):
    """1 for a win of a over b, a half for a tie, 0 for a loss."""
    return 0.5 + 0.5 * ((a > b) - (a < b))


@torch.no_grad()
def data(path, policy):
    """Measures of a preference file: pairs, accuracy, on-policy probability of chosen, rejected and both
    under `policy`, lengths in tokens. Pairs that were dropped as equal or empty count as ties."""
    chat, s = generate.load_chat(policy), generate.resolve(policy, "policy", {})
    records, examples = generate.read_pairs(path, "policy", chat, s["max_length"])
    probs, lengths = torch.zeros(2, len(examples)), torch.zeros(2, len(examples))      # chosen, rejected
    groups = sso.micro_batches(examples, s["micro_batch_tokens"])
    for group in tqdm(groups, desc=f"scoring {path}", leave=False):
        with generate.autocast():
            logps, tokens = sso.pair_logps(chat.model, [examples[i] for i in group], chat.pad_id)  # (2, 1, b)
        probs[:, group] = (logps / tokens).exp()[:, 0].cpu()
        lengths[:, group] = tokens[:, 0].float().cpu()
    measures = {"pairs": len(records), "accuracy": "no judge"}
    if generate.world(policy) is toy:
        grades = [[toy.grade(record["prompt"][-1]["content"], record[column][-1]["content"],
                             record.get(f"{column}_finished", True)) for column in ("chosen", "rejected")]
                  for record in records]
        wins = [win(*pair) for pair in grades] + [0.5] * sum(generate.dropped(path).values())
        measures["accuracy"] = stat([float(w == 1) for w in wins])
        measures["ties"] = stat([float(w == 0.5) for w in wins])
    for name, values in (("p(chosen)", probs[0]), ("p(rejected)", probs[1]), ("p(both)", probs.mean(0)),
                         ("tokens chosen", lengths[0]), ("tokens rejected", lengths[1])):
        measures[name] = stat(values.tolist())
    return measures


def policies(models, queries, folder, **given):
    """Measures of the answers of `models` (name -> checkpoint) to `queries` without principle: quality, and
    win, tie and loss against the first model. The answers are kept in `folder`."""
    measures, first = {}, None
    for name, model in models.items():
        path = Path(folder, "answers_" + re.sub(r"[^-.\w]", "_", str(name)) + ".jsonl")
        generate.responses(model, queries, path, roles=("original",), **given)
        answers = [(r["prompt"][-1]["content"], r["original"][-1]["content"], r["original_finished"])
                   for r in generate.read_jsonl(path)]
        measures[name] = {"answers": len(answers), "quality": "no judge", "win rate": "no judge",
                          "words": stat([len(text.split()) for _, text, _ in answers]),
                          "finished": stat([float(finished) for *_, finished in answers])}
        if generate.world(model) is toy:
            quality = [toy.grade(*answer) for answer in answers]
            first = first or quality
            wins = [win(*pair) for pair in zip(quality, first)]
            measures[name] |= {"quality": stat(quality), "win rate": stat(wins)}
            for word, score in (("win", 1), ("tie", 0.5), ("loss", 0)):
                measures[name][word] = wins.count(score) / len(wins)
    return measures


# ---- Tables --------------------------------------------------------------------------------------

def write_report(out, base, given):
    """Measure a run's pairs and policies, and write report.json."""
    models = {"base": base, "PBAA": out / "pbaa", "SSO": out / "policy"}
    rows = policies(models, out / "heldout.jsonl", out, **given)
    for name, file in (("PBAA", "responses.jsonl"), ("SSO", "pairs.jsonl")):
        rows[name] = data(out / file, base) | rows[name]
    generate.write_text(out / "report.json", json.dumps(rows, indent=1))


def print_table(rows, columns):
    """Print {row: {column: cell}} as Markdown. A cell is a mean with its spread, a number or a word."""
    def show(cell):
        if isinstance(cell, dict):
            return f"{cell['mean']:.3f} ± {cell.get('sd', cell.get('se')):.3f}"
        return "-" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)
    table = [["", *columns]]
    table += [[str(name), *(show(row.get(column)) for column in columns)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    for line in table:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")


def print_report(folders):
    """The table of a run; of several mean ± sd over runs, and paired differences ± standard error."""
    runs = []
    for folder in folders:
        path = Path(folder, "report.json")
        if not path.exists():
            raise sso.UserError(f"{path}: no such file; `python train.py --out {folder}` writes it")
        runs.append(json.loads(path.read_text(encoding="utf-8")))
    if len(runs) == 1:
        print("\nmean ± standard error over pairs and over held-out queries; dropped pairs count as ties:\n")
        return print_table(runs[0], REPORT)

    def means(name, column):            # one a run; none if a run does not have it
        cells = [run[name].get(column) for run in runs]
        return [cell["mean"] for cell in cells] if all(isinstance(cell, dict) for cell in cells) else []
    rows = {name: {column: {"mean": statistics.fmean(values), "sd": statistics.stdev(values)}
                   for column in REPORT if (values := means(name, column))} for name in runs[0]}
    paired = {f"{a} - {b}": {column: stat([x - y for x, y in zip(means(a, column), means(b, column))])
                             for column in REPORT if means(a, column) and means(b, column)}
              for a, b in (("PBAA", "base"), ("SSO", "base"), ("SSO", "PBAA"))}
    print(f"mean ± standard deviation over {len(runs)} runs:\n")
    print_table(rows, REPORT[2:])
    print("\npaired difference ± standard error over runs:\n")
    print_table(paired, REPORT[2:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("data", help="measure preference files")
    command.add_argument("files", nargs="+", metavar="F", help="preference file (JSONL)")
    command.add_argument("--policy", required=True, metavar="M", help="checkpoint folder or Hugging Face id")
    command = commands.add_parser("policy", help="measure policies by their answers")
    command.add_argument("models", nargs="+", metavar="M", help="checkpoints; the first is compared with")
    command.add_argument("--queries", required=True, metavar="FILE", help="held-out queries (JSONL)")
    command.add_argument("--out", metavar="DIR", help="keep the answers here, and continue from them")
    generate.add_settings(command, "responses")
    command = commands.add_parser("report", help="print the table of one run, or of several together")
    command.add_argument("runs", nargs="+", metavar="DIR", help="folder of a run of train.py")
    args = vars(parser.parse_args())
    command = args.pop("command")
    if command == "report":
        return print_report(args["runs"])
    if command == "data":
        rows = {path: data(path, args["policy"]) for path in args["files"]}
    else:
        models, queries, out = args.pop("models"), args.pop("queries"), args.pop("out")
        with tempfile.TemporaryDirectory() as temporary:
            rows = policies(dict(zip(models, models)), queries, out or temporary, **args)
    print_table(rows, list(rows[next(iter(rows))]))


if __name__ == "__main__":
    generate.run(main)
