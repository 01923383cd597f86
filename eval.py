"""What the paper measures: how accurate and on-policy pairs are (Figure 3), how good policies are.

    python eval.py preflight responses.jsonl --policy M [--grader F.py | --judge J]
    python eval.py pairs responses.jsonl pairs.jsonl --policy M [--grader F.py | --judge J]
    python eval.py answers answers_base.jsonl answers_SSO.jsonl [--grader F.py | --judge J]
    python eval.py report runs/NAME                             # the tables of a run, again

It reads files and samples no responses. A critic says what is better. It is a grader, a Python file
with grade(query, response, finished), 0 to 1; or a judge, a chat model that compares two outputs.
"""

import random
from functools import partial
from pathlib import Path

import sso
from plumbing import command
from plumbing.examples import read_responses
from plumbing.grader import load_grader
from plumbing.models import load_chat
from plumbing.recipes import stage_settings
from plumbing.records import UserError, read_json, read_jsonl
from plumbing.scoring import score
from plumbing.server import judge_by_text, load_server
from plumbing.tables import print_table, stat

SYMBOLS = {"good": "y+", "original": "yo", "bad": "y-"}
PAIRS_TABLE = ["pairs", "accuracy", "ties", "p(chosen)", "p(rejected)", "p(original)",
               "y+", "yo", "y-"]
POLICIES_TABLE = ["quality", "win rate", "words"]
JUDGE_PAIRS = 200       # Section 6.3
PREFLIGHT = 200         # queries


# ---- Critics -------------------------------------------------------------------------------------

# A critic takes a list of comparisons, (query, response a, response b). For each it returns the
# marks of a and of b, from 0 to 1.

def load_critic(grader=None, judge=None, judge_pairs=JUDGE_PAIRS, prompts=sso.PROMPTS, server=None):
    """The critic that a command line names, and how many comparisons of a file it sees (None: all).
    Without a critic both are None."""
    if grader and judge:
        raise UserError("--grader and --judge exclude each other")
    if server and not judge:
        raise UserError("--server goes with --judge")
    if grader:
        return partial(grader_marks, load_grader(grader)), None
    if server:
        return partial(judge_by_text, load_server(server, judge), prompts), judge_pairs
    if judge:
        return partial(judge_marks, load_chat(judge, "fast"), prompts), judge_pairs
    return None, None


def grader_marks(grade, comparisons):
    return [(grade(query, a), grade(query, b)) for query, a, b in comparisons]


def judge_marks(chat, prompts, comparisons):
    """A chat model names the better of two anonymous outputs, m or M, in both orders (Table 9). A
    mark is the share of orders that an output wins: 0.5 each if the orders disagree. The
    probabilities of the two names are compared, and no text is parsed."""
    m = sso.Response("m", finished=False)
    M = sso.Response("M", finished=False)
    examples = []
    for number, (query, a, b) in enumerate(comparisons, 1):
        orders = [sso.Pair(sso.judge_messages(query, a.text, b.text, prompts), winner=m, loser=M),
                  sso.Pair(sso.judge_messages(query, b.text, a.text, prompts), winner=M, loser=m)]
        example = [sso.encode_pair(chat.tokenizer, chat.end_id, order, chat.context)
                   for order in orders]
        if not all(order.winner and order.loser for order in example):
            raise UserError(f"--judge: comparison {number}, of {query[:60]!r}, does not fit into "
                            f"the judge's context of {chat.context} tokens")
        examples.append(example)
    (a_logps, b_logps), _ = score(chat, examples, name="judge")             # (2 orders, N) each
    a_wins = (a_logps > b_logps).sum(0) + (a_logps == b_logps).sum(0) / 2   # (N,)
    return [(wins / 2, 1 - wins / 2) for wins in a_wins.tolist()]


def is_better(comparison, marks):
    """1 if a is better than b, 0 if b is better, else 0.5. An empty response loses whatever its
    mark."""
    _, a, b = comparison
    mark_a = marks[0] if a.text.strip() else -1
    mark_b = marks[1] if b.text.strip() else -1
    return 0.5 + 0.5 * (mark_a > mark_b) - 0.5 * (mark_a < mark_b)


def draw(items, limit):
    """`limit` of the items at random, or all."""
    if limit is None or limit >= len(items):
        return items
    return random.Random(0).sample(items, limit)


def comparisons_of(records, role_a, role_b):
    """(query, response of one role, response of the other) of each record that has both."""
    comparisons = []
    for record in records:
        if {sso.COLUMNS[role_a], sso.COLUMNS[role_b]} <= record.keys():
            query = record["prompt"][-1]["content"]
            comparisons.append((query, sso.record_response(record, role_a),
                                sso.record_response(record, role_b)))
    return comparisons


# ---- Pairs ---------------------------------------------------------------------------------------

def probabilities(chat, records, role, settings, prompts):
    """p(y) = exp(mean token log-prob) of a role's responses, under the policy without principle."""
    examples = read_responses(records, role, chat, settings["max_length"], prompts)
    if not examples:
        return []
    logps, tokens = score(chat, examples, settings["micro_batch_tokens"])
    return (logps / tokens)[0, 0].exp().tolist()


def measure_pairs(path, policy, critic, recipe, objective="policy", limit=None, only=None):
    """Measures of a preference file. `only`: look at this many records, drawn at random. Words and
    p(·) under POLICY are over all of these. What needs a critic (accuracy and ties of winner over
    loser, y+ over yo, and the quality of y+, yo and y-) is over `limit` of them. `objective` says
    which responses are winner and loser."""
    roles = next(iter(sso.PAIRS[objective].values()))
    needs = ("prompt", *(sso.COLUMNS[role] for role in roles[1:]))
    records = draw(read_jsonl(path, needs), only)
    settings = stage_settings(recipe, "policy")
    chat = load_chat(policy, "fast")
    measures = {"pairs": len(records)}
    for name, role in (("p(chosen)", roles.winner), ("p(rejected)", roles.loser),
                       ("p(original)", "original")):
        values = probabilities(chat, records, role, settings, recipe["prompts"])
        if values:
            measures[name] = stat(values)
    for role, symbol in SYMBOLS.items():
        words = [len(sso.record_response(record, role).text.split()) for record in records
                 if sso.COLUMNS[role] in record]
        if words:
            measures[f"words of {symbol}"] = stat(words)
    if critic is None:
        return measures
    return measures | measure_quality(draw(records, limit), roles, critic)


def measure_quality(records, roles, critic):
    """Those measures of pairs that need a critic."""
    measures = {}
    comparisons = comparisons_of(records, roles.winner, roles.loser)
    verdicts = list(map(is_better, comparisons, critic(comparisons)))
    measures["accuracy"] = stat(verdicts)
    measures["ties"] = stat([verdict == 0.5 for verdict in verdicts])
    for role, symbol in SYMBOLS.items():
        comparisons = comparisons_of(records, role, "original")
        if comparisons:
            marks = critic(comparisons)
            measures[symbol] = stat([mark for mark, _ in marks])
        if comparisons and role == "good":
            measures["y+ over yo"] = stat(list(map(is_better, comparisons, marks)))
    return measures


# ---- Preflight -----------------------------------------------------------------------------------

# SSO assumes that y+ is better than y-, and that yo is not better than y+. Whether this holds
# depends on the model, on the queries, and on the prompt around the principle. Finding out takes
# minutes. Training in vain takes a night.

CHANCE = "pairs at chance: y+ is not shown to be better than y-"
HOPE = ("But y+ is better than yo: pairs of these two may teach more (--objective original), and "
        "so may the generator's, since step 3 moves y- towards yo")
REVERSED = ("yo is better than y+: L- pulls y- up to yo and so above y+. Step 4 then teaches the "
            "wrong way")
STEERABLE = "steerable: y+ is better than y-, and yo is not shown to be better than y+"
ADVICE = ("Word the prompt around the principle differently ([prompts] of a recipe), take another "
          "model, or let a stronger one write the principles")


def shown(measures, name):
    """1 if a share is above one half by more than two standard errors, -1 if below, else 0."""
    if name not in measures:
        return 0
    mean = measures[name]["mean"]
    error = 2 * measures[name]["se"]
    return (mean - error > 0.5) - (mean + error < 0.5)


def verdict(measures):
    """What the measures of pairs say, in a sentence."""
    if "accuracy" not in measures:
        return "whether y+ is better than y- is not known: give --grader or --judge"
    over_original = shown(measures, "y+ over yo")
    if shown(measures, "accuracy") < 1:
        if over_original == 1:
            return f"{CHANCE}. {HOPE}"
        return f"{CHANCE}. {ADVICE}"
    if over_original == -1:
        return f"{REVERSED}. {ADVICE}"
    return STEERABLE


def print_preflight(measures):
    """Print the measures of pairs, with a line for each role, and the verdict."""
    rows = {}
    for symbol, p in zip(SYMBOLS.values(), ("p(chosen)", "p(original)", "p(rejected)")):
        rows[symbol] = {"quality": measures.get(symbol), "p under the policy": measures.get(p),
                        "words": measures.get(f"words of {symbol}")}
    rows["yo"]["y+ better"] = measures.get("y+ over yo")
    rows["y-"]["y+ better"] = measures.get("accuracy")
    print(f"\nPreflight, {measures['pairs']} queries, mean ± standard error. y+ better: how often "
          "y+ is better\nthan the response of this line; a tie counts as half\n")
    print_table(rows, ["quality", "y+ better", "p under the policy", "words"])
    print(f"\n{verdict(measures)}.\n")


# ---- Policies ------------------------------------------------------------------------------------

def read_answers(path):
    """The queries and the plain answers of a file: two lists."""
    records = read_jsonl(path, needs=("prompt", "original"))
    queries = [record["prompt"][-1]["content"] for record in records]
    return queries, [sso.record_response(record, "original") for record in records]


def measure_answers(paths, critic, limit=None):
    """{name: measures} of files of plain answers, {name: path}. Quality is the mean mark. The win
    rate is over the first file's answers; a tie counts as half. Both are over `limit` queries."""
    measures = {}
    first_queries, first_answers = read_answers(next(iter(paths.values())))
    for name, path in paths.items():
        queries, answers = read_answers(path)
        if queries != first_queries:
            raise UserError(f"{path}: answers to other queries than those of the first file")
        row = {"answers": len(answers),
               "words": stat([len(answer.text.split()) for answer in answers])}
        measures[name] = row
        if critic:
            comparisons = draw(list(zip(queries, answers, first_answers)), limit)
            marks = critic(comparisons)
            row["quality"] = stat([mark for mark, _ in marks])
            row["win rate"] = stat(list(map(is_better, comparisons, marks)))
    return measures


# ---- Commands ------------------------------------------------------------------------------------

def pairs(files, policy, recipe, grader=None, judge=None, judge_pairs: int = JUDGE_PAIRS,
          server=None):
    """Measure preference files."""
    critic, limit = load_critic(grader, judge, judge_pairs, recipe["prompts"], server)
    rows = {file: measure_pairs(file, policy, critic, recipe, limit=limit) for file in files}
    print_table(rows, PAIRS_TABLE)


def answers(files, recipe, grader=None, judge=None, judge_pairs: int = JUDGE_PAIRS,
            server=None):
    """Measure files of plain answers, beside those of the first."""
    critic, limit = load_critic(grader, judge, judge_pairs, recipe["prompts"], server)
    rows = measure_answers({file: file for file in files}, critic, limit)
    print_table(rows, ["answers", *POLICIES_TABLE])


def preflight(files, policy, recipe, grader=None, judge=None, judge_pairs: int = JUDGE_PAIRS,
              server=None):
    """Say before anything is trained whether principles steer a policy."""
    critic, limit = load_critic(grader, judge, judge_pairs, recipe["prompts"], server)
    for file in files:
        print_preflight(measure_pairs(file, policy, critic, recipe, limit=limit, only=PREFLIGHT))


def report(folders):
    """Print the tables of runs, from their report.json."""
    for folder in folders:
        print_report(read_json(Path(folder, "report.json")))


def print_report(rows):
    print("\nThe pairs, mean ± standard error. accuracy: how often chosen is better than rejected; "
          "a tie counts\nas half. p(·): exp(mean token log-prob) under the policy. "
          "y+, yo, y-: their quality\n")
    print_table({name: row for name, row in rows.items() if "pairs" in row}, PAIRS_TABLE)
    print("\nThe policies, by plain answers to held-out queries; the win rate is over the first\n")
    print_table(rows, POLICIES_TABLE)


if __name__ == "__main__":
    command.run(__doc__, preflight, pairs, answers, report)
