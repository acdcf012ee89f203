"""Trains a base model: `python launch/train.py --config=configs/shapes_flow.py [--config.a.b=value ...]`.

Running the same command again resumes from the newest checkpoint. Ctrl-C or SIGTERM saves and exits.

Exit status: 0 finished, 143 (128 + SIGTERM) stopped by a signal after saving, so that pod launchers and schedulers know
what to start again; 2 bad input.
"""

import logging
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def run(argv: list[str]) -> None:
    from dancegrpo_jax.config import load

    config = load(argv)
    from dancegrpo_jax import multihost  # after the config, whose errors come without importing jax
    from dancegrpo_jax.trainer import train

    multihost.initialize()
    if train(config)["stopped"]:
        sys.exit(128 + signal.SIGTERM)


def main(argv: list[str]) -> int:
    from dancegrpo_jax.config import exit_status

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("dancegrpo_jax").setLevel(logging.INFO)
    return exit_status(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
