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

import multiprocessing
import statistics
from collections import ChainMap
from contextlib import redirect_stderr, redirect_stdout
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
from plumbing.records import as_lines, read_json, read_jsonl, write_text
from plumbing.tables import print_table, stat
from toy import world

STUDY = load_toml(Path(__file__).with_suffix(".toml"))
TOY = read_recipe(world.RECIPE)


# ---- What the rows of a seed share ---------------------------------------------------------------

def graded_pairs(base, queries, samples, folder, recipe):
    """Write a preference file labelled by the grader: the best of several plain answers over the
    worst one, if they differ."""
    records = read_jsonl(queries)
    asked = folder / "asked.jsonl"
    write_text(asked, as_lines(records * samples))
    generate.responses(base, asked, folder / "answers.jsonl", recipe, ("original",))
    answers = read_jsonl(folder / "answers.jsonl")

    def mark(record):
        query = record["prompt"][0]["content"]
        return world.grade(query, *sso.record_response(record, "original"))

    pairs = []
    for number in range(len(records)):
        worst, *_, best = sorted(answers[number::len(records)], key=mark)       # to one query
        if mark(best) > mark(worst):
            pairs.append({"prompt": best["prompt"],
                          "chosen": best["original"], "rejected": worst["original"],
                          "chosen_finished": best["original_finished"],
                          "rejected_finished": worst["original_finished"]})
    write_text(folder / "responses.jsonl", as_lines(pairs))


def prepare(folder, base, recipe):
    """Make the base model, the queries, and for every source of principles the base's responses.
    Graded pairs are a source, too."""
    seed = recipe["run"]["seed"]
    queries = folder / "queries.jsonl"
    heldout = folder / "heldout.jsonl"
    write_queries(folder, [folder], *world.make_records(seed), {"seed": seed}, {})
    if not base:
        base = folder / "model"
        world.base(base, seed)
    for name, by_hand in STUDY["sources"].items():
        source = folder / name
        writer = base
        if by_hand:
            writer = source / "written.jsonl"
            world.principles(queries, by_hand, writer, seed)
        if name == "weak":
            writer = source / "model"
            world.base(writer, seed, world.STEPS // 5)
        arms.begin(writer, queries, base, source, recipe)
    graded_pairs(base, queries, 4, folder / "graded", recipe)
    graded_pairs(base, heldout, 2, folder / "graded-heldout", recipe)
    return arms.Start(base, heldout, folder / "answers.jsonl", world.__file__)


# ---- A row of the tables -------------------------------------------------------------------------

# Its name is "arm"; "arm@source" with other principles; "arm default" with the settings of
# `python run.py`; "arm rounds"; or "reward data", a reward model. A cell of the grid is two
# indices: of the generator's settings, and of the policy's or the reward model's.

def run_row(row, cell, start, folder, recipe, rounds):
    """Make a row of the tables in the folder of a seed. Returns its report: {row: measures}."""
    first, second = cell
    grid = STUDY["grid"]
    shared = folder / "arms" / row / str(first)
    out = shared / str(second)
    if row in STUDY["rewards"]:
        recipe = change(recipe, reward=grid["reward"][second])
        reward.train([folder / data for data in STUDY["rewards"][row]], start.policy, out, recipe)
        found = reward.accuracies(out, folder / "graded-heldout/responses.jsonl", recipe)
        return {row: found["all"]}
    arm, _, source = row.split()[0].partition("@")
    loss = dict(STUDY["arms"][arm])
    objective = loss.pop("objective")
    source = loss.pop("source", source or "base")
    most = loss.pop("rounds", rounds)
    start = start._replace(responses=folder / source / "responses.jsonl")
    recipe = change(recipe, generator=loss | grid["generator"][first],
                    policy=loss | grid["policy"][second])
    if row.endswith(" rounds"):
        return run_rounds(arm, objective, start, out, recipe, min(rounds, most))
    return arms.run_arm(row, objective, start, out, recipe, shared)


def run_rounds(arm, objective, start, out, recipe, rounds):
    """An arm over several rounds. Each has fresh queries, and starts from the policy before."""
    base = start.policy         # it writes the principles of all rounds
    report = {}
    for number in range(1, rounds + 1):
        folder = out / str(number)
        queries = folder / "queries.jsonl"
        records, _ = world.make_records(recipe["run"]["seed"], number)
        write_text(queries, as_lines(records[-world.QUERIES:]))         # the last round's
        start = start._replace(responses=arms.begin(base, queries, start.policy, folder, recipe))
        report |= arms.run_arm(f"{arm} {number}", objective, start, folder, recipe)
        start = start._replace(policy=folder / "policy")
    return report


# ---- Seeds ---------------------------------------------------------------------------------------

def run_seed(root, base, cells, rounds, seed):
    """Make rows of the tables, each in a cell of the grid, on one seed. It runs in a process of its
    own, and what it prints goes to log.txt. Returns the means of the base model and of each row."""
    torch.set_num_threads(1)
    folder = root / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = change(TOY, run={"seed": seed})
    with (folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        start = prepare(folder, base, recipe)
        reports = [arms.measure("base", start.policy, start, folder, recipe)]
        for row, cell in cells:
            reports.append(run_row(row, cell, start, folder, recipe, rounds))
    return list(map(means_of, reports))


def run_seeds(seeds, out, base, cells, rounds):
    """What `run_seed` returns, for every seed."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        done = pool.imap(partial(run_seed, out, base, cells, rounds), seeds)
        return list(tqdm(done, total=len(seeds), desc="study", unit="seed"))


# ---- The tables ----------------------------------------------------------------------------------

def means_of(report):
    """{row: {column: mean}} of a report."""
    rows = {}
    for row, cells in report.items():
        rows[row] = {column: cell["mean"] for column, cell in cells.items()
                     if isinstance(cell, dict) and "mean" in cell}
    return rows


def cells_of(runs, row, column):
    """The means of a cell, one for each run. The list is empty unless every run has it."""
    values = [run.get(row, {}).get(column) for run in runs]
    return [] if None in values else values


def over_runs(runs, row, column):
    """Mean and standard deviation over runs; None if a run lacks the cell."""
    values = cells_of(runs, row, column)
    if values:
        sd = stat(values)["se"] * len(values) ** 0.5
        return {"mean": statistics.fmean(values), "sd": sd}


def paired(runs, a, b, column):
    """Row a minus row b: mean over runs and its standard error; None if a run lacks one."""
    differences = [x - y for x, y in zip(cells_of(runs, a, column), cells_of(runs, b, column))]
    if differences:
        return stat(differences)


def table_rows(runs, table):
    """{label: cells} of a table, with the paired difference in its first column."""
    rows = {}
    for label, row, other, paper in table["rows"]:
        cells = {column: over_runs(runs, row, column) for column in table["columns"]}
        if row != other:
            cells["paired"] = paired(runs, row, other, table["columns"][0])
        rows[label] = cells | {"paper": paper}
    return rows


def print_curve(runs, curve, column, rounds):
    """Print a column over rounds. Round 0 is the base model."""
    rows = {}
    for label, arm in curve["arms"].items():
        names = {"0": "base"} | {str(number): f"{arm} {number}" for number in range(1, rounds + 1)}
        rows[label] = {number: over_runs(runs, row, column) for number, row in names.items()}
    print(f"\n{curve['title']}: {column}\n")
    print_table(rows, list(names))


def print_tables(runs, rounds):
    print(f"mean ± standard deviation over {len(runs)} seeds; paired: the difference in the first")
    print("column to the row marked -, mean ± standard error over seeds; paper: its own number")
    for table in STUDY["tables"]:
        print(f"\n{table['title']} (paper: {table['figure']})\n")
        columns = [table["columns"][0], "paired", *table["columns"][1:], "paper"]
        print_table(table_rows(runs, table), columns)
    if rounds:
        for curve, column in product(STUDY["curves"], STUDY["curve_columns"]):
            print_curve(runs, curve, column, min(rounds, curve["rounds"]))


# ---- Commands ------------------------------------------------------------------------------------

def run(seeds: int = 5, rounds: int = 0, base=None, out: Path = Path("runs/study")):
    """Run the study on its first seeds, and print its tables."""
    cells = list((STUDY["best"] | STUDY["default"]).items())
    reports = run_seeds(STUDY["seeds"][:seeds], out, base, cells, rounds)
    runs = [dict(ChainMap(*of_seed)) for of_seed in reports]
    results.write(out / "study.json", rounds=rounds, runs=runs)
    tables(out / "study.json")


def tables(results_file="results/study.json"):
    """Print the tables from the file that `run` left, OUT/study.json."""
    found = read_json(results_file)
    print_tables(found["runs"], found["rounds"])


def search(base=None, out: Path = Path("runs/study")):
    """Run every row in all cells of the grid, and print its best cell over the seeds, by mean
    quality (reward models: accuracy). Arms over rounds keep their best generator."""
    grid = STUDY["grid"]
    cells = []
    for row, best in STUDY["best"].items():
        firsts = best[:1]
        arm = STUDY["arms"].get(row.split("@")[0])
        if arm and arms.generators(arm["objective"]):
            firsts = range(len(grid["generator"]))
        cells += product([row], product(firsts, range(len(grid["policy"]))))
    of_seeds = run_seeds(STUDY["search_seeds"], out, base, cells, STUDY["search_rounds"])
    rows = {}
    for number, (row, cell) in enumerate(cells, 1):         # 0 is the base model
        marks = []
        for reports in of_seeds:
            for means in reports[number].values():
                marks.append(means.get("quality", means.get("accuracy")))
        mean = statistics.fmean(marks)
        if row not in rows or mean > rows[row]["mean"]:
            rows[row] = {"best cell": cell, "mean": mean}
    print_table(rows, ["best cell", "mean"])


def report(folders):
    """Print the reports of several runs of run.py together, with paired differences of rows."""
    runs = [means_of(read_json(Path(folder, "report.json"))) for folder in folders]
    columns = evaluation.POLICIES_TABLE + evaluation.PAIRS_TABLE[1:]
    print(f"mean ± standard deviation over {len(runs)} runs:\n")
    table = {"columns": columns, "rows": [(row, row, row, "") for row in runs[0]]}
    print_table(table_rows(runs, table), columns)
    print("\npaired difference ± standard error over runs:\n")
    rows = {}
    for b, a in combinations(runs[0], 2):
        rows[f"{a} - {b}"] = {column: paired(runs, a, b, column) for column in columns}
    print_table(rows, columns)


if __name__ == "__main__":
    command.run(__doc__, run, tables, search, report)
