"""Steps 1 and 2 of SSO, and the sampling of step 4: a model writes principles, then answers under them.

    python generate.py principles --model M --queries Q.jsonl --out principles.jsonl
    python generate.py principles --principles data/features.jsonl --queries Q.jsonl --out principles.jsonl
    python generate.py responses --model M --principles principles.jsonl --out responses.jsonl
    python generate.py responses --model G --principles principles.jsonl --out pairs.jsonl --roles good bad

Responses are a standard preference file (prompt, chosen, rejected as message lists) with more columns.
While a file grows, a line a record, it is called OUT.partial, and the same command continues it: each batch
draws from its own seed. OUT itself is always complete. Its settings stand in OUT.args.json.

Simpler than the authors' code: one answer holds both principles.
"""

import argparse
import collections
import hashlib
import json
import math
import os
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          ContinuousBatchingConfig, GenerationConfig)
from transformers.utils import logging

import sso
import toy
from sso import UserError

logging.disable_progress_bar()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REWARD = AutoModelForSequenceClassification
NO_EFFECT = ("micro_batch_tokens", "recompute_layers", "compile")      # on results, but for rounding
CHOICES = {"objective": sso.PAIRS, "base": sso.BASE_LOSSES}     # settings that are names and no numbers
BOUNDS = {"seed": (0, 2**40), "top_p": (1e-12, 1), "warmup": (0, 1), "recompute_layers": (0, 1), "compile": (0, 1),
          "temperature": (0, math.inf), "gamma": (0, math.inf), "weight_decay": (0, math.inf)}  # others: above 0


# ---- Files ---------------------------------------------------------------------------------------

def read_jsonl(path, needs=("prompt",), queries=False):
    """The records of a JSONL file; prompt and responses, which may be strings, as lists of messages. Of a file
    of queries a prompt is one message of the user. An error names the file and the line."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    records = []
    # Bytes and not splitlines(), which would also split at separators that a text may hold.
    for number, line in enumerate(Path(path).read_bytes().rstrip().split(b"\n"), 1):
        try:
            record = {} | json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()     # fails on half a surrogate pair
        except (ValueError, TypeError) as error:                # not UTF-8, not JSON; not an object
            what = f"line {number}: not a JSON object ({error})" if line or number > 1 else "an empty file"
            raise UserError(f"{path}, {what}; one JSON object a line is expected") from None
        if "prompt" not in record and isinstance(record.get("chosen"), list):
            record["prompt"] = record["chosen"][:-1]            # TRL's "implicit prompt"
        for key in needs:
            if not record.get(key) or not str(record[key]).strip() or (
                    key != "prompt" and not isinstance(record[key], str)):
                raise UserError(f"{path}, line {number}: a record without a {key!r}")
        for column in {"prompt", *sso.COLUMNS.values()} & record.keys():
            messages = record[column]
            if isinstance(messages, str):
                messages = [{"role": "user" if column == "prompt" else "assistant", "content": messages}]
            if not messages or not isinstance(messages, list) or not all(
                    isinstance(m, dict) and {type(m.get("role")), type(m.get("content"))} == {str}
                    for m in messages):
                raise UserError(f"{path}, line {number}: {column!r} is neither a text nor a list of messages")
            record[column] = messages
        if queries and [message["role"] for message in record["prompt"]] != ["user"]:
            raise UserError(f"{path}, line {number}: a query is one user message, or a string")
        records.append(record)
    return records


def teaches_nothing(pairs):
    """Why the pairs of a record (`sso.preference_pairs`) are of no use, or None."""
    if not all(text.strip() for _, *responses in pairs for text, _ in responses):
        return "empty response"
    same = all(winner[0].strip() == loser[0].strip() for _, winner, loser in pairs)
    return "chosen equals rejected" if same else None


def read_pairs(path, objective, chat, max_length):
    """Of a preference file: the records that teach something, of each its R encoded pairs
    (`sso.encode_pairs`), and how many others there are, by reason."""
    records, examples, dropped = [], [], collections.Counter()
    for number, record in enumerate(read_jsonl(path), 1):
        try:
            for column in {sso.COLUMNS[role] for row in sso.PAIRS[objective].values() for role in row[1:]}:
                if column not in record:
                    raise UserError(f"a record without {column!r}, which objective {objective!r} needs")
                if record[column][:-1] not in ([], record["prompt"]):
                    raise UserError(f"what comes before the last message of {column!r} is not the prompt")
            pairs = sso.preference_pairs(record, objective, chat.prompts)
            if reason := teaches_nothing(pairs):
                dropped[reason] += 1
                continue
            examples.append(sso.encode_pairs(chat.tokenizer, chat.end_id, pairs, min(max_length, chat.context)))
            records.append(record)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if not records:
        raise UserError(f"{path}: no pair is left: {dict(dropped)}")
    return records, examples, dropped


def write_text(path, text):
    """Write a file under another name, then rename it: a kill never leaves half a file."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def as_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def fingerprint(path):
    """A hash of size and first MiB of a data file, or of a checkpoint's weights; a constant for a hub id."""
    files = [file for file in sorted(Path(path).glob("*.safetensors")) or [Path(path)] if file.is_file()]
    heads = [b"%d" % file.stat().st_size + file.open("rb").read(2**20) for file in files]
    return hashlib.sha256(b"".join(heads)).hexdigest()[:12]


def claim(out, settings, inputs, folder=False):
    """None if an output, a file or the folder of a model, is complete; an error if it was made with other
    settings, or not by this command; else what to `write_text` as a note of its settings, once its inputs
    (name -> path) have proved good."""
    done, note, work = Path(out), Path(f"{out}.args.json"), [Path(f"{out}.partial")]
    if folder:
        done, note, work = (done / "config.json", done / "args.json",
                            [done / "log.jsonl", done / "checkpoint.pt"])
    settings = {key: value for key, value in settings.items() if key not in NO_EFFECT}
    for name, path in inputs.items():
        settings[name] = os.path.relpath(path, note.parent) if os.path.exists(path) else str(path)
        settings[f"content of {name}"] = fingerprint(path)
    begun = [str(path) for path in [done, *work] if path.exists() and path.stat().st_size]
    if begun and not note.exists():
        raise UserError(f"{begun[0]} exists and was not made by this command; choose another --out")
    before = json.loads(note.read_text(encoding="utf-8")) if begun else settings
    for key in settings | before:
        if before.get(key) != settings.get(key):
            raise UserError(f"{out} was made with {key} = {before.get(key)!r}, not {settings.get(key)!r}: choose "
                            f"another --out, or delete {', '.join(begun)} and {note} to make it again")
    return None if done.exists() else (note, json.dumps(settings, indent=1))


def write_once(out, settings, inputs, records):
    """Write a JSONL file and the note of its settings, unless it is complete."""
    if note := claim(out, settings, inputs):
        write_text(*note)
        write_text(out, as_lines(records))


# ---- Models --------------------------------------------------------------------------------------

class Chat(NamedTuple):
    """A chat model with what goes with it."""
    model: Any          # in eval mode: no dropout, in training either
    tokenizer: Any
    stop_ids: list      # every id that ends a response
    end_id: int         # the one of them that closes an assistant turn
    pad_id: int
    context: int        # tokens, at most, of prompt and response
    prompts: dict       # sso.PROMPTS or toy.PROMPTS


def world(path):
    """The module whose PROMPTS and SETTINGS hold for a model: `toy` if its checkpoint says so, else `sso`."""
    config = Path(path, "config.json")
    return toy if config.is_file() and '"toy_world"' in config.read_text(encoding="utf-8") else sso


def resolve(path, stage, given):
    """The settings of a stage: the defaults of the model's world, and over them what the user gave."""
    settings = world(path).SETTINGS[stage] | {key: value for key, value in given.items() if value is not None}
    for key, value in settings.items():
        if key in CHOICES:
            continue
        least, most = BOUNDS.get(key, (1 if isinstance(value, int) else 1e-12, math.inf))
        if not least <= value <= most:
            raise UserError(f"{stage}: --{key.replace('_', '-')} {value} is not between {least} and {most}")
    return settings


def load_tokenizer(path):
    """The tokenizer of a chat model; refuses a model that is not there or that cannot take a principle."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        what = "not a checkpoint folder" if Path(path).is_dir() else (
            "no such folder, nor can it be reached on the Hugging Face hub; to work offline, fetch it where "
            f"there is a network (hf download {path} --local-dir DIR) and name that folder")
        raise UserError(f"model {path}: {what} ({str(error).strip().splitlines()[0]})") from None
    if tokenizer.chat_template is None:
        raise UserError(f"model {path}: it has no chat template; use a chat (instruct) model")
    messages = [{"role": "system", "content": "zebra"}, {"role": "user", "content": "q"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError:
        text = ""
    if "zebra" not in text:
        raise UserError(f"model {path}: its chat template has no system message, which carries principles. "
                        "Use a model that has one, or give it a template that puts it before the user's text")
    return tokenizer


def load_chat(path, dtype=torch.float32, of=AutoModelForCausalLM):
    """Load a chat model from a folder or the Hugging Face hub; `of` may be REWARD, a model with a head for one
    number in place of the vocabulary."""
    tokenizer = load_tokenizer(path)
    if world(path) is toy:
        toy.use_one_thread()
    try:
        model = of.from_pretrained(path, dtype=dtype, **({"num_labels": 1} if of is REWARD else {}))
        model = model.to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"model {path}: it cannot be loaded ({str(error).strip().splitlines()[0]})") from None
    try:
        own = getattr(model, "generation_config", None) or GenerationConfig.from_model_config(model.config)
        own.validate(strict=True)
    except ValueError:          # say, a temperature without do_sample: transformers would refuse to save it
        own.do_sample = True
    ids = own.eos_token_id
    stop_ids = sorted({tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None})
    end_id = sso.end_of_turn_id(tokenizer, stop_ids)
    # Padding is always masked, but a reward is read off the last token that is no padding: never end_id.
    known = (model.config.pad_token_id if of is REWARD else None, tokenizer.pad_token_id, *stop_ids, 0, 1)
    pad_id = next(i for i in known if i not in (None, end_id))
    if of is REWARD:
        model.config.pad_token_id = pad_id
    # Layers with a sliding window get the same mask as the others, which is the same within a window.
    slides = "sliding_attention" in (getattr(model.config, "layer_types", None) or ["sliding_attention"])
    window = slides and getattr(model.config, "sliding_window", None)
    context = min(getattr(model.config, "max_position_embeddings", 2**30), window or 2**30)
    if of is not REWARD and not reads_trees(model):
        raise UserError(f"model {path}: it does not read a pair as one row (its attention ignores a mask, or it "
                        "changes its logits after the output head): not supported")
    return Chat(model, tokenizer, stop_ids, end_id, pad_id, context, world(path).PROMPTS)


@torch.no_grad()
def reads_trees(model):
    """Whether `sso.pair_logps` of a small pair is what the model's own logits say of two sequences."""
    prompt, *both = [0, 1], [1, 0, 0], [0, 1]
    logps, own = sso.pair_logps(model, [[(prompt, *both)]], 0)[0].flatten(), []
    for response in both:
        ids = torch.tensor([prompt + response], device=device)
        token_logps = model(ids).logits[0, :-1].float().log_softmax(1).gather(1, ids[0, 1:, None])
        own.append(token_logps[1:].sum())
    return torch.allclose(logps, torch.stack(own), rtol=1e-4 if model.dtype == torch.float32 else 2e-2)


def load_sampler(path):
    """`load_chat` for sampling: bf16 on CUDA, and none of the checkpoint's own sampling settings (Qwen2.5
    brings a repetition penalty and top-k), so that responses are the policy's own."""
    chat = load_chat(path, torch.bfloat16 if device.type == "cuda" else torch.float32)
    own = chat.model.generation_config.to_diff_dict()
    ignored = {key: own[key] for key in own
               if not key.endswith(("_token_id", "_version")) and key[0] != "_" and key != "do_sample"}
    if ignored:
        tqdm.write(f"{path}: ignoring the checkpoint's sampling settings {ignored}")
    chat.model.generation_config = GenerationConfig(eos_token_id=chat.stop_ids, pad_token_id=chat.pad_id)
    return chat


def autocast():
    """bf16 matrix products on CUDA. Weights stay fp32: in bf16, steps of 5e-7 would be rounded away."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def score(chat, examples, budget, of=sso.pair_logps, name="scoring"):
    """Log-probs (or `of` another kind) and tokens of all examples of R encoded pairs: two (2, R, examples)."""
    scores = torch.zeros(2, len(examples[0]), len(examples), device=device)
    tokens = torch.zeros_like(scores, dtype=torch.long)
    for group in tqdm(sso.micro_batches(examples, budget), desc=name, leave=False):
        with autocast():
            scores[:, :, group], tokens[:, :, group] = of(chat.model, [examples[i] for i in group], chat.pad_id)
    return scores, tokens


# ---- Sampling ------------------------------------------------------------------------------------

def decode_static(chat, rows, seed, limit, how):
    """New ids of N rows of prompt ids, all decoded together until the longest answer ends: N lists."""
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), chat.pad_id)     # (N, T), padded on the left
    attention_mask = torch.zeros_like(input_ids)                # (N, T)
    for i, row in enumerate(rows):
        input_ids[i, width - len(row):] = torch.tensor(row)
        attention_mask[i, width - len(row):] = 1
    torch.manual_seed(seed)
    output = chat.model.generate(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device),
                                 max_new_tokens=limit, **how)
    return output[:, width:].tolist()


def decode_continuously(chat, rows, seed, limit, how, **sizes):
    """The same by transformers' continuous batching: a row whose answer ends makes room for another."""
    config = GenerationConfig(eos_token_id=chat.stop_ids, pad_token_id=chat.pad_id, max_new_tokens=limit, **how)
    outputs = chat.model.generate_batch(rows, generation_config=config, progress_bar=False,
                                        continuous_batching_config=ContinuousBatchingConfig(seed=seed, **sizes))
    if len(outputs) < len(rows) or any(output.error for output in outputs.values()):    # it logs and goes on
        raise UserError("transformers' continuous batching gave up (its log says why); --batch-size sets how "
                        "many queries it is given at once")
    return [output.generated_tokens for output in outputs.values()]


# A static batch waits for its longest answer: with real lengths most of its rows are idle. Where a step costs as
# much as its rows, on the CPU, the saving is eaten by the bookkeeping. On CUDA a batch is many times batch_size.
decode, BATCHES = (decode_continuously, 256) if device.type == "cuda" else (decode_static, 1)


@torch.no_grad()
def sample(chat, prompts, seed, s):
    """Sample a response to each of N prompts, lists of messages: N triples (text, finished, tokens)."""
    rows = [sso.encode_prompt(chat.tokenizer, messages) for messages in prompts]
    width, context = max(map(len, rows)), chat.context
    if width >= context:
        text = max(zip(rows, prompts), key=lambda pair: len(pair[0]))[1][-1]["content"]
        raise UserError(f"a prompt of {width} tokens leaves no room in the model's context of {context}; "
                        f"it ends with {text[-60:]!r}")
    how = {"do_sample": True, "temperature": s["temperature"], "top_p": s["top_p"], "top_k": 0}
    if not s["temperature"]:
        how = {"do_sample": False}
    responses = []
    for ids in decode(chat, rows, seed, min(s["max_new_tokens"], context - width), how):
        length = next((i for i, token in enumerate(ids) if token in chat.stop_ids), len(ids))
        text = chat.tokenizer.decode(ids[:length], skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)
        responses.append((text, length < len(ids), min(length + 1, len(ids))))
    return responses


def generate_file(out, records, make, s):
    """Make a record from each of `records` by `make(batch, seed)` -> (new records, tokens), a batch at a
    time, in OUT.partial; then write them to OUT in the order of the input, and return them."""
    partial, size = Path(f"{out}.partial"), s["batch_size"] * BATCHES
    lines = partial.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if partial.exists() else []
    lines = lines[:len(lines) // size * size]      # whole batches; the last line may be cut off, too
    write_text(partial, "".join(line + "\n" for line in lines))
    # Sorted by length, so that little is padded; the longest first, so that memory runs out at once or never.
    order = sorted(range(len(records)), reverse=True, key=lambda i: len(json.dumps(
        [records[i]["prompt"], records[i].get("good_principle"), records[i].get("bad_principle")])))
    with partial.open("a", encoding="utf-8") as file, tqdm(
            total=len(order), initial=len(lines), desc=Path(out).name, unit="query") as bar:
        tokens = 0
        for start in range(len(lines), len(order), size):
            seed = s["seed"] * 1_000_003 + 3 * start       # of this batch; three, for there are three roles
            made, new = make([records[i] for i in order[start:start + size]], seed)
            file.write(as_lines(made))
            file.flush()
            tokens += new
            bar.set_postfix({"tokens/s": int(tokens / max(1e-9, bar.format_dict["elapsed"]))}, refresh=False)
            bar.update(len(made))
    made = dict(zip(order, map(json.loads, partial.read_text(encoding="utf-8").split("\n")[:-1])))
    made = [made[i] for i in range(len(records))]
    write_text(out, as_lines(made))
    partial.unlink()
    return made


# ---- The two commands ----------------------------------------------------------------------------

def principles(model, queries, out, **given):
    """Step 1: write to OUT a bad and a good principle for each query."""
    s, records = resolve(model, "principles", given), read_jsonl(queries, queries=True)
    if not (note := claim(out, s, {"model": model, "queries": queries})):
        return print(f"{out}: complete")
    chat = load_sampler(model)
    write_text(*note)

    def make(batch, seed):
        asked = [sso.guideline_messages(record["prompt"][0]["content"], chat.prompts) for record in batch]
        made, answers = [], sample(chat, asked, seed, s)
        for record, (text, _, _) in zip(batch, answers):
            bad, good = sso.parse_guidelines(text)
            made.append(record | {"good_principle": good or chat.prompts["fallback_good"],
                                  "bad_principle": bad or chat.prompts["fallback_bad"], "fallback": not good})
        return made, sum(tokens for *_, tokens in answers)

    fallbacks = sum(record["fallback"] for record in generate_file(out, records, make, s))
    print(f"{out}: {len(records)} queries, {fallbacks} with the fixed pair (no principles in the answer)")


def written_principles(path, queries, out, seed=0):
    """Step 1 without a model: principles from a file. One with a prompt is for that query; of those without,
    two are drawn for each other query, and joined."""
    keys, own, general, made = ("good_principle", "bad_principle"), {}, [], []
    for record in read_jsonl(path, needs=keys):
        if "prompt" in record:
            own[record["prompt"][-1]["content"]] = record
        else:
            general.append(record)
    for number, record in enumerate(read_jsonl(queries, queries=True), 1):
        query = record["prompt"][0]["content"]
        if query not in own and len(general) < 2:
            raise UserError(f"{queries}, line {number}: {path} has no principles for this query")
        drawn = [own[query]] if query in own else random.Random(f"{seed} {query}").sample(general, 2)
        made.append(record | {key: " ".join(record[key] for record in drawn) for key in keys})
    write_once(out, {"seed": seed}, {"principles": path, "queries": queries}, made)


def responses(model, principles, out, roles=tuple(sso.COLUMNS), **given):
    """Step 2, and with the data generator as model the pairs of step 4: write to OUT the responses y+
    (chosen), y- (rejected) and yo (original) to each query, those of `roles`, beside what is there."""
    s, records = resolve(model, "responses", given), read_jsonl(principles)
    for number, record in enumerate(records, 1):
        try:
            for role in roles:
                sso.role_messages(role, record)
        except UserError as error:
            raise UserError(f"{principles}, line {number}: {error}") from None
    if not (note := claim(out, s | {"roles": list(roles)}, {"model": model, "principles": principles})):
        return print(f"{out}: complete")
    chat = load_sampler(model)
    write_text(*note)

    def make(batch, seed):
        made, total = [dict(record) for record in batch], 0
        for role in roles:
            prompts = [sso.role_messages(role, record, chat.prompts) for record in batch]
            answers = sample(chat, prompts, seed + list(sso.COLUMNS).index(role), s)
            for record, (text, finished, tokens) in zip(made, answers):
                record[sso.COLUMNS[role]] = [{"role": "assistant", "content": text}]
                record[f"{sso.COLUMNS[role]}_finished"] = finished
                total += tokens
        return made, total

    made = generate_file(out, records, make, s)
    if {"chosen", "rejected"} <= made[0].keys():
        useless = collections.Counter(teaches_nothing(sso.preference_pairs(r, "policy")) for r in made)
        useless.pop(None, None)
        print(f"{out}: {len(made)} pairs; no use in training, and so skipped there: {dict(useless) or 0}")


# ---- Command line --------------------------------------------------------------------------------

HELP = {"seed": "of sampling, or of the order of the data",
        "batch_size": "queries of a training step, or of a batch of sampling (CUDA takes 256 of these at once)",
        "temperature": "of sampling; 0 is greedy", "top_p": "nucleus sampling",
        "max_new_tokens": "longest response", "lr": "peak learning rate", "epochs": "passes over the data",
        "beta": "β of L_base", "gamma": "γ of L_sft", "weight_decay": "of AdamW, on matrices",
        "warmup": "share of the steps, then a cosine to zero", "clip": "largest gradient norm",
        "examples": "queries to train on, at most", "max_length": "tokens of prompt and response, at most",
        "micro_batch_tokens": "padded tokens at once: memory and speed, not the result",
        "recompute_layers": "1: less memory, more time", "compile": "1: torch.compile",
        "objective": "rows of the pair table", "base": "L_base"}


def add_settings(parser, stage, prefix="--"):
    """A flag for each setting of a stage. The defaults depend on the model, so none is set here."""
    for key, default in sso.SETTINGS[stage].items():
        if key in CHOICES and prefix != "--":       # of a whole run, --objective and --base say these
            continue
        parser.add_argument(prefix + key.replace("_", "-"), type=type(default), choices=CHOICES.get(key),
                            metavar=None if key in CHOICES else "V",
                            help=f"{HELP[key]} (default {default}, toy {toy.SETTINGS[stage][key]})")


def run(main):
    """Run a script's main(): bad input, a full disk and Ctrl-C end in one line and a code that is not
    zero."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {error}; lower --micro-batch-tokens (training) or --batch-size (sampling)")
    except (OSError, SafetensorError) as error:
        kept = "; what was finished is kept, the same command continues" if "No space" in str(error) else ""
        sys.exit(f"error: {error}{kept}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command continues where it stopped")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, source in (("principles", "queries"), ("responses", "principles")):
        command = commands.add_parser(name)
        command.add_argument("--model", required=name == "responses", help="checkpoint folder or Hugging Face id")
        command.add_argument(f"--{source}", required=True, metavar="FILE", help="JSONL, a 'prompt' a line")
        command.add_argument("--out", required=True, metavar="FILE", help="JSONL file to write")
        if name == "principles":
            command.add_argument("--principles", metavar="FILE", help="in place of --model: written principles")
        else:
            command.add_argument("--roles", nargs="+", choices=sso.COLUMNS, default=list(sso.COLUMNS),
                                 help="responses to sample (default: all; from the data generator: good bad)")
        add_settings(command, name)
    args = vars(parser.parse_args())
    if args.pop("command") == "responses":
        return responses(**args)
    written = args.pop("principles")
    if (args["model"] is None) == (written is None):
        parser.error("principles: give either --model or --principles")
    if written:
        return written_principles(written, args["queries"], args["out"], args["seed"] or 0)
    principles(**args)


if __name__ == "__main__":
    run(main)
