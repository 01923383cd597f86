"""Steps 3 and 4 past one GPU: train.py's training by TRL and accelerate, called as train.py is.

    pip install trl==1.16.0
    accelerate launch -m lab.trl_generator generator --model M --data responses.jsonl --out DIR

It gives TRL our token ids: TRL's own tokenisation also trains the newline behind `<|im_end|>`, and
ends responses that were cut off. Loss, gradient, order and learning rate are those of train.py.
Where the processes cannot share an epoch equally, a few of its first pairs fill up its last batch.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from torch.optim.lr_scheduler import LambdaLR

import sso
import train
from plumbing import cli, files
from plumbing.chat import device, load_chat
from plumbing.checkpoint import publish
from plumbing.files import UserError

LOSS_TYPES = {"dpo": "sigmoid", "ipo": "ipo"}       # base losses: TRL's names of them
LOG_NAMES = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr",       # TRL's: ours
             "rewards/chosen": "chosen_rewards", "rewards/rejected": "rejected_rewards",
             "rewards/margins": "margin", "rewards/accuracies": "accuracy"}


def make_config(out, settings):
    """Our settings as TRL's. A row of its data, and a micro-batch, is one pair."""
    from trl import DPOConfig
    base_loss, objective = settings["base_loss"], settings["objective"]
    if base_loss not in LOSS_TYPES or objective == "joint":
        raise UserError(f"TRL does not have --objective {objective} with --base-loss {base_loss}")
    pairs_a_query = len(sso.PAIRS[objective])
    processes = int(os.environ.get("WORLD_SIZE", 1))
    pairs_a_step = settings["batch_size"] * pairs_a_query
    if pairs_a_step % processes:
        raise UserError(f"--batch-size {settings['batch_size']}: {processes} processes cannot "
                        f"share {pairs_a_step} pairs equally")
    return DPOConfig(
        out, per_device_train_batch_size=1, max_length=None, precompute_ref_log_probs=True,
        gradient_accumulation_steps=pairs_a_step // processes, num_train_epochs=settings["epochs"],
        # Its loss is a mean over pairs; ours is a mean over queries of the sum of their pairs.
        loss_type=[LOSS_TYPES[base_loss], "sft"], beta=settings["beta"],
        loss_weights=[pairs_a_query, pairs_a_query * settings["gamma"]],
        learning_rate=settings["lr"], weight_decay=settings["weight_decay"],
        max_grad_norm=settings["clip"], bf16=device.type == "cuda", use_cpu=device.type == "cpu",
        gradient_checkpointing=bool(settings["recompute_layers"]),
        use_cache=True, logging_steps=1, save_strategy="no", report_to="none")


class Order:
    """A sampler: the rows of a pass over the data in the order of train.py, anew in each epoch."""

    def __init__(self, n_rows, pairs_a_query, settings):
        self.n_rows, self.pairs_a_query = n_rows, pairs_a_query
        n_examples = n_rows // pairs_a_query
        # One batch of everything is an epoch.
        self.epochs = iter(train.make_batches(n_examples, n_examples, settings["epochs"],
                                              settings["seed"]))

    def __len__(self):
        return self.n_rows

    def __iter__(self):
        for example in next(self.epochs):
            first = example * self.pairs_a_query
            yield from range(first, first + self.pairs_a_query)


def make_trainer(chat, rows, config, settings):
    """TRL's DPOTrainer, but for its tokenisation, its order and its schedule."""
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

        def _get_train_sampler(self, *args):
            return Order(len(rows), len(sso.PAIRS[settings["objective"]]), settings)

        def create_scheduler(self, num_training_steps, optimizer=None):
            def share(step):            # of the peak; also asked for behind the last step
                step = min(step, num_training_steps - 1)
                return train.learning_rate(step, num_training_steps, 1.0, settings["warmup"])
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
            return self.lr_scheduler

    return Trainer(chat.model, args=config, train_dataset=rows,
                   processing_class=chat.tokenizer.tokenizer,
                   data_collator=DataCollatorForPreference(chat.pad_id))


def write_rows(examples, folder):
    """A row for each pair, on disk: TRL's processes share the log-probs of the reference there."""
    from datasets import Dataset
    records = []
    for example in examples:
        for prompt, winner, loser in example:
            records.append({"prompt_ids": prompt, "chosen_ids": winner, "rejected_ids": loser})
    Dataset.from_list(records).save_to_disk(folder)


def trl_train(stage, model, data, out, recipe):
    """`train.train`, by TRL. The first process alone reads the data and writes."""
    if find_spec("trl") is None:
        raise UserError("TRL is not installed: pip install trl==1.16.0")
    from datasets import load_from_disk
    settings = cli.stage_settings(recipe, stage)
    config = make_config(out, settings)
    rows, saving = Path(out, "rows"), Path(out, "saving")
    if config.process_index == 0:
        shutil.rmtree(rows, ignore_errors=True)
        prepared = train.prepare(model, data, out, settings, recipe["prompts"])
        if prepared:
            chat, examples = prepared
            write_rows(examples, rows)
    config.distributed_state.wait_for_everyone()
    if not rows.exists():                   # OUT is complete
        return
    if config.process_index > 0:
        chat = load_chat(model)
    trainer = make_trainer(chat, load_from_disk(rows), config, settings)
    trainer.train()
    if trainer.is_fsdp_enabled:             # which would save a shard of the weights a process
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(saving)
    if config.process_index == 0:
        write_log(trainer.state.log_history, Path(out, "log.jsonl"))
        publish(saving)
        shutil.rmtree(rows)


def write_log(history, path):
    """log.jsonl, by the names of train.py. Only IPO's rewards differ: TRL sums them over tokens."""
    lines = []
    for step, row in enumerate(history[:-1]):       # the last row sums the training up
        lines.append({"step": step} | {ours: row[trls] for trls, ours in LOG_NAMES.items()})
    files.write_text(path, files.as_lines(lines))


def trl_train_generator(model, data, out: Path, recipe):
    """Step 3: train the data generator on responses."""
    trl_train("generator", model, data, out, recipe)


def trl_train_policy(model, data, out: Path, recipe):
    """Step 4: train the policy on pairs."""
    trl_train("policy", model, data, out, recipe)


if __name__ == "__main__":
    cli.run(__doc__, ("generator", trl_train_generator, ["generator"]),
            ("policy", trl_train_policy, ["policy"]))
