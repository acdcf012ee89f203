"""The installed commands: `dancegrpo-train` is `python launch/train.py`, and so on."""

import importlib
import os
import sys
from functools import partial


def use_working_directory() -> None:
    """Lets users name rewards, pipelines and algorithms of a file next to where they run: `my_rewards:brightness`."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there hides an installed module


def run(name: str) -> int:
    """Runs launch/NAME.py with the arguments of this process; returns its exit status."""
    use_working_directory()
    return importlib.import_module(f"launch.{name}").main(sys.argv)


train, sample, score, export, precompute, compile_check, serve_reward, pod = (
    partial(run, name)
    for name in ("train", "sample", "score", "export", "precompute", "compile_check", "serve_reward", "pod"))
