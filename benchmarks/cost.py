"""What an iteration costs, by sampler steps, resolution and group size: `python benchmarks/cost.py --out=cost.csv`.

Trains the config for a few iterations per setting, one setting varied at a time, and reports the median time of each phase
without the first two iterations, which compile. The reward is JPEG size, which takes pictures of any resolution, unless
--config.rewards says otherwise: all keys can be overridden as for launch/train.py.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PHASES = ("rollout", "decode", "reward", "update", "total")
VARIED = {"steps": ("sampler.steps",), "resolution": ("model.height", "model.width"), "group": ("data.group_size",)}


def measure(argv: list[str], iterations: int) -> dict[str, float]:
    """Seconds per phase and samples per second of a short run, in a process of its own, of the config that `argv` describes."""
    import numpy as np

    from dancegrpo_jax.config import ConfigError, load
    from dancegrpo_jax.metrics import read_metrics

    config = load(argv)
    samples = config.data.prompts_per_step * config.data.group_size
    with tempfile.TemporaryDirectory() as folder:
        settings = {"run_dir": folder, "steps": iterations + 2, "evals": "{}",
                    "checkpoint.every": iterations + 2, "log.images_every": 0, "log.prompts_in_grid": 1,
                    "optim.microbatch": min(config.optim.microbatch, samples)}
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        run = subprocess.run([sys.executable, "launch/train.py", *argv, *flags], capture_output=True, text=True,
                             cwd=Path(__file__).resolve().parents[1])
        if run.returncode:
            raise ConfigError((run.stderr.splitlines() or ["launch/train.py failed"])[-1].removeprefix("error: "))
        records = [record for record in read_metrics(Path(folder) / "metrics.jsonl") if "time/total" in record][2:]
    result = {phase: float(np.median([record[f"time/{phase}"] for record in records])) for phase in PHASES}
    return {"samples": samples} | result | {"samples/s": samples / result["total"]}


def table(args: argparse.Namespace, overrides: list[str]) -> None:
    """Prints one row per setting, and writes them to --out as CSV."""
    os.sched_setaffinity(0, [int(core) for core in args.cores.split(",")])  # the runs inherit it
    argv = [f"--config={args.config}", '--config.rewards={"jpeg": {}}', *overrides]
    rows = []
    for varied, keys in VARIED.items():
        for value in getattr(args, varied).split(","):
            settings = [f"--config.{key}={value}" for key in keys]
            row = {"varied": varied, "value": value} | measure([*argv, *settings], args.iterations)
            if not rows:
                print("\n| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|", flush=True)
            rows.append(row)
            print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()) + " |",
                  flush=True)
    if args.out:
        with open(args.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader(), writer.writerows(rows)


def main(argv: list[str]) -> int:
    from dancegrpo_jax.config import exit_status

    parser = argparse.ArgumentParser(prog="python benchmarks/cost.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/shapes_flow.py")
    parser.add_argument("--out", metavar="FILE", help="also write the table as CSV")
    parser.add_argument("--cores", default="0,1", help="which to use")
    parser.add_argument("--iterations", type=int, default=5, help="that count")
    for name, values in {"steps": "5,8,16", "resolution": "16,32,64", "group": "6,12,24"}.items():
        parser.add_argument(f"--{name}", default=values, help=f"values of config.{VARIED[name][0]} (default: {values})")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return exit_status(table, *parser.parse_known_args(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
