"""A training that can be interrupted at any moment and continued to the same weights."""

import json
import math
import os
import pickle
import shutil
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from plumbing.chat import device, first_line
from plumbing.files import UserError, write_text
from plumbing.guard import uninterrupted
from plumbing.plaintext import PlainText

SAVE_SECONDS = 600      # between checkpoints
PROBE = "Two  words, été 12,345: <b>\n\n\tZwölf Äpfel; 漢字 🙂 don't"


def check_space(out, model):
    """UserError unless there is room for the model and two checkpoints, each three times as
    large."""
    needed = 7 * sum(parameter.nbytes for parameter in model.parameters())
    free = shutil.disk_usage(out).free
    if Path(out, "checkpoint.pt").exists():
        free += Path(out, "checkpoint.pt").stat().st_size
    if free < needed:
        raise UserError(f"{out}: no disk space: {needed / 1e9:.2g} GB needed, "
                        f"{free / 1e9:.2g} GB free")


def save_model(chat, out):
    """Save a `from_pretrained` folder, which transformers 4 reads as well. UserError if its last
    update has spoiled it."""
    if not all(parameter.isfinite().all() for parameter in chat.model.parameters()):
        raise UserError(f"{out}: the last update made weights NaN or infinite; nothing is saved. "
                        "Try a lower --lr, in another --out")
    staging = Path(out, "saving")
    shutil.rmtree(staging, ignore_errors=True)
    chat.model.save_pretrained(staging)
    chat.tokenizer.save_pretrained(staging)
    publish(staging)
    saved = PlainText(AutoTokenizer.from_pretrained(out, trust_remote_code=False))
    if saved(PROBE).input_ids != chat.tokenizer(PROBE).input_ids:
        tqdm.write(f"warning: {out}: its tokenizer, saved and loaded, does not read texts as "
                   "before; copy the tokenizer files of the model that was trained into it")


def publish(staging):
    """Move a saved model to the folder above. config.json comes last: it proves that complete."""
    add_former_names(staging)
    out = staging.parent
    for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, Path(out, file.name))
    staging.rmdir()
    for name in ("checkpoint.pt", "checkpoint.tmp"):
        Path(out, name).unlink(missing_ok=True)


def add_former_names(folder):
    """Those of transformers 4. Without them it refuses the tokenizer, and gives a model whose RoPE
    has another base the base 10,000, silently. transformers 5 still reads them."""
    config_path, tokenizer_path = folder / "config.json", folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    rope = dict(config.get("rope_parameters") or {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:                # it is not where each kind of layer has a RoPE of its own
            config[name] = rope.pop(name)
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    write_text(config_path, json.dumps(config, indent=2))
    tokenizer = json.loads(tokenizer_path.read_text(encoding="utf-8"))
    if tokenizer["tokenizer_class"] == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    write_text(tokenizer_path, json.dumps(tokenizer, indent=2))


class Progress:
    """How far a training in a folder has come: its step, its checkpoint.pt and its log.jsonl.

        with Progress(out, model, optimizer) as progress:   # continues; on Ctrl-C saves
            while progress.step < steps:
                ...
                progress.check(row)
                with uninterrupted():
                    optimizer.step()
                    progress.log(row)                       # one step more
    """

    def __init__(self, out, model, optimizer):
        self.out, self.model, self.optimizer = Path(out), model, optimizer
        self.step, self.saved = 0, time.time()
        self.checkpoint, self.log_file = self.out / "checkpoint.pt", self.out / "log.jsonl"
        if self.checkpoint.exists():
            try:
                state = torch.load(self.checkpoint, map_location=device)
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                self.step = state["step"]
            except (RuntimeError, OSError, ValueError, LookupError, TypeError, EOFError,
                    pickle.UnpicklingError) as error:
                raise UserError(f"{self.checkpoint}: not a checkpoint of this training "
                                f"({first_line(error)}); delete it to begin anew") from None
        lines = []
        if self.log_file.exists():          # it may be ahead of the checkpoint
            lines = self.log_file.read_text().split("\n")[:self.step]
        write_text(self.log_file, "".join(line + "\n" for line in lines))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is KeyboardInterrupt and not Path(self.out, "config.json").exists():
            with uninterrupted():
                self.save()

    def save(self):
        """What continuing needs. The order of the data and the reference follow from the
        settings."""
        state = {"step": self.step, "model": self.model.state_dict(),
                 "optimizer": self.optimizer.state_dict()}
        temporary = self.out / "checkpoint.tmp"
        try:
            torch.save(state, temporary)
        except RuntimeError as error:       # torch's way of saying that the disk is full
            temporary.unlink(missing_ok=True)
            raise OSError(f"{temporary} cannot be written ({error})") from None
        os.replace(temporary, self.checkpoint)

    def check(self, row):
        """UserError before an update by a loss or gradient that is not finite. Where they are, the
        weights have proved good, and now and then a checkpoint keeps them."""
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            kept = "the model that it started from"
            if self.checkpoint.exists():
                kept = self.checkpoint
            raise UserError(f"{self.out}: the loss became {row['loss']} (gradient norm "
                            f"{row['grad_norm']}) at step {self.step}; the last good state is "
                            f"{kept}. Try a lower --lr, in another --out")
        if time.time() - self.saved > SAVE_SECONDS:
            self.save()
            self.saved = time.time()

    def log(self, row):
        """Append a line of the log; the step that it tells of is done."""
        with self.log_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.step += 1
