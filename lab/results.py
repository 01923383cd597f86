"""A file in results/: numbers, and where they come from."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from plumbing import files
from plumbing.chat import device


def write(path, **numbers):
    """Write a file of results. Its command is the one that runs now."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent,
                         capture_output=True, text=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        machine += f", {torch.cuda.get_device_name()}"
    origin = {"command": " ".join(["python", *sys.orig_argv[1:]]), "machine": machine,
              "commit": git.stdout.strip() or "unknown",
              "versions": {"python": platform.python_version(), "torch": torch.__version__,
                           "transformers": transformers.__version__}}
    files.write_text(path, json.dumps(origin | numbers, indent=1) + "\n")
