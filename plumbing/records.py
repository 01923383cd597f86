"""Records on disk: JSONL files of queries, principles, responses and pairs, read and written."""

import json
import math
import random
from pathlib import Path

import sso
from plumbing.formats import unify

RESPONSES = tuple(sso.COLUMNS.values())


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what to do about it."""


# ---- Reading -------------------------------------------------------------------------------------

def read_jsonl(path, needs=("prompt",), uses=RESPONSES):
    """The records of a JSONL file. Each must have the texts `needs`. Its prompt and the responses
    `uses` become lists of messages. UserError names the file and the line."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    # Bytes and not splitlines(), which also splits at separators that a text may hold.
    content = Path(path).read_bytes().rstrip()
    if not content:
        raise UserError(f"{path}: an empty file")
    return for_each(f"{path}, line", lambda line: parse_record(line, needs, uses),
                    content.split(b"\n"))


def for_each(place, function, items):
    """function(item) of each item. UserError says which item it cannot take."""
    made = []
    for number, item in enumerate(items, 1):
        try:
            made.append(function(item))
        except ValueError as error:
            raise UserError(f"{place} {number}: {error}") from None
    return made


def parse_record(line, needs, uses):
    """The record in a line. ValueError says why the line holds none."""
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()         # fails on half a surrogate pair
    except (ValueError, RecursionError) as error:               # not UTF-8, or not JSON
        raise ValueError(f"not a JSON object ({error}); one a line is expected") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object; one a line is expected")
    unify(record, uses)
    for column in uses:
        finished = record.get(f"{column}_finished", True)
        if not isinstance(finished, bool):
            raise ValueError(f"'{column}_finished' is {finished!r}: it is true or false")
    for key in needs:
        kind = list if key in ("prompt", *uses) else str
        if not isinstance(record.get(key), kind) or not str(record[key]).strip():
            raise ValueError(f"a record without a {key!r}")
    return record


def read_queries(path):
    """The records of a file of queries, without duplicates. Each prompt is one user message."""
    records = {}
    for number, record in enumerate(read_jsonl(path, uses=()), 1):
        if [message["role"] for message in record["prompt"]] != ["user"]:
            raise UserError(f"{path}, line {number}: a query is one user message, or a string; of "
                            "a conversation r the first turn: r[0]['content']")
        records.setdefault(record["prompt"][0]["content"], record)
    if len(records) < number:
        print(f"{path}: {number - len(records)} duplicate queries are left out")
    return list(records.values())


def split_queries(path, heldout, seed):
    """(queries, held-out queries). Without a file of held-out queries, a tenth of the queries is
    held out, at most 200. Held-out queries are not trained on."""
    records = read_queries(path)
    if heldout:
        held = read_queries(heldout)
        prompts = [record["prompt"] for record in held]
        records = [record for record in records if record["prompt"] not in prompts]
        if not records:
            raise UserError(f"{path}: all of its queries are held out by {heldout}")
        return records, held
    if len(records) < 2:
        raise UserError(f"{path}: at least two queries are needed: one is held out for the report")
    random.Random(seed).shuffle(records)
    held = min(200, math.ceil(len(records) / 10))
    return records[held:], records[:held]


def read_json(path):
    """The object in a file that a command wrote."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not the JSON that the commands here write ({error}); delete it"
                        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not written by a command of this project; delete or move it")
    return found


# ---- Writing -------------------------------------------------------------------------------------

def write_text(path, text):
    """Write a file under another name, then rename it. So a kill never leaves half a file."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def as_lines(records):
    """The text of a JSONL file."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
