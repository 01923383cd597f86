"""The paper's measurements: how accurate and how on-policy pairs are (Figure 3), how good policies are, how
well a reward model predicts preferences (Table 2).

    python eval.py data pairs.jsonl [more.jsonl] --policy M [--judge J] [--plot figure3.png]
    python eval.py policy M [N ...] --queries heldout.jsonl [--judge J]
    python eval.py reward --model R --data F [F ...]
    python eval.py answers --model M --queries Q.jsonl --out F.json     # for alpaca_eval
    python eval.py report runs/NAME [runs/OTHER ...]    # a run's table; of several, mean ± sd
    python eval.py log runs/NAME/policy/log.jsonl [...] --plot curves.png

A response's on-policy probability is exp(mean token log-prob) under the policy without principle. The judge
of pairs and answers is a chat model (--judge), or for the toy world's models its grader.
"""

import argparse
import functools
import json
import math
import re
import statistics
import tempfile
from pathlib import Path

import torch

import generate
import sso
import toy

REPORT = ["pairs", "accuracy", "ties", "p(chosen)", "p(rejected)", "quality", "win rate", "words"]


def stat(values):
    """Mean, standard error and number of a list of numbers."""
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "se": se, "n": len(values)}


# ---- The judge -----------------------------------------------------------------------------------

def verdicts(judge, model, pairs):
    """For each (query, a, b), a response being (text, finished): 1 if a is better, 0 if b is, 0.5 if undecided.

    `judge` is a chat model that names the better of two anonymous outputs, m or M, in both orders: undecided
    if the orders disagree. Without one the grader judges answers of toy models, and nobody those of others:
    None."""
    if judge:
        return judge_verdicts(load_judge(judge), [(query, a[0], b[0]) for query, a, b in pairs])
    if generate.world(model) is toy:
        grades = [(toy.grade(query, *a), toy.grade(query, *b)) for query, a, b in pairs]
        return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in grades]


@functools.lru_cache(maxsize=1)
def load_judge(path):
    return generate.load_chat(path, torch.bfloat16 if generate.device.type == "cuda" else torch.float32)


def judge_verdicts(chat, pairs, budget=4096):
    """`verdicts` of a chat model on (query, text a, text b): no text is parsed, the probabilities of the two
    identifiers are compared, at the place where the answer starts."""
    m, M = ("m", False), ("M", False)
    examples = [sso.encode_pairs(chat.tokenizer, chat.end_id, [(sso.judge_messages(query, a, b), m, M),
                                                               (sso.judge_messages(query, b, a), M, m)],
                                 chat.context) for query, a, b in pairs]
    a, b = generate.score(chat, examples, budget, name="judge")[0]          # (2, N): two orders
    votes = (a > b).sum(0) - (a < b).sum(0)                                 # 2 or -2 if both orders agree
    return [1.0 if vote == 2 else 0.0 if vote == -2 else 0.5 for vote in votes.tolist()]


# ---- Measurements --------------------------------------------------------------------------------

def probabilities(chat, examples, budget):
    """exp(mean token log-prob) and tokens of the responses of the first row of N examples: two (2, N)."""
    logps, tokens = (tensor[:, 0].cpu() for tensor in generate.score(chat, examples, budget))
    return (logps / tokens).exp(), tokens


def data(path, policy, judge=None, rows="policy"):
    """Measures of a preference file: pairs, accuracy, on-policy probability of chosen, rejected and both
    under `policy`, lengths in tokens; of the first of `rows` of the pair table. Pairs that teach nothing
    count as ties."""
    chat, s = generate.load_chat(policy), generate.resolve(policy, "policy", {})
    records, examples, dropped = generate.read_pairs(path, rows, chat, s["max_length"])
    probs, tokens = probabilities(chat, examples, s["micro_batch_tokens"])
    firsts = [sso.preference_pairs(record, rows, chat.prompts)[0] for record in records]
    scores = verdicts(judge, policy, [(prompt[-1]["content"], *both) for prompt, *both in firsts])
    measures = {"pairs": len(records), "accuracy": "no judge", "ties": "no judge"}
    if judge:       # of pairs that differ, how many got a verdict by position
        measures["inconsistent"] = stat([float(score == 0.5) for score in scores])
    if scores:
        scores += [0.5] * dropped.total()
        measures |= {"accuracy": stat(scores), "ties": stat([float(score == 0.5) for score in scores])}
    for name, values in (("p(chosen)", probs[0]), ("p(rejected)", probs[1]), ("p(both)", probs.mean(0)),
                         ("tokens chosen", tokens[0]), ("tokens rejected", tokens[1])):
        measures[name] = stat(values.float().tolist())
    return measures


def distributions(path, policy):
    """On-policy probabilities of a preference file's responses, {"chosen": list, "rejected": list, "original":
    list, if the file has them}: Figure 1, measured."""
    chat, s = generate.load_chat(policy), generate.resolve(policy, "policy", {})
    records, lists = generate.read_jsonl(path), {}
    for rows, names in (("policy", ("chosen", "rejected")), ("original", ("chosen", "original"))):
        if names[1] in records[0]:
            examples = [sso.encode_pairs(chat.tokenizer, chat.end_id, sso.preference_pairs(r, rows, chat.prompts),
                                         min(s["max_length"], chat.context)) for r in records]
            lists |= zip(names, probabilities(chat, examples, s["micro_batch_tokens"])[0].tolist())
    return lists


def policies(models, queries, folder, judge=None, **given):
    """Measures of the answers of `models` (name -> checkpoint) to `queries` without principle: quality by
    the grader; by the judge win rate, wins, ties (undecided) and losses against the first model. The answers
    are kept in `folder`."""
    measures, first = {}, None
    for name, model in models.items():
        path = Path(folder, "answers_" + re.sub(r"[^-.\w]", "_", str(name)) + ".jsonl")
        generate.responses(model, queries, path, roles=("original",), **given)
        answers = [(r["prompt"][-1]["content"], (r["original"][-1]["content"], r["original_finished"]))
                   for r in generate.read_jsonl(path)]
        first = first or answers
        row = measures[name] = {"answers": len(answers), "quality": "no judge", "win rate": "no judge"}
        if generate.world(model) is toy:
            row["quality"] = stat([toy.grade(query, *answer) for query, answer in answers])
        pairs = [(query, a, b) for (query, a), (_, b) in zip(answers, first)]
        scores = verdicts(None if answers is first else judge, model, pairs)
        if answers is first and judge:
            scores = [0.5] * len(pairs)
        elif judge and (differ := [score for score, (_, a, b) in zip(scores, pairs) if a[0] != b[0]]):
            row["inconsistent"] = stat([float(score == 0.5) for score in differ])       # verdicts by position
        if scores:
            row["win rate"] = stat(scores)
            row |= {word: scores.count(s) / len(scores) for word, s in (("win", 1), ("tie", 0.5), ("loss", 0))}
        row["words"] = stat([len(text.split()) for _, (text, _) in answers])
        row["finished"] = stat([float(finished) for _, (_, finished) in answers])
    return measures


def reward(model, path):
    """How often a reward model puts chosen above rejected: {"all": stat}, and if the records have a `subset`,
    as RewardBench's do, the same by subset and the "average" over subsets."""
    chat = generate.load_chat(model, of=generate.REWARD)
    if "SequenceClassification" not in str(chat.model.config.architectures):
        raise sso.UserError(f"model {model}: it has no reward head; `python train.py reward` trains one")
    s = generate.resolve(model, "reward", {})
    records, examples, _ = generate.read_pairs(path, "policy", chat, s["max_length"])
    chosen, rejected = generate.score(chat, examples, s["micro_batch_tokens"], of=sso.pair_rewards)[0][:, 0]
    right = ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).tolist()
    subsets = {}
    for record, score in zip(records, right):
        subsets.setdefault(record.get("subset"), []).append(score)
    rows = {name: {"pairs": len(scores), "accuracy": stat(scores)} for name, scores in subsets.items() if name}
    if rows:
        means = [row["accuracy"]["mean"] for row in rows.values()]
        rows["average"] = {"pairs": len(rows), "accuracy": statistics.fmean(means)}
    return rows | {"all": {"pairs": len(right), "accuracy": stat(right)}}


def answers(model, queries, out, **given):
    """Write the answers of a model to `queries` to OUT, as the list of objects that alpaca_eval reads."""
    generate.responses(model, queries, f"{out}.jsonl", roles=("original",), **given)
    made = [{"instruction": r["prompt"][-1]["content"], "output": r["original"][-1]["content"],
             "generator": str(model)} for r in generate.read_jsonl(f"{out}.jsonl")]
    generate.write_text(out, json.dumps(made, indent=1, ensure_ascii=False))


# ---- Tables --------------------------------------------------------------------------------------

def write_report(out, rows, given, judge=None):
    """Measure a run's pairs and policies, and write report.json. `rows`: name -> (pairs or None, the rows of
    the pair table that they are used in, the policy that they are for, the policy trained on them)."""
    path, inputs = out / "report.json", {f"policy {name}": trained for name, (*_, trained) in rows.items()}
    try:
        note = generate.claim(path, {"judge": judge and str(judge)}, inputs)
    except sso.UserError:           # of other policies, or by another judge: measured anew
        path.unlink()
        note = generate.claim(path, {"judge": judge and str(judge)}, inputs)
    if not note:
        return
    generate.write_text(*note)
    report = policies({name: trained for name, (*_, trained) in rows.items()}, out / "heldout.jsonl", out,
                      judge, **given)
    for name, (pairs, used_in, policy, _) in rows.items():
        report[name] |= data(pairs, policy, judge, used_in) if pairs else {}
    generate.write_text(path, json.dumps(report, indent=1))


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


def over_runs(runs, pairs, columns=REPORT):
    """Of several reports {row: {column: stat}}: rows of mean and sd over runs, and for each (a, b) of `pairs`
    a row "a - b" of the mean paired difference and its standard error."""
    def means(name, column):            # one a run; none if a run does not have it
        cells = [run.get(name, {}).get(column) for run in runs]
        return [cell["mean"] for cell in cells] if all(isinstance(cell, dict) for cell in cells) else []
    rows = {name: {column: {"mean": statistics.fmean(values), "sd": stat(values)["se"] * len(values) ** 0.5}
                   for column in columns if (values := means(name, column))} for name in runs[0]}
    paired = {f"{a} - {b}": {column: stat([x - y for x, y in zip(means(a, column), means(b, column))])
                             for column in columns if means(a, column) and means(b, column)} for a, b in pairs}
    return rows, paired


def print_report(folders):
    """The table of a run; of several mean ± sd over runs, and paired differences ± standard error."""
    runs = []
    for folder in folders:
        path = Path(folder, "report.json")
        if not path.exists():
            raise sso.UserError(f"{path}: no such file; `python train.py --out {folder}` writes it")
        runs.append(json.loads(path.read_text(encoding="utf-8")))
    if len(runs) == 1:
        print("\nmean ± standard error over pairs and over held-out queries; pairs that teach nothing are ties:\n")
        return print_table(runs[0], REPORT)
    names = list(runs[0])
    rows, paired = over_runs(runs, [(a, b) for i, a in enumerate(names) for b in names[:i]])
    print(f"mean ± standard deviation over {len(runs)} runs:\n")
    print_table(rows, REPORT[1:])
    print("\npaired difference ± standard error over runs:\n")
    print_table(paired, REPORT[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    model = {"metavar": "M", "help": "checkpoint folder or Hugging Face id"}
    judge = {"metavar": "J", "help": "chat model that judges (default: the toy world's grader)"}
    command = commands.add_parser("data", help="measure preference files")
    command.add_argument("files", nargs="+", metavar="F", help="preference file (JSONL)")
    command.add_argument("--policy", required=True, **model)
    command.add_argument("--judge", **judge)
    command.add_argument("--plot", metavar="FILE", help="draw Figure 3 (needs matplotlib)")
    command = commands.add_parser("policy", help="measure policies by their answers")
    command.add_argument("models", nargs="+", metavar="M", help="checkpoints; the first is compared with")
    command.add_argument("--queries", required=True, metavar="FILE", help="held-out queries (JSONL)")
    command.add_argument("--out", metavar="DIR", help="keep the answers here, and continue from them")
    command.add_argument("--judge", **judge)
    generate.add_settings(command, "responses")
    command = commands.add_parser("reward", help="measure a reward model")
    command.add_argument("--model", required=True, **model)
    command.add_argument("--data", required=True, nargs="+", metavar="F", help="preference file (JSONL)")
    command = commands.add_parser("answers", help="write answers for alpaca_eval")
    command.add_argument("--model", required=True, **model)
    command.add_argument("--queries", required=True, metavar="FILE", help="queries (JSONL)")
    command.add_argument("--out", required=True, metavar="FILE", help="JSON file to write")
    generate.add_settings(command, "responses")
    command = commands.add_parser("report", help="print the table of one run, or of several together")
    command.add_argument("folders", nargs="+", metavar="DIR", help="folder of a run of train.py")
    command = commands.add_parser("log", help="draw training curves")
    command.add_argument("files", nargs="+", metavar="F", help="log.jsonl of a training")
    command.add_argument("--plot", required=True, metavar="FILE", help="picture to write (needs matplotlib)")
    args = vars(parser.parse_args())
    {"data": data_command, "policy": policy_command, "reward": reward_command, "answers": answers,
     "report": print_report, "log": log_command}[args.pop("command")](**args)


def all_columns(rows):
    return list(dict.fromkeys(column for row in rows.values() for column in row))


def data_command(files, policy, judge, plot):
    if plot:
        import figures          # says now if matplotlib is missing
        if not judge and generate.world(policy) is not toy:
            raise sso.UserError("Figure 3 needs a judge: give --judge")
    rows = {path: data(path, policy, judge) for path in files}
    print_table(rows, all_columns(rows))
    if plot:
        lists = {path: distributions(path, policy) for path in files}
        figures.draw(plot, [lambda axes: figures.figure3(axes, rows)] + [
            lambda axes, path=path: figures.distribution(axes, path, lists[path]) for path in files])


def policy_command(models, queries, out, judge, **given):
    with tempfile.TemporaryDirectory() as temporary:
        rows = policies(dict(zip(models, models)), queries, out or temporary, judge, **given)
    print_table(rows, all_columns(rows))


def reward_command(model, data):
    for path in data:
        print(f"\n{path}:\n")
        print_table(reward(model, path), ["pairs", "accuracy"])


def log_command(files, plot):
    import figures
    figures.draw(plot, figures.training(files))


if __name__ == "__main__":
    generate.run(main)
