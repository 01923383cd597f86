"""What a command makes (a file or a model's folder), and a note of what it was made from.

An output gets its final name when it is complete. While it grows it is called OUT.partial.
OUT.args.json notes its settings and inputs. A command with other ones refuses to touch it.
"""

import functools
import hashlib
import json
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from plumbing.records import UserError, as_lines, read_json, write_text

# But for rounding.
NO_EFFECT = ("micro_batch_tokens", "recompute_layers", "logps", "bf16_on_cpu")
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
ENOUGH = 16     # failures: with so many a command ends


@functools.cache        # by place, size and time: a large file is read once
def hash_of(path, size, time):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def fingerprint(path):
    """A hash of a data file, or of a checkpoint's weights, settings and tokenizer."""
    parts = [Path(path)]
    if Path(path).is_dir():
        parts = [part for part in Path(path).iterdir() if part.suffix in MODEL_FILES]
    digest = hashlib.sha256()
    for part in sorted(parts):
        state = part.stat()
        content = hash_of(part.resolve(), state.st_size, state.st_mtime_ns)
        digest.update(part.name.encode() + content)
    return digest.hexdigest()[:12]


class Output:
    """An output with its note: settings, and the name and content of each input. Where an input
    lies does not count, so a run's folder can be moved."""

    def __init__(self, path, settings, inputs):
        self.path = Path(path)
        self.partial = Path(f"{path}.partial")
        self.note_path = Path(f"{path}.args.json")
        self.note = {key: value for key, value in settings.items() if key not in NO_EFFECT}
        for name, source in inputs.items():
            self.note[name] = str(source)
            if Path(str(source)).exists():
                self.note[name] = f"{Path(source).name} with content {fingerprint(source)}"

    def difference(self):
        """How it was made differently from now, in words, or None."""
        before = read_json(self.note_path)
        for key in self.note | before:
            old = before.get(key)
            new = self.note.get(key)
            if old != new:
                return f"{key} = {old!r:.80}, not {new!r:.80}"

    def is_complete(self, remake=False):
        """Whether it is there. If it, or its beginning, was made from something else, that is a
        UserError; with `remake` it counts as not there."""
        begun = [path for path in (self.path, self.partial) if path.is_file() or
                 path.is_dir() and any(path.iterdir())]         # an empty folder is none
        if not begun:
            return False
        if not self.note_path.exists():
            raise UserError(f"{begun[0]} exists and was not made by this command; choose another "
                            "--out, or move or delete it")
        difference = self.difference()
        if difference and not remake:
            names = ", ".join(map(str, (*begun, self.note_path)))
            raise UserError(f"{self.path} was made with {difference}: choose another --out, or "
                            f"delete {names} to make it again")
        return self.path in begun and not difference

    def write_note(self):
        """Call this when the inputs have proved good, before anything else is written."""
        write_text(self.note_path, json.dumps(self.note, indent=1))


# ---- A file that grows ---------------------------------------------------------------------------

def read_partial(path):
    """{index: record} of a partial file, one batch a line. A last line that was cut off is
    dropped."""
    done = {}
    path.touch()
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    try:
        for line in lines:
            done |= {int(i): record for i, record in json.loads(line).items()}
    except (ValueError, AttributeError):
        raise UserError(f"{path}: not what this command began; delete it") from None
    write_text(path, "\n".join([*lines, ""]))
    return done


def grow(out, records, make, batch_size, workers):
    """Make a record from each of `records` by make(indices) -> new records, a batch at a time, or
    with several workers (which wait for a server) that many batches at once. Writes them to OUT in
    the order of `records`, and returns them. OUT.partial keeps each batch as a line as soon as it
    is made, and is continued. If batches failed, a UserError at the end says so; the others are
    kept."""
    partial = Path(f"{out}.partial")
    done = read_partial(partial)
    # Longest first: then little is padded, and memory runs out at once or never.
    left = sorted(set(range(len(records))) - done.keys(), key=lambda i: (-len(str(records[i])), i))
    batches = [left[start:start + batch_size] for start in range(0, len(left), batch_size)]
    bar = tqdm(total=len(records), initial=len(done), desc=Path(out).name, unit="query")
    failures = []

    def attempt(batch):
        try:
            return dict(zip(batch, make(batch)))
        except UserError as error:
            failures.append(error)
            return {}

    with partial.open("a", encoding="utf-8") as file, bar, ThreadPool(workers) as pool:
        results = map(attempt, batches)
        if workers > 1:
            results = pool.imap_unordered(attempt, batches)
        for made in results:
            if len(failures) >= ENOUGH:
                break
            if made:
                done |= made
                file.write(as_lines([made]))
                file.flush()
                bar.update(len(made))
    if failures:
        raise UserError(f"{len(records) - len(done)} of {len(records)} records are not made yet; "
                        f"the first failure: {failures[0]}; the same command asks for these alone")
    records = [done[i] for i in range(len(records))]
    write_text(out, as_lines(records))
    partial.unlink()
    return records


def write_queries(out, folders, queries, heldout, settings, inputs):
    """Write the held-out queries of a run, and to the folder of each round its share of the other
    queries, unless they are there. UserError if other queries are there."""
    if len(queries) < len(folders):
        raise UserError(f"--rounds {len(folders)}: more than the {len(queries)} queries")
    parts = {out / "heldout.jsonl": heldout}
    for number, folder in enumerate(folders):
        parts[folder / "queries.jsonl"] = queries[number::len(folders)]
    settings = settings | {"rounds": len(folders)}
    outputs = [Output(path, settings, inputs) for path in parts]
    # All are looked at before one is made.
    for output in [output for output in outputs if not output.is_complete()]:
        queries = [{"prompt": record["prompt"]} for record in parts[output.path]]
        output.write_note()
        write_text(output.path, as_lines(queries))
