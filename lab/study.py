"""The paper's tables in miniature, in the toy world. What is compared, and how: lab/study.toml.

    python -m lab.study run --seeds 5 [--rounds 6] [--base toy/base]
    python -m lab.study tables                          # those of results/study.json again
    python -m lab.study search                          # where the settings of the arms come from
    python -m lab.study report runs/toy-1 runs/toy-2    # several runs of run.py: mean ± sd, paired

Each seed has its own queries, principles and first responses, which its arms share (lab/arms.py).
It also trains its own base model; with --base all seeds start from the same one. What is complete
is not made again: the same command continues. Seeds run in parallel, in processes of one thread
each.
"""

import contextlib
import math
import multiprocessing
import os
import re
import statistics
from functools import partial
from itertools import combinations, product
from pathlib import Path

import torch
from tqdm import tqdm

import eval as evaluation
import generate
import sso
from lab import arms, results, reward
from lab import version1        # noqa: it adds the objective "v1" and the base loss "v1-ipo"
from plumbing import command
from plumbing.outputs import write_queries
from plumbing.recipes import change, load_toml, read_recipe
from plumbing.records import UserError, as_lines, read_json, read_jsonl, write_text
from plumbing.tables import print_table, stat
from toy import world

STUDY = load_toml(Path(__file__).with_suffix(".toml"))
TOY = read_recipe(world.RECIPE)


# ---- What the rows of a seed share ---------------------------------------------------------------

def graded_pairs(base, queries, out, samples, recipe):
    """A preference file labelled by the grader: the best of several plain answers over the worst,
    where they differ."""
    records = read_jsonl(queries)
    asked, answered = out.with_suffix(".asked.jsonl"), out.with_suffix(".answered.jsonl")
    write_text(asked, as_lines(records * samples))
    generate.responses(base, asked, answered, recipe, ("original",))
    answers, pairs = read_jsonl(answered), []

    def mark(record):
        text, finished = sso.record_response(record, "original")
        return world.grade(record["prompt"][0]["content"], text, finished)

    for number in range(len(records)):
        worst, *_, best = sorted(answers[number::len(records)], key=mark)       # to one query
        if mark(best) > mark(worst):
            pairs.append({"prompt": best["prompt"],
                          "chosen": best["original"], "rejected": worst["original"],
                          "chosen_finished": best["original_finished"],
                          "rejected_finished": worst["original_finished"]})
    write_text(out, as_lines(pairs))


def prepare(folder, seed, base):
    """Base model, queries, and for every source the base's responses by its principles. Graded
    pairs are a source, too."""
    recipe, queries = change(TOY, run={"seed": seed}), folder / "queries.jsonl"
    write_queries(folder, [folder], *world.make_records(seed), {"seed": seed}, {})
    if not base:
        base = folder / "model"
        world.base(base, seed)
    for name, by_hand in STUDY["sources"].items():
        writer, source = base, folder / name
        if name == "weak":
            writer = source / "model"
            world.base(writer, seed, world.STEPS // 5)
        if by_hand:
            world.principles(queries, by_hand, source / "principles.jsonl", seed)
        else:
            generate.principles(writer, queries, source / "principles.jsonl", recipe)
        generate.responses(base, source / "principles.jsonl", source / "responses.jsonl", recipe)
    heldout, answers = folder / "heldout.jsonl", folder / "answers.jsonl"
    graded_pairs(base, queries, folder / "graded" / "responses.jsonl", 4, recipe)
    graded_pairs(base, heldout, folder / "graded" / "heldout.jsonl", 2, recipe)
    start = arms.Start(base, folder / "base" / "responses.jsonl", heldout, answers, world.__file__)
    arms.measure_answers("base", base, start, folder, recipe, {})
    return start


# ---- A row of the tables -------------------------------------------------------------------------

# Its name is "arm"; "arm@source" with other principles; "arm default" with the settings of
# `python run.py`; "arm rounds"; or "reward data", a reward model. A cell of the grid is two
# indices: of the generator's settings, and of the policy's or the reward model's.

def run_row(row, cell, start, folder, seed, rounds):
    """Make a row, in the folder of a seed. Returns its report: {row: measures}."""
    first, second = cell
    shared = folder / "arms" / row / str(first)
    out, grid = shared / str(second), STUDY["grid"]
    if row.startswith("reward "):
        recipe = change(TOY, run={"seed": seed}, reward=grid["reward"][second])
        return run_reward(row, start, folder, out, recipe)
    arm, _, source = re.sub(" .*", "", row).partition("@")
    loss = dict(STUDY["arms"][arm])
    objective = loss.pop("objective")
    source = loss.pop("source", source or "base")
    start = start._replace(responses=folder / source / "responses.jsonl")
    recipe = change(TOY, run={"seed": seed}, generator=loss | grid["generator"][first],
                    policy=loss | grid["policy"][second])
    if row.endswith(" rounds"):
        rounds = min(rounds, STUDY["most_rounds"].get(arm, rounds))
        return run_rounds(arm, objective, start, out, recipe, rounds)
    return arms.run_arm(row, objective, start, out, recipe, shared)


def run_rounds(arm, objective, start, out, recipe, rounds):
    """An arm over several rounds. Each has fresh queries, and starts from the policy before."""
    seed, base, report = recipe["run"]["seed"], start.policy, {}
    folders = [out / str(number) for number in range(1, rounds + 1)]
    write_queries(out, folders, *world.make_records(seed, rounds), {"seed": seed}, {})
    for number, folder in enumerate(folders, 1):
        principles, responses = folder / "principles.jsonl", folder / "responses.jsonl"
        generate.principles(base, folder / "queries.jsonl", principles, recipe)
        generate.responses(start.policy, principles, responses, recipe)
        start = start._replace(responses=responses)
        report |= arms.run_arm(f"{arm} {number}", objective, start, folder, recipe)
        start = start._replace(policy=folder / "policy")
    return report


def run_reward(row, start, folder, out, recipe):
    """A reward model (Table 2) on one or two training sets, and its accuracy on plain answers to
    held-out queries, labelled by the grader."""
    best = str(STUDY["best"]["sso"][0])
    sources = {"pbaa": start.responses, "graded": folder / "graded" / "responses.jsonl",
               "sso": folder / "arms" / "sso" / best / "pairs-sso.jsonl"}
    data = [sources[name] for name in row.split()[1].split("+")]
    reward.train(data, start.policy, out, recipe)
    return {row: reward.accuracies(out, folder / "graded" / "heldout.jsonl", recipe)["all"]}


# ---- A seed --------------------------------------------------------------------------------------

def study_seed(folder, seed, base, rounds):
    """The means of everything that the tables need of a seed."""
    start = prepare(folder, seed, base)
    report = read_json(folder / "report.json")
    for row, cell in (STUDY["best"] | STUDY["default"]).items():
        report |= run_row(row, cell, start, folder, seed, rounds)
    return means_of(report)


def search_seed(folder, seed, base):
    """{(row, cell): mean quality, of reward models accuracy} of all cells. Arms over rounds keep
    their best generator."""
    start, grid, scores = prepare(folder, seed, base), STUDY["grid"], {}
    for row, best in STUDY["best"].items():
        firsts, arm = best[:1], STUDY["arms"].get(row.split("@")[0])
        if arm and arms.generators(arm["objective"]):
            firsts = range(len(grid["generator"]))
        for cell in product(firsts, range(len(grid["policy"]))):
            report = run_row(row, cell, start, folder, seed, STUDY["search_rounds"])
            found = [cells.get("quality", cells.get("accuracy")) for cells in report.values()]
            scores[row, cell] = statistics.fmean(mark["mean"] for mark in found)
    return scores


def work(of_seed, root, seed):
    """Run a seed in a process of its own. What it prints goes to its log.txt."""
    torch.set_num_threads(1)
    folder = root / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            return of_seed(folder, seed)


def run_seeds(of_seed, root, seeds, processes):
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        done = pool.imap(partial(work, of_seed, root), seeds)
        return list(tqdm(done, total=len(seeds), desc="study", unit="seed"))


# ---- The tables ----------------------------------------------------------------------------------

def means_of(report):
    """{row: {column: mean}} of a report."""
    rows = {}
    for row, cells in report.items():
        rows[row] = {column: cell["mean"] for column, cell in cells.items()
                     if isinstance(cell, dict)}
    return rows


def means(runs, row, column):
    """The means of a cell, one a run; none unless every run has it."""
    values = [run.get(row, {}).get(column) for run in runs]
    return [] if None in values else values


def over_runs(runs, row, columns):
    """Mean and standard deviation over runs of a row, {column: cell}."""
    cells = {}
    for column in columns:
        values = means(runs, row, column)
        if values:
            found = stat(values)
            cells[column] = {"mean": found["mean"], "sd": found["se"] * math.sqrt(len(values))}
    return cells


def paired(runs, a, b, column):
    """Row a minus row b: mean over runs and its standard error; None if a run lacks one."""
    differences = [x - y for x, y in zip(means(runs, a, column), means(runs, b, column))]
    if differences:
        return stat(differences)


def table_rows(runs, table):
    """{label: cells} of a table, with the paired difference in its first column."""
    rows = {}
    for label, row, other, paper in table["rows"]:
        rows[label] = over_runs(runs, row, table["columns"]) | {"paper": paper}
        if row != other:
            rows[label]["paired"] = paired(runs, row, other, table["columns"][0])
    return rows


def print_tables(runs, rounds):
    print(f"mean ± standard deviation over {len(runs)} seeds; paired: the difference in the first")
    print("column to the row marked -, mean ± standard error over seeds; paper: its own number")
    for table in STUDY["tables"]:
        print(f"\n{table['title']} (paper: {table['figure']})\n")
        columns = [table["columns"][0], "paired", *table["columns"][1:], "paper"]
        print_table(table_rows(runs, table), columns)
    numbers = range(rounds + 1)
    for curve, column in product(STUDY["curves"], STUDY["curve_columns"]):
        rows = {}
        for label, arm in curve["arms"].items():
            names = ["base"] + [f"{arm} {number}" for number in numbers[1:]]
            cells = [over_runs(runs, name, [column]).get(column) for name in names]
            rows[label] = {number: cell for number, cell in zip(numbers, cells) if cell}
        if rounds:
            print(f"\n{curve['title']}: {column}\n")
            print_table(rows, list(rows[label]))


# ---- Commands ------------------------------------------------------------------------------------

def run(seeds: int = 5, rounds: int = 0, base=None, out: Path = Path("runs/study"),
        processes: int = os.cpu_count()):
    """Run the study and print its tables."""
    if seeds >= max(STUDY["search_seeds"]):
        raise UserError(f"--seeds is below {max(STUDY['search_seeds'])}: settings come from it")
    of_seed = partial(study_seed, base=base, rounds=rounds)
    runs = run_seeds(of_seed, out, range(1, seeds + 1), processes)
    results.write(out / "study.json", rounds=rounds, runs=runs)
    print_tables(runs, rounds)


def tables(results_file="results/study.json"):
    """Print the tables from the file that `run` left, OUT/study.json."""
    found = read_json(results_file)
    print_tables(found["runs"], found["rounds"])


def search(base=None, out: Path = Path("runs/study"), processes: int = os.cpu_count()):
    """Run the search and print the best cell of every row, over its seeds."""
    of_seeds = run_seeds(partial(search_seed, base=base), out, STUDY["search_seeds"], processes)
    rows = {}
    for row, cell in of_seeds[0]:
        score = statistics.fmean(scores[row, cell] for scores in of_seeds)
        if row not in rows or score > rows[row]["mean"]:
            rows[row] = {"best cell": cell, "mean": score}
    print_table(rows, ["best cell", "mean"])


def report(folders):
    """Print the reports of several runs of run.py together, with paired differences of rows."""
    runs = [means_of(read_json(Path(folder, "report.json"))) for folder in folders]
    columns = evaluation.POLICIES_TABLE + evaluation.PAIRS_TABLE[1:]
    print(f"mean ± standard deviation over {len(runs)} runs:\n")
    print_table({name: over_runs(runs, name, columns) for name in runs[0]}, columns)
    print("\npaired difference ± standard error over runs:\n")
    rows = {}
    for b, a in combinations(runs[0], 2):
        rows[f"{a} - {b}"] = {column: paired(runs, a, b, column) for column in columns}
    print_table(rows, columns)


if __name__ == "__main__":
    command.run(__doc__, run, tables, search, report)
