"""The installed commands: `dancegrpo-train` is `python launch/train.py`, and so on."""

import importlib
import sys
from functools import partial


def run(name: str) -> int:
    """Runs launch/NAME.py with the arguments of this process; returns its exit status."""
    return importlib.import_module(f"launch.{name}").main(sys.argv)


train, sample, score, export, precompute, compile_check, serve_reward, pod = (
    partial(run, name)
    for name in ("train", "sample", "score", "export", "precompute", "compile_check", "serve_reward", "pod"))
