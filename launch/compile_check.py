"""Does a config fit a TPU topology, and how fast should it be? Asked before renting, answered on any machine.

    python launch/compile_check.py --config=configs/flux_hps.py --topology=v5p:4x4x4 --adapt [--config.key=value ...]

Compiles rollout, decoding, rewards and update for the topology with libtpu (pip install libtpu): no TPU, no weights, no
downloads. Minutes of CPU time for each topology. Several topologies, separated by commas, make a table.
docs/compile_reports.md says how the prediction is made.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dancegrpo_jax.aot.topology import get_topology, set_environment


def check(args: argparse.Namespace, overrides: list[str]) -> list[dict]:
    """Prints the report of one topology, or a table of several; returns their summaries."""
    from dancegrpo_jax.config import load

    config = load(["launch/compile_check.py", f"--config={args.config}", *overrides])
    set_environment()
    from dancegrpo_jax.aot import report
    from dancegrpo_jax.aot.adapt import adapt
    from dancegrpo_jax.aot.phases import compile_run, largest_microbatch

    summaries, title = [], Path(args.config).stem
    for name in args.topology.split(","):
        topology, adapted, changed = get_topology(name), config, {}
        if args.adapt:
            adapted, changed = adapt(config, len(topology.devices), topology.shape)
        run = compile_run(adapted, name, args.phases.split(",") if args.phases else ())
        summary = report.summarize(run)
        summary["overrides"] = overrides + [f"--config.{key}={value}" for key, value in changed.items()]
        if args.microbatch:
            summary["largest_microbatch"] = largest_microbatch(run, report.USABLE)
        summaries.append(summary)
    if len(summaries) == 1:
        print(report.text(summaries[0], title))
    else:
        print(report.PREDICTION + "\n\n" + report.table([title] * len(summaries), summaries))
    for summary in summaries:
        if args.adapt:
            print(f"{summary['topology']} was checked with: {' '.join(summary['overrides']) or 'the config as it is'}")
    if args.json:
        Path(args.json).write_text(json.dumps(summaries, indent=1) + "\n", encoding="utf-8")
    return summaries


def main(argv: list[str]) -> int:
    from dancegrpo_jax.config import exit_status, program

    parser = argparse.ArgumentParser(prog=program(argv[0]), description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config file; its keys are overridden by --config.KEY=VALUE")
    parser.add_argument("--topology", required=True, help="chip:AxB or chip:AxBxC, or several with commas: v5e:4x4,v5p:4x4x4")
    parser.add_argument("--adapt", action="store_true", help="change mesh, prompts, chunks and micro-batch to what divides "
                                                            "over the topology, and say how")
    parser.add_argument("--phases", default="", help="compile only these: encode, rollout, decode, reward, update, ...")
    parser.add_argument("--microbatch", action="store_true", help="also search the largest config.optim.microbatch that fits "
                                                                 "(several compiles)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was found out")
    args, overrides = parser.parse_known_args(argv[1:])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("dancegrpo_jax.aot").setLevel(logging.INFO)
    return exit_status(check, args, overrides)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
