"""A training that can be interrupted at any moment and continued to the same weights."""

import contextlib
import errno
import json
import math
import os
import signal
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from plumbing.models import device
from plumbing.plaintext import PlainText
from plumbing.records import UserError, write_text

SAVE_SECONDS = 600      # between checkpoints
PROBE = "Two  words, été 12,345: <b>\n\n\tZwölf Äpfel; 漢字 🙂 don't"
STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def uninterrupted():
    """Hold Ctrl-C and SIGTERM back until the end of the block, so that it is done wholly or not at
    all."""
    held = []
    before = [signal.signal(stop, lambda *_: held.append(True)) for stop in STOPS]
    try:
        yield
    finally:
        for stop, handler in zip(STOPS, before):
            signal.signal(stop, handler)
    if held:
        raise KeyboardInterrupt


class Progress:
    """How far the training of OUT has come: its step, and in OUT.partial/ its checkpoint.pt and its
    log.jsonl. The folder gets its final name once the model is saved in it.

        progress = Progress(out, model, optimizer)          # continues
        while progress.step < steps:
            ...
            progress.check(row)
            with uninterrupted():
                optimizer.step()
                progress.log(row)                           # one step more
        progress.finish(chat)
    """

    def __init__(self, out, model, optimizer):
        self.out = Path(out)
        self.folder = Path(f"{out}.partial")
        self.checkpoint = self.folder / "checkpoint.pt"
        self.log_file = self.folder / "log.jsonl"
        self.model = model
        self.optimizer = optimizer
        self.step = 0
        self.saved = time.time()
        if self.checkpoint.exists():
            try:
                state = torch.load(self.checkpoint, map_location=device)
                for name, parameter in self.trained():
                    parameter.data.copy_(state["model"][name])
                optimizer.load_state_dict(state["optimizer"])
                self.step = state["step"]
            except Exception as error:          # of many kinds, as the file is broken
                raise UserError(f"{self.checkpoint}: not a checkpoint of this training "
                                f"({type(error).__name__}); delete it to start over") from None
        lines = []
        if self.log_file.exists():          # it may be ahead of the checkpoint
            lines = self.log_file.read_text().split("\n")[:self.step]
        write_text(self.log_file, "".join(line + "\n" for line in lines))

    def trained(self):
        """The names and the weights that training changes: all, or those of adapters."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def save(self):
        """Save what continuing needs. The order of the data and the reference follow from the
        settings."""
        state = {"step": self.step, "model": dict(self.trained()),
                 "optimizer": self.optimizer.state_dict()}
        temporary = self.folder / "checkpoint.tmp"
        with uninterrupted():
            try:
                torch.save(state, temporary)
            except RuntimeError as error:       # torch's way of saying that the disk is full
                temporary.unlink(missing_ok=True)
                raise OSError(errno.ENOSPC, str(error), str(temporary)) from None
            os.replace(temporary, self.checkpoint)

    def check(self, row):
        """UserError before an update by a loss or a gradient that is not finite. Where they are
        finite the weights have proved good, and now and then a checkpoint keeps them."""
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            kept = "the model that it started from"
            if self.checkpoint.exists():
                kept = self.checkpoint
            raise UserError(f"{self.out}: the loss became {row['loss']} (gradient norm "
                            f"{row['grad_norm']}) at step {self.step}; the last good state is "
                            f"{kept}. Try a lower learning rate, in another --out")
        if time.time() - self.saved > SAVE_SECONDS:
            self.save()
            self.saved = time.time()

    def log(self, row):
        """Append a line to the log; the step that it tells of is done."""
        with self.log_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.step += 1

    def finish(self, chat):
        """Save the model as an ordinary `from_pretrained` folder, OUT. UserError if its last update
        has spoiled it."""
        if not all(parameter.isfinite().all() for parameter in chat.model.parameters()):
            raise UserError(f"{self.out}: the last update made weights NaN or infinite; nothing is "
                            "saved. Try a lower learning rate, in another --out")
        with uninterrupted():
            chat.model.save_pretrained(self.folder)
            chat.tokenizer.save_pretrained(self.folder)
            for left in self.folder.glob("checkpoint.*"):
                left.unlink()
            if self.out.is_dir():
                self.out.rmdir()            # it is empty
            os.replace(self.folder, self.out)
        saved = PlainText(AutoTokenizer.from_pretrained(self.out, trust_remote_code=False))
        saved.before = chat.tokenizer.before
        if saved(PROBE).input_ids != chat.tokenizer(PROBE).input_ids:
            tqdm.write(f"warning: {self.out}: its tokenizer, saved and loaded, does not read texts "
                       "as before; copy the tokenizer files of the model that was trained into it")
