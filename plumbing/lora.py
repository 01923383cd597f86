"""Training of adapters (LoRA) in place of all weights, by the optional library peft: a setting.

The model's class stays as it is, so that the loop and both forms of log-probs do not know of it.
"""

import torch

from plumbing.records import UserError


def add_adapters(model, settings):
    """Put adapters of rank settings["lora_rank"] on all linear layers but the output head. They
    alone have gradients then. They change nothing before their first update."""
    try:
        from peft import LoraConfig, LoraModel
    except ImportError:
        raise UserError("lora_rank needs the library peft: pip install peft") from None
    torch.manual_seed(settings["seed"])         # half of an adapter begins at random
    rank = settings["lora_rank"]
    LoraModel(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"),
              "default")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"adapters of rank {rank}: {trained:,} of {model.num_parameters():,} parameters train")


def merge_adapters(model):
    """Add the adapters to their weights: the model is then an ordinary one."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_base_layer"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
