"""Records on disk: read and check them, write them whole, and know what an output was made from.

A file under its final name is complete, a model's folder once it has a config.json. While a file of
records grows it is called OUT.partial. OUT.args.json, or args.json in a folder, notes the settings
and the inputs that an output is made from: a command with others refuses to touch it.
"""

import functools
import hashlib
import json
import math
import os
import random
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import sso


ROLES = ("system", "user", "assistant")


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what to do about it."""


# ---- Reading -------------------------------------------------------------------------------------

def read_jsonl(path, needs=("prompt",)):
    """The records of a JSONL file, each with the texts `needs`; a prompt and responses, which may
    be strings there, as lists of messages. An error names the file and the line."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    records = []
    # Bytes and not splitlines(), which would also split at separators that a text may hold.
    content = Path(path).read_bytes().rstrip()
    if not content:
        raise UserError(f"{path}: an empty file")
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            records.append(parse_record(line, needs))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return records


def parse_record(line, needs):
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()         # fails on half a surrogate pair
    except (ValueError, RecursionError) as error:               # not UTF-8, or not JSON
        raise ValueError(f"not a JSON object ({error}); one a line is expected") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object; one a line is expected")
    if "prompt" not in record:
        find_prompt(record)
    for column in ("prompt", *sso.COLUMNS.values()):
        if column in record:
            record[column] = as_messages(column, record[column])
        finished = record.get(f"{column}_finished", True)
        if not isinstance(finished, bool):
            raise ValueError(f"'{column}_finished' is {finished!r}: it is true or false")
    for key in needs:
        value = record.get(key)
        has_messages = isinstance(value, list) and key in ("prompt", *sso.COLUMNS.values())
        has_text = isinstance(value, str) and value.strip()
        if not value or not (has_messages or has_text):
            raise ValueError(f"a record without a {key!r}")
    return record


def find_prompt(record):
    """Give a record a prompt from where other tools have it, if it is there."""
    for name in ("instruction", "query"):                       # alpaca_eval's name; the paper's
        if name in record:
            if record.get("input"):                             # Alpaca's second half of a prompt
                raise ValueError(f"an 'input' beside {name!r}: join them into a 'prompt'")
            record["prompt"] = record[name]
            return
    if isinstance(record.get("chosen"), list):
        record["prompt"] = record["chosen"][:-1]                # TRL's "implicit prompt"


def as_messages(column, value):
    """A prompt or response as a list of chat messages; a text is one message."""
    if isinstance(value, str):
        role = "user" if column == "prompt" else "assistant"
        return [{"role": role, "content": value}] if value.strip() or role == "assistant" else []
    if not value or not isinstance(value, list):
        raise ValueError(f"{column!r} is neither a text nor a list of messages")
    for message in value:
        texts = isinstance(message, dict) and [message.get("role"), message.get("content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{column!r} is neither a text nor a list of messages")
        if message["role"] not in ROLES:
            raise ValueError(f"{column!r} has a message of role {message['role']!r}; known are "
                             f"{', '.join(ROLES)}")
    last = value[-1]
    if column == "prompt" and not last["content"].strip():
        raise ValueError("the last message of 'prompt' is empty")
    if column != "prompt" and last["role"] != "assistant":
        raise ValueError(f"the last message of {column!r} is of the {last['role']}; a response is "
                         "the assistant's")
    return value


def read_queries(path):
    """The records of a file of queries, without those that are there twice: each prompt is one
    message of the user."""
    records = {}
    for number, record in enumerate(read_jsonl(path), 1):
        if [message["role"] for message in record["prompt"]] != ["user"]:
            raise UserError(f"{path}, line {number}: a query is one user message, or a string")
        records.setdefault(record["prompt"][0]["content"], record)
    if len(records) < number:
        print(f"{path}: {number - len(records)} queries are there twice, and left out")
    return list(records.values())


def split_queries(path, heldout, seed):
    """(queries, held-out queries) of a file: unless these have a file of their own, a tenth of the
    records, 200 at most. What is held out is not trained on."""
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


def check_room(tokenizer, records, recipe):
    """UserError if a training has no room behind the longest query."""
    longest = max(records, key=lambda record: len(str(record["prompt"])))
    tokens = len(sso.encode_prompt(tokenizer, as_messages("prompt", longest["prompt"])))
    for stage in ("generator", "policy"):
        if tokens >= recipe[stage]["max_length"]:
            raise UserError(f"{stage}: --max-length {recipe[stage]['max_length']} leaves no room "
                            f"for an answer behind a query of {tokens} tokens")


def teaches_nothing(pairs):
    """Why the pairs of a record are of no use in training, or None. An equal pair has no
    gradient."""
    responses = [response for pair in pairs for response in (pair.winner, pair.loser)]
    if not all(response.text.strip() for response in responses):
        return "empty response"
    if all(pair.winner.text.strip() == pair.loser.text.strip() for pair in pairs):
        return "chosen equals rejected"
    return None


def check_columns(record, objective):
    """ValueError unless a record has the responses that an objective needs, as one turn each."""
    for roles in sso.PAIRS[objective].values():
        for role in (roles.winner, roles.loser):
            column = sso.COLUMNS[role]
            if column not in record:
                raise ValueError(f"a record without {column!r}, needed for objective {objective!r}")
            if record[column][:-1] not in ([], record["prompt"]):
                raise ValueError(f"before the last message of {column!r} stands not the prompt")


def without_ends(chat, pair):
    """A pair without the end-of-turn text and blanks that another tool may have left at the ends of
    its responses; that of the template closes them."""
    end = chat.tokenizer.decode([chat.end_id])
    responses = []
    for response in pair[1:]:
        if response.text.rstrip().endswith(end):
            response = response._replace(text=response.text.rstrip()[:-len(end)].rstrip())
        responses.append(response)
    return sso.Pair(pair.prompt, *responses)


def encode_record(record, objective, chat, max_length, place, prompts=sso.PROMPTS):
    """A record as an example, R pairs of token ids, and None; or None and why it is of no use.
    UserError, with its place, if it is not as it should be."""
    try:
        check_columns(record, objective)
        pairs = [without_ends(chat, pair)
                 for pair in sso.preference_pairs(record, objective, prompts)]
        reason = teaches_nothing(pairs)
        if reason:
            return None, reason
        room = min(max_length, chat.context)
        return [sso.encode_pair(chat.tokenizer, chat.end_id, pair, room) for pair in pairs], None
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None


def read_examples(path, objective, chat, max_length, prompts=sso.PROMPTS, limit=None):
    """Of the first `limit` records of a preference file the useful ones as examples, each R pairs
    of token ids, and a count of the others by reason."""
    examples, skipped = [], Counter()
    for number, record in enumerate(read_jsonl(path)[:limit], 1):
        example, reason = encode_record(record, objective, chat, max_length,
                                        f"{path}, line {number}", prompts)
        if example:
            examples.append(example)
        else:
            skipped[reason] += 1
    if not examples:
        raise UserError(f"{path}: no pair is left: {dict(skipped)}")
    return examples, skipped


def read_responses(path, records, role, chat, max_length, prompts=sso.PROMPTS):
    """The responses of a role as examples whose log-probs are to be measured, each one pair of
    token ids under the plain prompt, with a loser of one token, which costs nothing. One without
    any token is left out."""
    examples = []
    for number, record in enumerate(records, 1):
        if sso.COLUMNS[role] not in record:
            continue
        response = sso.record_response(record, role)
        if not response.text.strip() and not response.finished:
            continue
        messages = sso.role_messages("original", record, prompts)
        try:
            pair = without_ends(chat, sso.Pair(messages, response, response))
            prompt, ids, _ = sso.encode_pair(chat.tokenizer, chat.end_id, pair,
                                             min(max_length, chat.context))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        examples.append([sso.Pair(prompt, ids, ids[:1])])
    return examples


def read_json(path):
    """The object in a file that a command wrote."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON, as the commands here write it ({error}); delete it"
                        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not written by a command of this project; delete or move it")
    return found


# ---- Writing -------------------------------------------------------------------------------------

def write_text(path, text):
    """Write a file under another name, then rename it: a kill never leaves half a file."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def as_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def longest_first(records):
    """Indices of records by the length of what a prompt is made of: little is padded, and memory
    runs out at once or never."""
    def length(i):
        record = records[i]
        parts = [record["prompt"], record.get("good_principle"), record.get("bad_principle")]
        return len(json.dumps(parts))
    return sorted(range(len(records)), key=length, reverse=True)


def belongs(line, record):
    try:
        return json.loads(line)["prompt"] == record["prompt"]
    except (ValueError, LookupError, TypeError):
        return False


def grow(out, records, make, batch_size, seed):
    """Make a record from each of `records` by `make(indices, seed) -> (new records, tokens)`, a
    batch at a time; write them to OUT in the order of `records`, and return them. Continues
    OUT.partial: each batch has a seed of its own, so that the bytes do not depend on
    interruptions."""
    partial = Path(f"{out}.partial")
    lines = []
    if partial.exists():
        lines = partial.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    done = len(lines) // batch_size * batch_size        # whole batches; the last line may be cut
    order = longest_first(records)
    if not all(belongs(line, records[i]) for i, line in zip(order, lines[:done])):
        raise UserError(f"{partial}: not what this command began; delete it")
    write_text(partial, "".join(line + "\n" for line in lines[:done]))
    tokens = 0
    bar = tqdm(total=len(order), initial=done, desc=Path(out).name, unit="query")
    with partial.open("a", encoding="utf-8") as file, bar:
        for start in range(done, len(order), batch_size):
            batch = order[start:start + batch_size]
            made, new_tokens = make(batch, seed * 1_000_003 + 3 * start)    # three: one a role
            file.write(as_lines(made))
            file.flush()
            tokens += new_tokens
            speed = tokens / max(1e-9, bar.format_dict["elapsed"])
            bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
            bar.update(len(batch))
    lines = partial.read_text(encoding="utf-8").split("\n")[:-1]
    made = dict(zip(order, map(json.loads, lines)))
    in_order = [made[i] for i in range(len(records))]
    write_text(out, as_lines(in_order))
    partial.unlink()
    return in_order


# ---- What an output was made from ----------------------------------------------------------------

NO_EFFECT = ("micro_batch_tokens", "recompute_layers", "compile")   # on results, but for rounding


MODEL_FILES = ("*.safetensors", "config.json", "tokenizer*", "*.jinja", "*.model", "vocab*",
               "merges*", "special_tokens*", "generation_config.json")


def fingerprint(path):
    """A hash of all of a data file; of a checkpoint's weights, settings and tokenizer; of a hub id:
    none."""
    parts = [Path(path)]
    if Path(path).is_dir():
        parts = sorted({file for pattern in MODEL_FILES for file in Path(path).glob(pattern)})
    digest = hashlib.sha256()
    for part in parts:
        if part.is_file():
            status = part.stat()
            digest.update(hash_of(part, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()[:12]


@functools.cache
def hash_of(path, size, changed):
    """Of a file's name and bytes; read once as long as size and time stay as they are."""
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").digest()
    return path.name.encode() + content


class Output:
    """What a command makes, a file or (folder=True) a model's folder, with a note of what it is
    made from: the settings, and the inputs, a dict of paths, each by its place and its content."""

    def __init__(self, path, settings, inputs, folder=False):
        self.path = Path(path)
        if folder:
            self.proof, self.note_path = self.path / "config.json", self.path / "args.json"
            self.work = [self.path / "log.jsonl", self.path / "checkpoint.pt"]
        else:
            self.proof, self.note_path = self.path, Path(f"{path}.args.json")
            self.work = [Path(f"{path}.partial")]
        self.note = {key: value for key, value in settings.items() if key not in NO_EFFECT}
        for name, source in inputs.items():
            self.note[name] = str(source)
            if os.path.exists(source):
                self.note[name] = os.path.relpath(source, self.note_path.parent)
            self.note[f"content of {name}"] = fingerprint(source)

    def begun(self):
        return [path for path in (self.proof, *self.work) if path.exists() and path.stat().st_size]

    def difference(self):
        """What it was made with that is not as it is now, in words, or None."""
        before = read_json(self.note_path)
        for key in self.note | before:
            old, new = repr(before.get(key)), repr(self.note.get(key))
            if old != new:
                return f"{key} = {old[:80]}, not {new[:80]}"

    def clear_remains(self):
        """What a kill left between the last rename and the end."""
        for path in self.work:
            if path.suffix in (".partial", ".pt"):
                path.unlink(missing_ok=True)
                path.with_suffix(".tmp").unlink(missing_ok=True)

    def is_complete(self):
        """Whether it is there already. UserError if it, or what was begun of it, has another
        note."""
        begun = self.begun()
        if not begun:
            return False
        if not self.note_path.exists():
            raise UserError(f"{begun[0]} exists and was not made by this command; choose another "
                            "--out")
        difference = self.difference()
        if difference:
            names = ", ".join(str(path) for path in (*begun, self.note_path))
            raise UserError(f"{self.path} was made with {difference}: choose another --out, or "
                            f"delete {names} to make it again")
        if self.proof.exists():
            self.clear_remains()
        return self.proof.exists()

    def is_current(self):
        """Whether it is complete and made of what it would be made of now. UserError if another
        program made it."""
        if self.proof.exists() and not self.note_path.exists():
            raise UserError(f"{self.proof} was not made by this command; move or delete it")
        return self.proof.exists() and not self.difference()

    def write_note(self):
        """To be called once the inputs have proved good, before anything else is written."""
        write_text(self.note_path, json.dumps(self.note, indent=1))


def write_queries(out, folders, queries, heldout, settings, inputs):
    """Write the held-out queries of a run, and to the folder of each round its share of the others,
    unless they are there. UserError if other ones are."""
    if len(queries) < len(folders):
        raise UserError(f"--rounds {len(folders)}: more than the {len(queries)} queries")
    parts = {out / "heldout.jsonl": heldout}
    for number, folder in enumerate(folders):
        parts[folder / "queries.jsonl"] = queries[number::len(folders)]
    inputs = {name: path for name, path in inputs.items() if path}
    for path, records in parts.items():
        output = Output(path, settings | {"rounds": len(folders)}, inputs)
        if not output.is_complete():
            output.write_note()
            write_text(path, as_lines([{"prompt": record["prompt"]} for record in records]))
