"""Steps 1 and 2 of SSO, and the sampling half of step 4: a model writes principles, then answers under them.

    python generate.py principles --model M --queries Q.jsonl --out principles.jsonl
    python generate.py responses --model M --principles principles.jsonl --out responses.jsonl
    python generate.py responses --model GENERATOR --principles principles.jsonl --roles good bad --out pairs.jsonl

The output is a standard preference file (prompt, chosen, rejected as message lists) with more columns. While it grows
it is called OUT.partial, a line a record, and the same command continues it; OUT itself is always complete. The
settings stand in OUT.args.json. Each batch draws from its own seed, so a continued file equals an uninterrupted one.

Simpler than the paper and its released code: one call writes both principles; static batches of `generate`.
"""

import argparse
import collections
import hashlib
import json
import os
import sys
from pathlib import Path

import jinja2
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

import sso
import toy
from sso import UserError

logging.disable_progress_bar()


# ---- Files ---------------------------------------------------------------------------------------

def as_messages(value, role):
    """A text as a list of one message; a list of messages as it is; None if it is neither."""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value.strip() or role == "assistant" else None
    good = isinstance(value, list) and value and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
    return value if good else None


def read_jsonl(path):
    """The records of a JSONL file, each with an id, its place in the file; prompt and responses, which may be
    strings, as lists of messages. An error names the file and the line."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    # Not splitlines(), which would also split at the separators that a text may hold.
    lines, records = Path(path).read_text(encoding="utf-8").rstrip().split("\n"), []
    if lines == [""]:
        raise UserError(f"{path}: an empty file; one JSON object a line is expected")
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON ({error}); one JSON object a line is expected") from None
        if not isinstance(record, dict) or not record.get("prompt"):
            raise UserError(f"{place}: a record without a 'prompt'")
        for column, role in [("prompt", "user")] + [(column, "assistant") for column in sso.COLUMNS.values()]:
            if column in record:
                record[column] = as_messages(record[column], role)
                if record[column] is None:
                    raise UserError(f"{place}: {column!r} is neither a text nor a list of messages (role and content)")
        records.append({"id": number - 1} | record)
    return records


def read_pairs(path, objective, model_path, tokenizer, end_id, max_length):
    """The records of a preference file, and of each its R encoded pairs (`sso.encode_pairs`)."""
    records, examples = read_jsonl(path), []
    for number, record in enumerate(records, 1):
        for column in {"chosen", "rejected"} | ({"original"} if objective == "sso" else set()):
            if column not in record:
                raise UserError(f"{path}, line {number}: a record without {column!r}, which {objective!r} needs")
            if record[column][:-1] not in ([], record["prompt"]):
                raise UserError(f"{path}, line {number}: what comes before the last message of {column!r} is not the prompt")
        try:
            pairs = sso.preference_pairs(record, objective, world(model_path).PROMPTS)
            examples.append(sso.encode_pairs(tokenizer, end_id, pairs, max_length))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return records, examples


def write_text(path, text):
    """Write a file under another name, then rename it: a kill never leaves half a file."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def fingerprint(path):
    """A short hash of a data file, or of the first MiB of each of a checkpoint folder's weights; None for a hub id."""
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(handle.read(2**20 if path.is_dir() else -1))
    return digest.hexdigest()[:12] if files else None


def claim(out, settings, inputs, proof=None, write=True):
    """Note the settings of an output beside it. True if the output is complete, False if there is work to do;
    an error if it was made with other settings. `inputs` are names and paths of what it is made from; an output
    that is a folder names the file in it, written last, that proves it complete."""
    note, done = (Path(out, "args.json"), Path(out, proof)) if proof else (Path(f"{out}.args.json"), Path(out))
    for name, path in inputs.items():
        settings = settings | {name: os.path.relpath(path, note.parent) if os.path.exists(path) else str(path),
                               f"{name} fingerprint": fingerprint(path)}
    if note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        for key, value in settings.items():
            if before.get(key) != value:
                raise UserError(f"{out} was made with {key} = {before.get(key)!r}, not {value!r}: choose another --out, "
                                f"or delete {out} and {note} to make it again")
    elif done.exists():
        raise UserError(f"{out} exists and was not made by this command; choose another --out")
    elif write:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps(settings, indent=1))
    return done.exists()


# ---- Models --------------------------------------------------------------------------------------

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast():
    """bf16 matrix products on CUDA. The weights stay fp32: in bf16, AdamW would round a step of 5e-7 away."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def load_model(path, dtype=torch.float32):
    """(model, tokenizer, end-of-turn id) of a chat model, from a folder or the Hugging Face hub."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        what = "not a checkpoint folder" if Path(path).is_dir() else (
            f"no such folder, and not to be had from the Hugging Face hub; offline, fetch it on another machine "
            f"(hf download {path} --local-dir DIR) and name that folder")
        raise UserError(f"--model {path}: {what} ({reason})") from None
    if tokenizer.chat_template is None:
        raise UserError(f"--model {path}: has no chat template; use a chat (instruct) model")
    try:
        text = tokenizer.apply_chat_template([{"role": "system", "content": "zebra"}, {"role": "user", "content": "q"}],
                                             tokenize=False)
    except jinja2.TemplateError:
        text = ""
    if "zebra" not in text:
        raise UserError(f"--model {path}: its chat template has no system message, which carries the principle; use a "
                        f"model that has one, or give its tokenizer a template that puts it before the user's text")
    tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return model, tokenizer, sso.end_of_turn_id(tokenizer, stop_ids(model, tokenizer))


def stop_ids(model, tokenizer):
    """Every id that ends a response: those of the generation config and the tokenizer's own."""
    ids = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [] if ids is None else [ids])})


def world(model):
    """The module whose PROMPTS and SETTINGS hold for a model: `toy` if its checkpoint says so, else `sso`."""
    config = Path(model, "config.json")
    return toy if config.is_file() and "toy_world" in config.read_text(encoding="utf-8") else sso


def resolve(model, stage, given):
    """The settings of a stage: the defaults of the model's world, and what the user gave."""
    return world(model).SETTINGS[stage] | {key: value for key, value in given.items() if value is not None}


def load_sampler(path):
    """`load_model` for sampling: bf16 on CUDA, and none of the checkpoint's own sampling settings, which would
    make responses less the policy's own (Qwen2.5 has a repetition penalty and top-k)."""
    model, tokenizer, _ = load_model(path, torch.bfloat16 if device.type == "cuda" else torch.float32)
    plain = GenerationConfig(eos_token_id=stop_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id)
    before = model.generation_config.to_diff_dict()
    ignored = {key: before[key] for key in before if key not in plain.to_diff_dict() and not key.endswith("_token_id")
               and key not in ("transformers_version", "_from_model_config", "do_sample")}
    if ignored:
        tqdm.write(f"{path}: ignoring the checkpoint's sampling settings {ignored}")
    model.generation_config = plain
    return model, tokenizer


# ---- Sampling ------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, tokenizer, prompts, seed, settings):
    """Sample one response for each of N prompts (lists of messages): N triples (text, finished, tokens)."""
    temperature, top_p, max_new_tokens = (settings[key] for key in ("temperature", "top_p", "max_new_tokens"))
    rows = [sso.encode_prompt(tokenizer, messages) for messages in prompts]
    width, context = max(map(len, rows)), model.config.max_position_embeddings
    if width >= context:
        start = prompts[max(range(len(rows)), key=lambda i: len(rows[i]))][-1]["content"][-60:]
        raise UserError(f"a prompt of {width} tokens leaves no room in the model's context of {context} (it ends with {start!r})")
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)     # (N, T), padded on the left
    attention_mask = torch.zeros_like(input_ids)                           # (N, T)
    for i, row in enumerate(rows):
        input_ids[i, width - len(row):] = torch.tensor(row)
        attention_mask[i, width - len(row):] = 1
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {"do_sample": False}
    output = model.generate(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device),
                            max_new_tokens=min(max_new_tokens, context - width), **how)[:, width:]   # (N, new tokens)
    stops, responses = set(stop_ids(model, tokenizer)), []
    for ids in output.tolist():
        length = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        text = tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        responses.append((text, length < len(ids), min(length + 1, len(ids))))
    return responses


def generate_file(out, records, make, batch_size, seed, reject=None):
    """Make one record from each of `records` by `make(batch, seed)` -> (new records, tokens), batch by batch, in
    OUT.partial; then write to OUT, in the order of the input, those against which `reject(record)` names no reason."""
    partial = Path(f"{out}.partial")
    # The last line may be cut off.
    lines = partial.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if partial.exists() else []
    lines = lines[:len(lines) // batch_size * batch_size]       # whole batches
    write_text(partial, "".join(line + "\n" for line in lines))
    # Sorted by length, so that little is padded; the longest first, so that memory runs out at once or never.
    order = sorted(records, key=lambda r: -len(json.dumps([r["prompt"], r.get("good_principle"), r.get("bad_principle")])))
    with partial.open("a", encoding="utf-8") as file, tqdm(
            total=len(order), initial=len(lines), desc=Path(out).name, unit="query") as bar:
        tokens = 0
        for start in range(len(lines), len(order), batch_size):
            made, new_tokens = make(order[start:start + batch_size], seed * 1_000_003 + 3 * start)
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in made))
            file.flush()
            tokens += new_tokens
            bar.set_postfix({"tokens/s": f"{tokens / max(1e-9, bar.format_dict['elapsed']):.0f}"}, refresh=False)
            bar.update(len(made))
    made = [json.loads(line) for line in partial.read_text(encoding="utf-8").split("\n")[:-1]]
    reasons = collections.Counter(reason for record in made if reject and (reason := reject(record)))
    made = sorted((record for record in made if not (reject and reject(record))), key=lambda record: record["id"])
    if not made:
        raise UserError(f"{out}: no record is left: {dict(reasons)}")
    note = Path(f"{out}.args.json")
    write_text(note, json.dumps(json.loads(note.read_text(encoding="utf-8")) | {"dropped": reasons}, indent=1))
    write_text(out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in made))
    partial.unlink()


def dropped(path):
    """How many pairs `responses` dropped from a file it wrote, by reason; none for any other file."""
    note = Path(f"{path}.args.json")
    return json.loads(note.read_text(encoding="utf-8")).get("dropped", {}) if note.exists() else {}


# ---- The two commands ----------------------------------------------------------------------------

def principles(model, queries, out, **given):
    """Step 1: write to OUT a bad and a good principle for each query."""
    settings, prompts, records = resolve(model, "principles", given), world(model).PROMPTS, read_jsonl(queries)
    for record in records:
        if [message["role"] for message in record["prompt"]] != ["user"]:
            raise UserError(f"{queries}, line {record['id'] + 1}: a query is one user message, or a string")
    if claim(out, settings, {"model": model, "queries": queries}):
        return print(f"{out}: complete")
    net, tokenizer = load_sampler(model)

    def make(batch, seed):
        answers = sample(net, tokenizer, [sso.guideline_messages(record["prompt"][0]["content"], prompts)
                                          for record in batch], seed, settings)
        made = []
        for record, (text, _, _) in zip(batch, answers):
            bad, good = sso.parse_guidelines(text)
            made.append(record | {"good_principle": good or prompts["fallback_good"],
                                  "bad_principle": bad or prompts["fallback_bad"], "fallback": not good})
        return made, sum(tokens for *_, tokens in answers)

    generate_file(out, records, make, settings["batch_size"], settings["seed"])
    fallbacks = sum(record["fallback"] for record in read_jsonl(out))
    print(f"{out}: {len(records)} queries; {fallbacks} got the fixed pair of principles, the model wrote none for them")


def teaches_nothing(record):
    """Why a preference pair is of no use, or None."""
    chosen, rejected = (record[column][-1]["content"].strip() for column in ("chosen", "rejected"))
    return "empty response" if not chosen or not rejected else "chosen equals rejected" if chosen == rejected else None


def responses(model, principles, out, roles=("good", "bad", "original"), **given):
    """Step 2, and with the data generator as model the pairs of step 4: write to OUT the responses y+ (chosen), y-
    (rejected) and yo (original) to each query, those of `roles`."""
    settings, prompts, records = resolve(model, "responses", given), world(model).PROMPTS, read_jsonl(principles)
    for record in records:
        if missing := [f"{role}_principle" for role in roles if role != "original" and not record.get(f"{role}_principle")]:
            raise UserError(f"{principles}, line {record['id'] + 1}: no {missing[0]!r}; `generate.py principles` writes it")
    if claim(out, settings | {"roles": list(roles)}, {"model": model, "principles": principles}):
        return print(f"{out}: complete")
    net, tokenizer = load_sampler(model)

    def make(batch, seed):
        made, total = [dict(record) for record in batch], 0
        for i, role in enumerate(roles):
            answers = sample(net, tokenizer, [sso.role_messages(role, record, prompts) for record in batch],
                             seed + i, settings)
            for record, (text, finished, tokens) in zip(made, answers):
                record[sso.COLUMNS[role]] = [{"role": "assistant", "content": text}]
                record[f"{sso.COLUMNS[role]}_finished"] = finished
                total += tokens
        return made, total

    pairs = {"good", "bad"} <= set(roles)
    generate_file(out, records, make, settings["batch_size"], settings["seed"], teaches_nothing if pairs else None)
    if pairs:
        print(f"{out}: {len(records)} pairs, less those that teach nothing: {dropped(out) or 0}")


def run(main):
    """Run a script's main(): bad input and a full disk end in one line, Ctrl-C in a word on how to go on."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error}; what was finished is kept, and the same command continues from it")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command continues where it stopped")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, source in (("principles", "queries"), ("responses", "principles")):
        command = commands.add_parser(name)
        command.add_argument("--model", required=True, help="checkpoint folder or Hugging Face id of a chat model")
        command.add_argument(f"--{source}", required=True, metavar="FILE", help="JSONL file with a 'prompt' a line")
        command.add_argument("--out", required=True, metavar="FILE", help="JSONL file to write")
        if name == "responses":
            command.add_argument("--roles", nargs="+", choices=sso.COLUMNS, default=list(sso.COLUMNS),
                                 help="responses to sample (default: all three; the data generator's pass: good bad)")
        for flag, default in sso.SETTINGS[name].items():
            command.add_argument(f"--{flag.replace('_', '-')}", type=type(default),
                                 help=f"default {default}, toy model {toy.SETTINGS[name][flag]}")
    args = vars(parser.parse_args())
    {"principles": principles, "responses": responses}[args.pop("command")](**args)


if __name__ == "__main__":
    run(main)
