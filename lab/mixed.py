"""The worlds of lab/facts.py and lab/form.py as one: their queries, and a grader of both.

    python -m lab.mixed --out runs/mixed [--count 128] [--seed 0]
"""

from lab import facts, form
from plumbing import command
from plumbing.records import as_lines, write_text


def grade(query, response, finished=True):
    """The mark of the world that a query is from."""
    if query.strip() in facts.QUERIES:
        return facts.grade(query, response, finished)
    return form.grade(query, response, finished)


def write(out, count: int = 128, seed: int = 0):
    """Write queries.jsonl and heldout.jsonl. The worlds take turns, with at most `count` of
    each."""
    worlds = [facts.make_queries(seed), form.make_queries(seed)]
    for name in ("queries", "heldout"):
        texts = []
        for pair in list(zip(*[world[name] for world in worlds]))[:count]:
            texts += pair
        records = [{"prompt": text} for text in texts]
        write_text(f"{out}/{name}.jsonl", as_lines(records))


if __name__ == "__main__":
    command.run(__doc__, write)
