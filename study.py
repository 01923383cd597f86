"""The paper's tables in miniature, in the toy world: `python toy.py study`.

Every seed has its own base model, queries, principles and first responses, which its arms share. An arm is a
folder with its generator, pairs, policy and report.json; what is complete is not made again, so that the same
command continues after an interruption. Each arm has its own best learning rates and epochs from one and the
same search (GRID, BEST). Seeds and arms run in parallel processes of one thread each.
"""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

from tqdm import tqdm

import eval as evaluation
import generate
import toy
import train
from sso import UserError

# arm -> (objective of `train.PLANS`, L_base)
ARMS = {"pbaa": ("pbaa", "dpo"), "sso": ("sso", "dpo"), "plus": ("plus", "dpo"), "minus": ("minus", "dpo"),
        "eq3": ("eq3", "dpo"), "two": ("two", "dpo"), "joint": ("joint", "dpo"), "original": ("original", "dpo"),
        "best-of-4": ("pbaa", "dpo"), "pbaa-ipo": ("pbaa", "ipo"), "sso-ipo": ("sso", "ipo")}
IPO_BETA = 0.5      # a target margin of 1 nat a token; the paper's is not known, and 0.1 would ask for 5
DEFAULTS = ("pbaa", "sso", "plus", "minus", "original")     # also run with the settings of `python train.py`
# Sources of principles other than the base model: written by hand in a world of `toy.WORLDS`, or by a model
# that was trained for a fifth of the steps.
SOURCES = {"hand": "default", "on-policy": "on-policy", "junk": "junk", "style": "style", "weak": None}
WEAK_STEPS = 600
SEARCH_ROUNDS = 6

# ---- The search over learning rates and epochs, the same for every arm ---------------------------

SEARCH_SEEDS = (0, 6)       # never among the seeds that are reported
GRID = {"generator": [{"lr": lr, "epochs": epochs} for lr in (3e-4, 6e-4, 1.2e-3) for epochs in (2, 4)],
        "policy": [{"lr": lr, "epochs": epochs} for lr in (1e-4, 3e-4, 1e-3) for epochs in (1, 3)],
        "reward": [{"lr": lr, "epochs": epochs} for lr in (3e-4, 1e-3, 3e-3) for epochs in (1, 3)]}
ROWS = [*ARMS, *(f"{arm}@{source}" for source in SOURCES for arm in ("pbaa", "sso"))]      # arm@source
# row -> its best cell, indices into GRID["generator"] (0 where there is no generator) and GRID["policy"]:
# what `python toy.py study --search` printed.
BEST = {"pbaa": (0, 3), "sso": (2, 1), "plus": (1, 3), "minus": (0, 1), "eq3": (5, 3), "two": (5, 1),
        "joint": (0, 2), "original": (0, 1), "best-of-4": (0, 1), "pbaa-ipo": (0, 3), "sso-ipo": (2, 3),
        "pbaa@hand": (0, 3), "sso@hand": (5, 1), "pbaa@on-policy": (0, 1), "sso@on-policy": (5, 1),
        "pbaa@junk": (0, 3), "sso@junk": (5, 1), "pbaa@style": (0, 2), "sso@style": (5, 1),
        "pbaa@weak": (0, 3), "sso@weak": (5, 1)}
BEST_ROUNDS = {"pbaa": (0, 1), "sso": (2, 0), "original": (0, 0)}     # over SEARCH_ROUNDS rounds
BEST_REWARD = {"pbaa": 0, "sso": 5, "graded": 5, "graded+pbaa": 5, "graded+sso": 5}     # into GRID["reward"]
DEFAULT = ()                # no cell: the settings of `python train.py`


def settings(arm, cell, seed):
    """Settings of an arm by stage, those of a cell of the grid over the toy's defaults."""
    common = {"seed": seed, "base": ARMS[arm][1]} | ({"beta": IPO_BETA} if ARMS[arm][1] == "ipo" else {})
    of = {"responses": {"seed": seed}, "generator": common, "policy": common}
    for stage, i in zip(("generator", "policy"), cell):
        of[stage] = common | GRID[stage][i]
    return of


# ---- What is run, each in a folder ---------------------------------------------------------------

def prepare(folder, seed):
    """What the arms of a seed share: base model, queries, principles, responses, graded pairs."""
    base, heldout = folder / "base", folder / "heldout.jsonl"
    if not base.exists():
        toy.build(base, seed)
    for path, queries in zip((folder / "queries.jsonl", heldout), toy.make_queries(seed)):
        generate.write_text(path, generate.as_lines({"prompt": query} for query in queries))
    answer(folder, folder, base, base, seed)
    graded_pairs(folder, "queries", seed, samples=4)
    graded_pairs(folder, "heldout", seed, samples=2)
    row = evaluation.policies({"base": base}, heldout, folder, seed=seed)["base"]
    generate.write_text(folder / "report.json", json.dumps({"base": row}))


def answer(folder, source, writer, policy, seed):
    """Principles by `writer` (unless they are there) and responses by `policy`, in folder `source`."""
    principles = source / "principles.jsonl"
    if writer:
        queries = source if (source / "queries.jsonl").exists() else folder
        generate.principles(writer, queries / "queries.jsonl", principles, seed=seed)
    generate.responses(policy, principles, source / "responses.jsonl", seed=seed)


def graded_pairs(folder, queries, seed, samples):
    """A preference file labelled by the grader: of some plain answers the best over the worst, without ties."""
    drawn = []
    for i in range(samples):
        path = folder / f"sample{i}-{queries}.jsonl"
        generate.responses(folder / "base", folder / f"{queries}.jsonl", path, ("original",),
                           seed=seed + 1000 * (i + 1))
        drawn.append(generate.read_jsonl(path))
    made = []
    for records in zip(*drawn):
        grades = [toy.grade(r["prompt"][-1]["content"], r["original"][-1]["content"], r["original_finished"])
                  for r in records]
        best, worst = (records[grades.index(extreme(grades))] for extreme in (max, min))
        if max(grades) > min(grades):
            made.append({"prompt": best["prompt"], "chosen": best["original"], "rejected": worst["original"],
                         "chosen_finished": best["original_finished"],
                         "rejected_finished": worst["original_finished"]})
    generate.write_text(folder / f"graded-{queries}.jsonl", generate.as_lines(made))


def prepare_source(name, folder, seed):
    """Principles of another source, and the base model's responses under them."""
    source, writer = folder / f"principles-{name}", None
    if SOURCES[name]:
        queries = [record["prompt"][0]["content"] for record in generate.read_jsonl(folder / "queries.jsonl")]
        written = (toy.write_principles(query, SOURCES[name], seed) for query in queries)
        generate.write_text(source / "principles.jsonl", generate.as_lines(written))
    else:
        writer = source / "model"
        if not writer.exists():
            toy.build(writer, seed, steps=WEAK_STEPS)
    answer(folder, source, writer, folder / "base", seed)


def run_arm(name, cell, folder, out, seed, source=None, start=None, generator=None):
    """Train an arm's generator (in `generator`, if that is not `out`) and its policy in `out`, from the
    responses in `source`, and measure both. `name` is a row of the tables: "arm", "arm@...", "arm ..."."""
    arm, base, source = re.split("[@ ]", name)[0], folder / "base", source or folder
    of, objective, start = settings(arm, cell, seed), ARMS[arm][0], start or base
    if reported(out, of):
        return
    rows = train.PLANS[objective][1]
    responses = source / ("graded-queries.jsonl" if arm == "best-of-4" else "responses.jsonl")
    pairs = train.make_pairs(objective, start, source / "principles.jsonl", responses, generator or out, of)
    train.train("policy", start, pairs, out / "policy", **of["policy"], objective=rows)
    measures = evaluation.data(pairs, start, rows=rows)
    models = {"base": base, "policy": out / "policy"}
    answers = evaluation.policies(models, folder / "heldout.jsonl", out, seed=seed)
    row = measures | answers["policy"] | {"settings": of}
    generate.write_text(out / "report.json", json.dumps({name: row}))


def reported(out, of):
    """Whether a measurement with these settings is there. One with others is refused by what it is made of."""
    report = out / "report.json"
    return report.exists() and next(iter(json.loads(report.read_text()).values())).get("settings") == of


def run_reward(name, cell, folder, pairs, out, seed):
    """A reward model (Table 2) on one training set, `pairs` being SSO's; its accuracy on plain answers to
    held-out queries, labelled by the grader."""
    of = GRID["reward"][cell]
    if reported(out, of):
        return
    files = {"pbaa": folder / "responses.jsonl", "sso": pairs, "graded": folder / "graded-queries.jsonl"}
    train.train("reward", folder / "base", [files[part] for part in name.split("+")], out, seed=seed,
                **of)
    row = evaluation.reward(out, folder / "graded-heldout.jsonl")["all"]
    generate.write_text(out / "report.json", json.dumps({f"reward {name}": row | {"settings": of}}))


def run_rounds(arm, cell, folder, out, seed, rounds):
    """An arm over several rounds: in each fresh queries, responses and a generator by the policy so far."""
    queries, start, measured = toy.make_queries(seed, rounds)[0], folder / "base", []
    for number in range(rounds):
        this = out / str(number + 1)
        share = queries[number * toy.QUERIES:(number + 1) * toy.QUERIES]
        generate.write_text(this / "queries.jsonl", generate.as_lines({"prompt": query} for query in share))
        answer(folder, this, folder / "base", start, seed)
        run_arm(f"{arm} {number + 1}", cell, folder, this, seed, this, start)
        measured += json.loads((this / "report.json").read_text()).values()
        start = this / "policy"
    mean = evaluation.stat([row["quality"]["mean"] for row in measured])
    generate.write_text(out / "report.json", json.dumps({f"{arm} rounds": {"quality": mean}}))


def source_of(row, folder):
    return folder / f"principles-{row.split('@')[1]}" if "@" in row else folder


def run_search(row, i, folder, seed):
    """All policy settings of the grid on the pairs of its generator setting i."""
    generator = folder / "search" / row / str(i)
    for j in range(len(GRID["policy"])):
        run_arm(row, (i, j), folder, generator / str(j), seed, source_of(row, folder), generator=generator)


def run_reward_search(folder, seed):
    for name in BEST_REWARD:
        for j in range(len(GRID["reward"])):
            pairs = folder / "search/sso" / str(BEST["sso"][0]) / "pairs.jsonl"
            run_reward(name, j, folder, pairs, folder / "search" / f"reward {name}/0" / str(j), seed)


# ---- Tasks in parallel ---------------------------------------------------------------------------

def work(function, arguments, folder):
    """Run a task in a process of its own, what it prints going to the seed's log."""
    folder.mkdir(parents=True, exist_ok=True)
    toy.use_one_thread()
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        function(*arguments)


def run_tasks(tasks, processes):
    """Run {name: (seconds it takes, name of a task to wait for or None, function, arguments, folder)}."""
    waiting, running, done = dict(tasks), {}, set()
    quiet = (signal.SIGINT, signal.SIG_IGN)     # Ctrl-C is for the main process, which ends the others
    with multiprocessing.get_context("spawn").Pool(processes, signal.signal, quiet) as pool, tqdm(
            total=sum(task[0] for task in tasks.values()), unit="s of work", desc="study",
            bar_format="{desc}: {percentage:3.0f}% [{elapsed} so far, {remaining} left] {postfix}") as bar:
        while waiting or running:
            for name in [name for name, task in waiting.items() if task[1] in done | {None}]:
                running[name] = pool.apply_async(work, waiting.pop(name)[2:])
            for name in [name for name, result in running.items() if result.ready()]:
                try:
                    running.pop(name).get()     # raises what the task raised
                except UserError as error:
                    raise UserError(f"task {name!r}: {error}") from None
                done.add(name)
                bar.update(tasks[name][0])
                bar.set_postfix_str(f"last: {name}", refresh=False)
            time.sleep(0.1)


def tasks_of(seeds, root, per_seed):
    """The tasks of all seeds: the shared ones, and what `per_seed(add, folder, seed)` adds. The seconds are
    rough ones of one core; they weigh the progress bar."""
    tasks = {}
    for seed in seeds:
        folder = root / f"seed{seed}"

        def add(name, seconds, function, *arguments, after="prepare"):
            tasks[f"{seed} {name}"] = (seconds, after and f"{seed} {after}", function, arguments, folder)
        add("prepare", 120, prepare, folder, seed, after=None)
        for name in SOURCES:
            add(name, 5 if SOURCES[name] else 28, prepare_source, name, folder, seed)
        per_seed(add, folder, seed)
    return dict(sorted(tasks.items(), key=lambda task: task[1][1] is not None))     # base models first


def seconds_of(row):
    return 4 + 8 * len(train.PLANS[ARMS[row.split("@")[0]][0]][0])


def study_tasks(rounds):
    def per_seed(add, folder, seed):
        for row in ROWS:
            add(row, seconds_of(row), run_arm, row, BEST[row], folder, folder / "arms" / row, seed,
                source_of(row, folder), after=row.partition("@")[2] or "prepare")
        for arm in DEFAULTS:
            name = f"{arm} default"
            add(name, seconds_of(arm), run_arm, name, DEFAULT, folder, folder / "arms" / name, seed)
        for name, cell in BEST_REWARD.items():
            add(f"reward {name}", 5, run_reward, name, cell, folder, folder / "arms/sso/pairs.jsonl",
                folder / "rewards" / name, seed, after="sso")
        for arm, cell in BEST_ROUNDS.items() if rounds else ():
            add(f"{arm} rounds", rounds * seconds_of(arm), run_rounds, arm, cell, folder,
                folder / "rounds" / arm, seed, rounds)
    return per_seed


def search_tasks(add, folder, seed):
    """For each row and each setting of its generator all settings of the policy."""
    for row in ROWS:
        for i in range(len(GRID["generator"]) if seconds_of(row) > 4 else 1):
            add(f"{row} {i}", 28, run_search, row, i, folder, seed, after=row.partition("@")[2] or "prepare")
    add("rewards", 120, run_reward_search, folder, seed, after=f"sso {BEST['sso'][0]}")
    for arm in BEST_ROUNDS:
        i = BEST[arm][0]                            # the best generator of a single round
        for j in range(len(GRID["policy"])):
            add(f"{arm} rounds {j}", SEARCH_ROUNDS * seconds_of(arm), run_rounds, arm, (i, j), folder,
                folder / "search" / f"{arm} rounds" / str(i) / str(j), seed, SEARCH_ROUNDS)


def print_search(root):
    """Of every arm the best cell of the grid, by mean quality (accuracy of reward models) over the seeds."""
    rows = {}
    for arm in [*ROWS, *(f"{arm} rounds" for arm in BEST_ROUNDS), *(f"reward {name}" for name in BEST_REWARD)]:
        cells, measure = {}, "accuracy" if arm.startswith("reward") else "quality"
        for report in root.glob(f"seed*/search/{arm}/*/*/report.json"):
            i, j = int(report.parts[-3]), int(report.parts[-2])
            cells.setdefault((i, j), []).append(json.loads(report.read_text())[arm][measure]["mean"])
        value, (i, j) = max((sum(values) / len(values), cell) for cell, values in cells.items())
        last = GRID["reward" if arm.startswith("reward") else "policy"][j]
        generator = f"generator {GRID['generator'][i]}, then " if len({i for i, _ in cells}) > 1 else ""
        rows[arm] = {"cell": (i, j), measure: value, "settings": f"{generator}{last}"}
    evaluation.print_table(rows, ["cell", "quality", "accuracy", "settings"])


# ---- The tables ----------------------------------------------------------------------------------

QUALITY = ["quality", "win rate", "words"]
DATA = ["accuracy", "ties", "p(chosen)", "p(rejected)"]
BOTH = "AlpacaEval 2 LC of Llama3-SFT / Qwen2-SFT"
# (title, what the paper's figure is, columns, [(label, row, row of the paired difference, paper's figure)])
TABLES = [
    ("Table 1: the methods", BOTH, QUALITY, [
        ("base", "base", "pbaa", "20.6 / 20.1"), ("PBAA", "pbaa", "pbaa", "29.5 / 37.7"),
        ("SSO", "sso", "pbaa", "35.0 / 43.0"), ("two generators", "two", "pbaa", "untried"),
        ("joint (version 1)", "joint", "pbaa", "-"), ("y+ over yo", "original", "pbaa", "-"),
        ("graded, best of 4", "best-of-4", "pbaa", "-")]),
    ("Table 1 with the settings of `python train.py` for all", BOTH, [*QUALITY, "accuracy", "p(rejected)"], [
        (label, f"{row} default", "pbaa default", "-") for label, row in (
            ("PBAA", "pbaa"), ("SSO", "sso"), ("L+ only", "plus"), ("L- only", "minus"), ("y+ over yo", "original"))]),
    ("Table 3: ablation", "AlpacaEval 2 LC of Llama3-SFT", QUALITY, [
        ("PBAA", "pbaa", "pbaa", "29.5"), ("L+ only", "plus", "pbaa", "33.6"), ("L- only", "minus", "pbaa", "32.0"),
        ("L+ and L-", "sso", "pbaa", "35.0")]),
    ("Table 4: Eq. 4 against Eq. 3", BOTH, [*QUALITY, "p(rejected)"], [
        ("SSO, Eq. 4", "sso", "eq3", "35.0 / 43.0"), ("SSO, Eq. 3", "eq3", "eq3", "31.8 / 38.6")]),
    ("Table 5: who writes the principles", BOTH, QUALITY, [
        ("PBAA, by hand", "pbaa@hand", "pbaa@hand", "strong: 29.5 / 37.7"),
        ("SSO, by hand", "sso@hand", "pbaa@hand", "strong: 35.0 / 43.0"),
        ("PBAA, base model", "pbaa", "pbaa", "-"), ("SSO, base model", "sso", "pbaa", "-"),
        ("PBAA, weak model", "pbaa@weak", "pbaa@weak", "weak: 31.8 / 36.2"),
        ("SSO, weak model", "sso@weak", "pbaa@weak", "weak: 34.0 / 38.6")]),
    ("Table 6: IPO", BOTH, [*QUALITY, "accuracy", "p(rejected)"], [
        ("PBAA, IPO", "pbaa-ipo", "pbaa-ipo", "47.9 / 44.8"), ("SSO, IPO", "sso-ipo", "pbaa-ipo", "51.4 / 46.2")]),
    ("Table 2: reward models", "RewardBench", ["accuracy"], [
        ("PBAA", "reward pbaa", "reward pbaa", "78.9"), ("SSO", "reward sso", "reward pbaa", "80.0"),
        ("graded", "reward graded", "reward pbaa", "Skywork: 84.5"),
        ("graded + PBAA", "reward graded+pbaa", "reward pbaa", "Skywork + PBAA: 83.5"),
        ("graded + SSO", "reward graded+sso", "reward pbaa", "Skywork + SSO: 86.3")]),
    ("Figure 3: quality of the pairs", "a plot", [*DATA, "p(both)"], [
        (label, row, "pbaa", "-") for label, row in (
            ("PBAA", "pbaa"), ("SSO", "sso"), ("L+ only", "plus"), ("L- only", "minus"), ("SSO, Eq. 3", "eq3"),
            ("two generators", "two"), ("y+ over yo", "original"), ("graded, best of 4", "best-of-4"))]),
    ("Control worlds", "none", [*QUALITY, "accuracy", "p(rejected)"], [
        (f"{label}, {world}", f"{arm}@{world}", f"pbaa@{world}", "-")
        for world in ("on-policy", "junk", "style") for arm, label in (("pbaa", "PBAA"), ("sso", "SSO"))]),
]


def collect(root, seeds):
    """The measures of each seed: {row: {column: stat}}."""
    return [{name: row for report in sorted((root / f"seed{seed}").rglob("report.json"))
             if "search" not in report.parts for name, row in json.loads(report.read_text()).items()}
            for seed in seeds]


def table(runs, columns, rows):
    """A table in the paper's form: mean ± sd over runs, and of the first column the mean paired difference
    to a row ± its standard error."""
    means, paired = evaluation.over_runs(runs, [(row, other) for _, row, other, _ in rows], columns)
    cells = {}
    for label, row, other, paper in rows:
        difference = None if row == other else paired[f"{row} - {other}"].get(columns[0])
        cells[label] = {columns[0]: means[row].get(columns[0]), "paired": difference, "paper": paper} | means[row]
    return cells


def print_tables(runs, rounds):
    print(f"mean ± standard deviation over {len(runs)} seeds; paired: the difference in the first column to the")
    print("row marked -, mean ± standard error over seeds; paper: the paper's own figure")
    for title, figure, columns, rows in TABLES:
        print(f"\n{title} (paper: {figure})\n")
        evaluation.print_table(table(runs, columns, rows), [columns[0], "paired", *columns[1:], "paper"])
    for column in ("quality", "accuracy", "p(rejected)", "words") if rounds else ():
        print(f"\nOver rounds: {column}\n")
        evaluation.print_table(curves(runs, column, rounds), ["0", *map(str, range(1, rounds + 1))])


def curves(runs, column, rounds):
    """{arm: {round: mean and sd of a column over seeds}}; round 0 is the base model."""
    means = evaluation.over_runs(runs, [], [column])[0]
    labels = {"pbaa": "PBAA", "sso": "SSO", "original": "y+ over yo"}
    return {labels[arm]: {str(k): means.get(f"{arm} {k}" if k else "base", {}).get(column)
                          for k in range(rounds + 1)} for arm in BEST_ROUNDS}


# ---- Command line --------------------------------------------------------------------------------

def add_arguments(parser):
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 1 to N (5)")
    parser.add_argument("--rounds", type=int, default=0, metavar="N", help="also the curve over N rounds")
    parser.add_argument("--search", action="store_true", help="the search that BEST in study.py comes from")
    parser.add_argument("--plot", metavar="FILE", help="draw the figures (needs matplotlib)")
    parser.add_argument("--out", default="runs/study", metavar="DIR", help="folder of the study (runs/study)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="of one thread each")


def run(seeds, rounds, search, plot, out, processes):
    if seeds < 1 or rounds < 0 or processes < 1:
        raise UserError("study: --seeds and --processes are at least 1, --rounds at least 0")
    if seeds >= max(SEARCH_SEEDS):
        raise UserError(f"study: --seeds is below {max(SEARCH_SEEDS)}, a seed that the settings were chosen on")
    root, seeds = Path(out), range(1, seeds + 1)
    if plot:
        import figures                      # says so now if matplotlib is missing, not after the work
    if search:
        run_tasks(tasks_of(SEARCH_SEEDS, root, search_tasks), processes)
        return print_search(root)
    run_tasks(tasks_of(seeds, root, study_tasks(rounds)), processes)
    runs = collect(root, seeds)
    print_tables(runs, rounds)
    if plot:
        figures.draw(plot, panels(figures, runs, root / f"seed{seeds[0]}", rounds))


def panels(figures, runs, folder, rounds):
    """Figure 1 for PBAA and SSO (of one seed), Figure 3, and the curves over rounds."""
    pbaa = evaluation.distributions(folder / "responses.jsonl", folder / "base")
    sso = evaluation.distributions(folder / "arms/sso/pairs.jsonl", folder / "base")
    means = evaluation.over_runs(runs, [], ["accuracy", "p(both)"])[0]
    points = {label: means[row] for label, row, *_ in TABLES[-2][-1] if row != "best-of-4"}
    made = [lambda axes: figures.distribution(axes, "Figure 1, measured: PBAA", pbaa),
            lambda axes: figures.distribution(axes, "SSO", {"original": pbaa["original"]} | sso),
            lambda axes: figures.figure3(axes, points)]
    return made + [lambda axes, column=column: figures.over_rounds(axes, column, curves(runs, column, rounds))
                   for column in (("quality", "accuracy", "p(rejected)", "words") if rounds else ())]
