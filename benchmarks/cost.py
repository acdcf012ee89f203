"""What an iteration costs, by sampler steps, resolution and group size: `python benchmarks/cost.py --out=cost.csv`.

Trains the config for a few iterations per setting, one setting varied at a time, and reports the median time of each phase
without the first two iterations, which compile.

    --config=configs/shapes_flow.py   and its overrides, as for launch/train.py; the default reward is JPEG size, which
                                      takes pictures of any resolution
    --cores=0,1                       which to use
    --iterations=5                    that count
    --steps=5,8,16  --resolution=16,32,64  --group=6,12,24
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PHASES = ("rollout", "decode", "reward", "update", "total")
VARIED = {"steps": ("sampler.steps",), "resolution": ("model.height", "model.width"), "group": ("data.group_size",)}
DEFAULTS = {"--config": "configs/shapes_flow.py", "--out": "", "--cores": "0,1", "--iterations": "5",
            "--steps": "5,8,16", "--resolution": "16,32,64", "--group": "6,12,24"}


def measure(argv: list[str], iterations: int) -> dict[str, float]:
    """Seconds per phase and samples per second of a short run, in a process of its own, of the config that `argv` describes."""
    import numpy as np

    from dancegrpo_jax.config import ConfigError, load
    from dancegrpo_jax.metrics import read_metrics

    config = load(argv)
    samples = config.data.prompts_per_step * config.data.group_size
    with tempfile.TemporaryDirectory() as folder:
        settings = {"run_dir": folder, "steps": iterations + 2, "eval.every": 0, "eval.num_prompts": 1, "eval.batch": 1,
                    "checkpoint.every": iterations + 2, "log.images_every": 0, "log.prompts_in_grid": 1,
                    "grpo.microbatch": min(config.grpo.microbatch, samples)}
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        run = subprocess.run([sys.executable, "launch/train.py", *argv[1:], *flags], capture_output=True, text=True,
                             cwd=Path(__file__).resolve().parents[1])
        if run.returncode:
            raise ConfigError((run.stderr.splitlines() or ["launch/train.py failed"])[-1].removeprefix("error: "))
        records = [record for record in read_metrics(Path(folder) / "metrics.jsonl") if "time/total" in record][2:]
    result = {phase: float(np.median([record[f"time/{phase}"] for record in records])) for phase in PHASES}
    return {"samples": samples} | result | {"samples/s": samples / result["total"]}


def table(argv: list[str], own: dict[str, str]) -> None:
    """Prints one row per setting, and writes them to --out as CSV."""
    os.sched_setaffinity(0, [int(core) for core in own["--cores"].split(",")])  # the runs inherit it
    rows = []
    for varied, keys in VARIED.items():
        for value in own[f"--{varied}"].split(","):
            settings = [f"--config.{key}={value}" for key in keys]
            row = {"varied": varied, "value": value} | measure([*argv, *settings], int(own["--iterations"]))
            if not rows:
                print("\n| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|", flush=True)
            rows.append(row)
            print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()) + " |",
                  flush=True)
    if own["--out"]:
        with open(own["--out"], "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader(), writer.writerows(rows)


def main(argv: list[str]) -> int:
    from dancegrpo_jax.config import exit_status

    own, rest = dict(DEFAULTS), []
    for flag in argv[1:]:
        name, _, value = flag.partition("=")
        if name in own:
            own[name] = value
        else:
            rest.append(flag)
    if {"-h", "--help"} & set(rest):
        print(__doc__)
        return 0
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    rewards = '--config.rewards={"jpeg": {}}', '--config.eval.rewards={"jpeg": {}}'
    return exit_status(table, [argv[0], f"--config={own['--config']}", *rewards, *rest], own)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
