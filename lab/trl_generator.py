"""Steps 3 and 4 past one GPU: train.py's training by TRL and accelerate, called as train.py is.

    pip install trl==1.16.0
    accelerate launch -m lab.trl_generator generator --model M --data responses.jsonl --out DIR

It gives TRL our token ids: TRL's own tokenisation also trains the newline behind `<|im_end|>`, and
ends responses that were cut off. Loss, gradient, order and learning rate are those of train.py.
If an epoch does not divide equally among the processes, its first pairs are used again to fill the
last batch. On a CPU it computes in fp32.
"""

import contextlib
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

import sso
import train
from plumbing import command
from plumbing.models import device, load_chat, precision
from plumbing.recipes import stage_settings
from plumbing.records import UserError, as_lines, write_text

LOSS_TYPES = {"dpo": "sigmoid", "ipo": "ipo"}       # base losses: TRL's names of them
LOG_NAMES = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr",       # TRL's: ours
             "rewards/chosen": "chosen_rewards", "rewards/rejected": "rejected_rewards",
             "rewards/margins": "margin", "rewards/accuracies": "reward_accuracy"}


def make_config(out, settings):
    """Our settings as TRL's. A row of its data, and a micro-batch, is one pair."""
    if find_spec("trl") is None:
        raise UserError("TRL is not installed: pip install trl==1.16.0")
    from trl import DPOConfig
    base_loss = settings["base_loss"]
    if base_loss not in LOSS_TYPES:
        raise UserError(f"TRL does not have the base loss {base_loss}")
    if settings["lora_rank"]:
        raise UserError("lora_rank is for train.py; leave it at 0")
    pairs_a_query = len(sso.PAIRS[settings["objective"]])
    pairs_a_step = settings["batch_size"] * pairs_a_query
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if pairs_a_step % processes:
        raise UserError(f"batch_size = {settings['batch_size']}: {processes} processes cannot "
                        f"share {pairs_a_step} pairs equally")
    return DPOConfig(
        out, per_device_train_batch_size=1, max_length=None, precompute_ref_log_probs=True,
        gradient_accumulation_steps=pairs_a_step // processes, num_train_epochs=settings["epochs"],
        # Its loss is a mean over pairs; ours is a mean over queries of the sum of their pairs.
        loss_type=[LOSS_TYPES[base_loss], "sft"], beta=settings["beta"],
        loss_weights=[pairs_a_query, pairs_a_query * settings["gamma"]],
        learning_rate=settings["lr"], weight_decay=settings["weight_decay"],
        max_grad_norm=settings["clip"], use_cpu=device.type == "cpu",
        bf16=device.type == "cuda" and precision() == torch.bfloat16,
        gradient_checkpointing=bool(settings["recompute_layers"]),
        use_cache=True, logging_steps=1, save_strategy="no", report_to="none")


def make_rows(examples):
    """A data set with a row for each pair."""
    from datasets import Dataset
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_list([dict(zip(names, pair)) for pair in sum(examples, [])])


class Order:
    """A sampler. It gives the rows in the order of train.py, which differs in each epoch."""

    def __init__(self, rows, settings):
        self.rows = rows
        self.pairs_a_query = len(sso.PAIRS[settings["objective"]])
        n = len(rows) // self.pairs_a_query
        # One batch of everything is an epoch.
        self.epochs = iter(train.make_batches(n, n, settings["epochs"], settings["seed"]))

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        for example in next(self.epochs):
            first = example * self.pairs_a_query
            yield from range(first, first + self.pairs_a_query)


def make_trainer(chat, rows, config, settings):
    """TRL's DPOTrainer without its tokenisation, its order and its schedule."""
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

        def _get_train_sampler(self, *args):
            return Order(rows, settings)

        def create_scheduler(self, num_training_steps, optimizer=None):
            def share(step):            # of the peak; also asked for behind the last step
                step = min(step, num_training_steps - 1)
                return train.learning_rate(step, num_training_steps, 1.0, settings["warmup"])
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
            return self.lr_scheduler

    return Trainer(chat.model, args=config, train_dataset=rows,
                   processing_class=chat.tokenizer.tokenizer,
                   data_collator=DataCollatorForPreference(chat.pad_id))


def trl_train(stage, model, data, out, recipe):
    """`train.train` by TRL. Only the first process reads the data and writes."""
    settings = stage_settings(recipe, stage)
    folder = Path(f"{out}.trl")
    # TRL's processes share the rows, and the log-probs of the reference, on disk.
    rows, saved = folder / "rows", folder / "model"
    config = make_config(folder, settings)
    if config.process_index == 0:
        shutil.rmtree(folder, ignore_errors=True)
        prepared = train.prepare(model, data, out, settings, recipe["prompts"])
        if prepared:
            chat, examples = prepared
            make_rows(examples).save_to_disk(rows)
    config.distributed_state.wait_for_everyone()
    if not rows.exists():                   # OUT is complete
        return
    if config.process_index > 0:
        chat = load_chat(model)
    from datasets import load_from_disk
    trainer = make_trainer(chat, load_from_disk(rows), config, settings)
    trainer.train()
    if trainer.is_fsdp_enabled:             # which would save a shard of the weights a process
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(saved)
    if config.process_index == 0:
        write_log(trainer.state.log_history, saved / "log.jsonl")
        os.replace(saved, out)
        shutil.rmtree(folder)


def write_log(history, path):
    """log.jsonl, by the names of train.py. Only IPO's rewards differ: TRL sums them over tokens."""
    lines = []
    for step, row in enumerate(history[:-1]):       # the last row sums the training up
        lines.append({"step": step} | {ours: row[trls] for trls, ours in LOG_NAMES.items()})
    write_text(path, as_lines(lines))


def generator(model, data, out, recipe):
    """Step 3: train the data generator on responses."""
    trl_train("generator", model, data, out, recipe)


def policy(model, data, out, recipe):
    """Step 4: train the policy on pairs."""
    trl_train("policy", model, data, out, recipe)


if __name__ == "__main__":
    if int(os.environ.get("RANK", 0)) > 0:      # the first process holds OUT for all of them
        command.locked = contextlib.nullcontext
    command.run(__doc__, generator, policy)
