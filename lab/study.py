"""The paper's tables in miniature, in the toy world. What is compared, and how: lab/study.toml.

    python -m lab.study run --seeds 5 [--rounds 6] [--plot FILE]
    python -m lab.study tables                          # those of results/study.json again
    python -m lab.study search                          # where the settings of the arms come from
    python -m lab.study report runs/toy-1 runs/toy-2    # several runs of run.py: mean ± sd, paired

Every seed has its own base model, queries, principles and first responses, which its arms share. An
arm is a folder with its generator, pairs, policy and report.json. What is complete is not made
again: the same command continues. Seeds run in parallel, in processes of one thread each.
"""

import contextlib
import json
import multiprocessing
import os
import re
import statistics
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import eval as evaluation
import generate
import sso
import train
from lab import figures, results, reward, toy
from plumbing import cli, files
from plumbing.files import UserError
from plumbing.tables import print_table, stat

STUDY = cli.load_toml(Path(__file__).with_suffix(".toml"))
TOY = cli.read_recipe(toy.RECIPE)
GRADER, _ = evaluation.load_critic(grader=toy.__file__)


# ---- An arm --------------------------------------------------------------------------------------

def recipe_of(arm, cell, seed):
    """The toy's recipe with an arm's objective and loss, and a cell of the grid: indices into the
    generator's and the policy's settings; () leaves the recipe's own."""
    loss = dict(STUDY["arms"][arm])
    objective = loss.pop("objective")
    recipe = cli.change(TOY, run={"seed": seed}, generator=loss, policy=loss)
    if objective in sso.PAIRS and sso.trains_generator(objective):
        recipe["generator"]["objective"] = objective
    elif objective in sso.PAIRS:
        recipe["policy"]["objective"] = objective
    for stage, index in zip(("generator", "policy"), cell):
        recipe[stage] |= STUDY["grid"][stage][index]
    return recipe


def make_pairs(arm, policy, responses, folder, recipe):
    """Step 3 and the sampling of step 4 in a folder. Returns the file of the policy's pairs."""
    objective = STUDY["arms"][arm]["objective"]

    def generator_pairs(objective, source, name, roles):
        generator = folder / f"generator-{objective}"
        train.train("generator", policy, responses, generator,
                    cli.change(recipe, generator={"objective": objective}))
        generate.responses(generator, source, folder / name, recipe, roles)
        return folder / name

    if objective == "two":      # L+ trains one generator, which answers y+, L- another: y-
        chosen = generator_pairs("plus", responses, "chosen.jsonl", ("good",))
        return generator_pairs("minus", chosen, "pairs.jsonl", ("bad",))
    if sso.trains_generator(objective):
        return generator_pairs(objective, responses, "pairs.jsonl", ("good", "bad"))
    return responses


def run_arm(row, cell, folder, out, seed, start=None, source=None, generator=None):
    """Train an arm's generator (in `generator`, if that is not `out`) and its policy in `out`, from
    the policy `start` and the responses in `source`; measure both. Its name in the tables is `row`:
    "arm", "arm@source", "arm default" or "arm 3", in round 3."""
    arm = re.split("[@ ]", row)[0]
    recipe = recipe_of(arm, cell, seed)
    settings = {"generator": recipe["generator"], "policy": recipe["policy"]}
    if is_reported(out, settings):
        return
    start = start or folder / "base"
    responses = (source or source_of(row, folder)) / "responses.jsonl"
    if arm == "best-of-4":
        responses = folder / "graded-queries.jsonl"
    pairs = make_pairs(arm, start, responses, generator or out, recipe)
    train.train("policy", start, pairs, out / "policy", recipe)
    measures = measure_policy(out / "policy", folder, out, recipe)
    used_in = recipe["policy"]["objective"]
    measures |= evaluation.measure_pairs(pairs, start, GRADER, recipe, used_in)
    write_report(out, row, measures | {"settings": settings})


def source_of(row, folder):
    """The folder of the principles and responses that a row starts from."""
    if "@" in row:
        return folder / f"principles-{row.split('@')[1]}"
    return folder


def measure_policy(model, folder, out, recipe):
    """Quality, win rate over the seed's base, and words of a model's plain answers."""
    paths = {"base": folder / "answers.jsonl", "policy": out / "answers.jsonl"}
    for path, answerer in ((paths["base"], folder / "base"), (paths["policy"], model)):
        generate.responses(answerer, folder / "heldout.jsonl", path, recipe, ("original",))
    return evaluation.measure_answers(paths, GRADER)["policy"]


def write_report(out, row, measures):
    files.write_text(out / "report.json", json.dumps({row: measures}))


def is_reported(out, settings):
    """Whether a report with these settings is there. Others are refused by what they are made
    of."""
    path = out / "report.json"
    if not path.exists():
        return False
    measures, = json.loads(path.read_text()).values()
    return measures.get("settings") == settings


def run_rounds(arm, cell, folder, out, seed, rounds):
    """An arm over several rounds: each has fresh queries, and starts from the policy before."""
    recipe = cli.change(TOY, run={"seed": seed})
    queries, _ = toy.make_records(seed, rounds)
    start, qualities = folder / "base", []
    for number in range(1, rounds + 1):
        this = out / str(number)
        share = queries[(number - 1) * toy.QUERIES:number * toy.QUERIES]
        files.write_text(this / "queries.jsonl", files.as_lines(share))
        answer(this / "queries.jsonl", this, folder / "base", start, recipe)
        run_arm(f"{arm} {number}", cell, folder, this, seed, start, this)
        measures, = json.loads((this / "report.json").read_text()).values()
        qualities.append(measures["quality"]["mean"])
        start = this / "policy"
    write_report(out, f"{arm} rounds", {"quality": stat(qualities)})


def run_reward(name, cell, folder, pairs, out, seed):
    """A reward model (Table 2) on one training set, `pairs` being SSO's; its accuracy on plain
    answers to held-out queries, labelled by the grader."""
    recipe = cli.change(TOY, run={"seed": seed}, reward=STUDY["grid"]["reward"][cell])
    if is_reported(out, recipe["reward"]):
        return
    sources = {"pbaa": folder / "responses.jsonl", "sso": pairs,
               "graded": folder / "graded-queries.jsonl"}
    reward.train_reward([sources[part] for part in name.split("+")], folder / "base", out, recipe)
    measures = reward.measure_reward(out, folder / "graded-heldout.jsonl", recipe)["all"]
    write_report(out, f"reward {name}", measures | {"settings": recipe["reward"]})


# ---- What the arms of a seed share ---------------------------------------------------------------

def answer(queries, folder, writer, policy, recipe):
    """Principles by a model, and responses by a policy, in a folder."""
    generate.principles(writer, queries, folder / "principles.jsonl", recipe)
    generate.responses(policy, folder / "principles.jsonl", folder / "responses.jsonl", recipe)


def graded_pairs(folder, queries, samples, seed):
    """A preference file labelled by the grader: of some plain answers the best over the worst,
    without ties."""
    drawn = []
    for number in range(1, samples + 1):
        path = folder / f"sample{number}-{queries}.jsonl"
        recipe = cli.change(TOY, run={"seed": seed + 1000 * number})
        generate.responses(folder / "base", folder / f"{queries}.jsonl", path, recipe, ["original"])
        drawn.append(files.read_jsonl(path))
    pairs = []
    for records in zip(*drawn):
        comparisons = evaluation.comparisons_of(records, "original", "original")
        marks = [mark for mark, _ in GRADER(comparisons)]
        best, worst = records[marks.index(max(marks))], records[marks.index(min(marks))]
        if max(marks) > min(marks):
            pairs.append({"prompt": best["prompt"], "chosen": best["original"],
                          "rejected": worst["original"],
                          "chosen_finished": best["original_finished"],
                          "rejected_finished": worst["original_finished"]})
    files.write_text(folder / f"graded-{queries}.jsonl", files.as_lines(pairs))


def prepare(folder, seed):
    """Base model, queries, principles, responses, and graded pairs of a seed; other principles."""
    recipe = cli.change(TOY, run={"seed": seed})
    base, queries = folder / "base", folder / "queries.jsonl"
    toy.build_once(base, seed)
    records, heldout = toy.make_records(seed)
    files.write_text(queries, files.as_lines(records))
    files.write_text(folder / "heldout.jsonl", files.as_lines(heldout))
    answer(queries, folder, base, base, recipe)
    graded_pairs(folder, "queries", 4, seed)
    graded_pairs(folder, "heldout", 2, seed)
    write_report(folder, "base", measure_policy(base, folder, folder, recipe))
    for name, world in STUDY["sources"].items():
        source = folder / f"principles-{name}"
        if not world:
            toy.build_once(source / "model", seed, steps=toy.STEPS // 5)
            answer(queries, source, source / "model", base, recipe)
            continue
        written = [toy.write_principles(record["prompt"], world, seed) for record in records]
        files.write_text(source / "principles.jsonl", files.as_lines(written))
        generate.responses(base, source / "principles.jsonl", source / "responses.jsonl", recipe)


# ---- A seed --------------------------------------------------------------------------------------

def rounds_of(arm, rounds):
    """How many of so many rounds an arm is run for."""
    return min([rounds] + [curve["rounds"] for curve in STUDY["curves"] if arm in curve["arms"]])


def study_seed(folder, seed, rounds):
    """Everything that the tables need of a seed."""
    prepare(folder, seed)
    for row, cell in STUDY["best"].items():
        run_arm(row, cell, folder, folder / "arms" / row, seed)
    for arm in STUDY["defaults"]:
        run_arm(f"{arm} default", (), folder, folder / "arms" / f"{arm} default", seed)
    for name, cell in STUDY["best_reward"].items():
        pairs = folder / "arms" / "sso" / "pairs.jsonl"
        run_reward(name, cell, folder, pairs, folder / "rewards" / name, seed)
    for arm, cell in STUDY["best_rounds"].items():
        if rounds:
            run_rounds(arm, cell, folder, folder / "rounds" / arm, seed, rounds_of(arm, rounds))


def search_seed(folder, seed):
    """Every cell of the grid for every row; of arms over rounds those with their best generator."""
    prepare(folder, seed)
    search, policies = folder / "search", range(len(STUDY["grid"]["policy"]))
    for row in STUDY["best"]:
        objective = STUDY["arms"][row.split("@")[0]]["objective"]
        generators = len(STUDY["grid"]["generator"])
        if objective in sso.PAIRS and not sso.trains_generator(objective):
            generators = 1
        for first in range(generators):
            shared = search / row / str(first)
            for second in policies:
                run_arm(row, (first, second), folder, shared / str(second), seed, generator=shared)
    pairs = search / "sso" / str(STUDY["best"]["sso"][0]) / "pairs.jsonl"
    for name in STUDY["best_reward"]:
        for cell in range(len(STUDY["grid"]["reward"])):
            run_reward(name, cell, folder, pairs, search / f"reward {name}" / "0" / str(cell), seed)
    for arm, (first, _) in STUDY["best_rounds"].items():
        for second in policies:
            out = search / f"{arm} rounds" / str(first) / str(second)
            run_rounds(arm, (first, second), folder, out, seed,
                       rounds_of(arm, STUDY["search_rounds"]))


def work(of_seed, root, seed):
    """Run a seed in a process of its own; what it prints goes to its log.txt."""
    torch.set_num_threads(1)
    folder = root / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            of_seed(folder, seed)


def run_seeds(of_seed, root, seeds, processes):
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        done = pool.imap_unordered(partial(work, of_seed, root), seeds)
        for _ in tqdm(done, total=len(seeds), desc="study", unit="seed"):
            pass


def print_search(root):
    """Of every arm the best cell by mean quality, of reward models accuracy, over the seeds."""
    cells = {}
    for path in sorted(root.glob("seed*/search/*/*/*/report.json")):
        (row, measures), = json.loads(path.read_text()).items()
        measure = "accuracy" if row.startswith("reward") else "quality"
        cell = int(path.parts[-3]), int(path.parts[-2])
        cells.setdefault(row, {}).setdefault(cell, []).append(measures[measure]["mean"])
    rows = {}
    for row, values in sorted(cells.items()):
        scores = {cell: statistics.fmean(of_seeds) for cell, of_seeds in values.items()}
        best = max(scores, key=scores.get)
        rows[row] = {"best cell": best, "mean": scores[best]}
    print_table(rows, ["best cell", "mean"])


# ---- The tables ----------------------------------------------------------------------------------

def means_of(report):
    """{row: {column: mean}} of a report."""
    return {row: {column: cell["mean"] for column, cell in cells.items()
                  if isinstance(cell, dict) and "mean" in cell} for row, cells in report.items()}


def means(runs, row, column):
    """The means of a cell, one a run; none unless every run has it."""
    values = [run.get(row, {}).get(column) for run in runs]
    return [] if None in values else values


def over_runs(runs, row, columns):
    """Mean and standard deviation over runs of a row of their reports, {row: {column: stat}}."""
    cells = {}
    for column in columns:
        values = means(runs, row, column)
        if values:
            cells[column] = {"mean": statistics.fmean(values), "sd": 0.0}
        if len(values) > 1:
            cells[column]["sd"] = statistics.stdev(values)
    return cells


def paired(runs, a, b, column):
    """Row a less row b: mean over runs and its standard error; None if it is not to be had."""
    differences = [x - y for x, y in zip(means(runs, a, column), means(runs, b, column))]
    if differences:
        return stat(differences)


def table_rows(runs, table):
    """{label: cells} of a table: mean ± sd over runs, and of the first column the paired
    difference."""
    rows = {}
    for label, row, other, paper in table["rows"]:
        rows[label] = over_runs(runs, row, table["columns"]) | {"paper": paper}
        if row != other:
            rows[label]["paired"] = paired(runs, row, other, table["columns"][0])
    return rows


def curve_rows(runs, arms, column, rounds):
    """{arm's label: {round: mean and sd of a column over seeds}}; round 0 is the base model."""
    rows = {}
    for arm in arms:
        cells = {"0": over_runs(runs, "base", [column]).get(column)}
        for number in range(1, rounds + 1):
            cells[str(number)] = over_runs(runs, f"{arm} {number}", [column]).get(column)
        rows[STUDY["labels"][arm]] = cells
    return rows


MEASURES = ["quality", "accuracy", "p(rejected)", "words"]


def print_tables(runs, rounds):
    print(f"mean ± standard deviation over {len(runs)} seeds; paired: the difference in the first")
    print("column to the row marked -, mean ± standard error over seeds; paper: its own number")
    for table in STUDY["tables"]:
        print(f"\n{table['title']} (paper: {table['figure']})\n")
        columns = [table["columns"][0], "paired", *table["columns"][1:], "paper"]
        print_table(table_rows(runs, table), columns)
    for curve in STUDY["curves"]:
        last = min(rounds, curve["rounds"])
        for column in MEASURES:
            if rounds:
                print(f"\n{curve['title']}: {column}\n")
                columns = [str(number) for number in range(last + 1)]
                print_table(curve_rows(runs, curve["arms"], column, last), columns)


def print_runs(folders):
    """The reports of several runs of run.py together: mean ± sd, and paired differences of rows."""
    runs = [means_of(json.loads(Path(folder, "report.json").read_text())) for folder in folders]
    columns = evaluation.POLICIES_TABLE + evaluation.PAIRS_TABLE[1:]
    print(f"mean ± standard deviation over {len(runs)} runs:\n")
    print_table({name: over_runs(runs, name, columns) for name in runs[0]}, columns)
    print("\npaired difference ± standard error over runs:\n")
    rows, names = {}, list(runs[0])
    for number, a in enumerate(names):
        for b in names[:number]:
            rows[f"{a} - {b}"] = {column: paired(runs, a, b, column) for column in columns}
    print_table(rows, columns)


def panels(runs, folder, rounds):
    """Figure 1 for PBAA and SSO (of one seed), Figure 3, and the curves over rounds."""
    made = []
    for title, pairs in (("PBAA", "responses.jsonl"), ("SSO", "arms/sso/pairs.jsonl")):
        lists = figures.distributions(folder / pairs, folder / "base", TOY)
        made.append(partial(figures.figure1, f"Figure 1, measured: {title}", lists))
    table, = [table for table in STUDY["tables"] if table["title"].startswith("Figure 3")]
    made.append(partial(figures.figure3, table_rows(runs, table)))
    for column in MEASURES:
        if rounds:
            rows = curve_rows(runs, STUDY["curves"][0]["arms"], column, rounds)
            made.append(partial(figures.over_rounds, column, rows))
    return made


# ---- Commands ------------------------------------------------------------------------------------

def collect(root, seeds):
    """Each seed's {row: {column: mean}}."""
    runs = []
    for seed in seeds:
        rows = {}
        for path in sorted((root / f"seed{seed}").rglob("report.json")):
            if "search" not in path.parts:
                rows |= means_of(json.loads(path.read_text()))
        runs.append(rows)
    return runs


def run(seeds: int = 5, rounds: int = 0, plot=None, out: Path = Path("runs/study"),
        processes: int = os.cpu_count()):
    """Run the study and print its tables."""
    if seeds >= max(STUDY["search_seeds"]):
        raise UserError(f"--seeds is below {max(STUDY['search_seeds'])}: settings come from it")
    if plot:
        figures.check_matplotlib()
    numbers = range(1, seeds + 1)
    run_seeds(partial(study_seed, rounds=rounds), out, numbers, processes)
    runs = collect(out, numbers)
    results.write(out / "study.json", rounds=rounds, runs=runs)
    print_tables(runs, rounds)
    if plot:
        figures.draw(plot, panels(runs, out / "seed1", rounds))


def tables(results_file="results/study.json"):
    """Print the tables from the file that `run` left, OUT/study.json."""
    found = files.read_json(results_file)
    print_tables(found["runs"], found["rounds"])


def search(out: Path = Path("runs/study"), processes: int = os.cpu_count()):
    """Run the search and print the best cells."""
    run_seeds(search_seed, out, STUDY["search_seeds"], processes)
    print_search(out)


if __name__ == "__main__":
    cli.run(__doc__, ("run", run, []), ("tables", tables, []), ("search", search, []),
            ("report", print_runs, []))
