"""From a compiled run to a verdict: memory against the chip's, predicted seconds, MFU, hours; as a dict and as text."""

from collections.abc import Sequence

from dancegrpo_jax.aot import roofline
from dancegrpo_jax.aot.phases import Phase, Run
from dancegrpo_jax.config import algorithm_of, evaluators_of

USABLE = 0.9  # share of the limit; the rest is for fragmentation and what is not counted
GB, TERA = 1e9, 1e12
PREDICTION = "All times are predictions from compiled programs and published peaks. Nothing was measured on a TPU."


def summarize(run: Run) -> dict:
    """Everything known of a run, ready for JSON; bytes, FLOPs and seconds are per device and execution of a phase."""
    limit, devices = run.topology.chip.memory, list(run.mesh.devices.flat)
    phases = [_phase(phase, run, devices) for phase in run.phases]
    refused = next((phase for phase in run.phases if phase.error), None)
    fullest = max(run.phases, key=lambda phase: phase.total)
    fits = refused is None and fullest.total < USABLE * limit
    verdict = (f"does not fit: the compiler refuses {refused.name} ({refused.error})" if refused else
               f"{'fits' if fits else 'does not fit'}: {fullest.name} needs {fullest.total / GB:.1f} of {limit / GB:.1f} GB "
               f"(usable: {USABLE:.0%})")
    summary = {
        "topology": run.topology.name, "chips": len(devices), "fits": fits, "verdict": verdict, "limit_bytes": limit,
        "mesh": {name: int(size) for name, size in run.mesh.shape.items()}, "resident_bytes": run.resident,
        "state_bytes": run.state_bytes, "phases": phases, "notes": [*run.notes, *_notes(run)]}
    compiled = {phase.name: phase for phase in run.phases if phase.memory}
    if "update" in compiled:
        summary["donated"] = compiled["update"].memory["alias"] / run.state_bytes
    if {"rollout", "update"} <= compiled.keys():
        summary["iteration"] = _iteration(run, phases)
    return summary


def _phase(phase: Phase, run: Run, devices: Sequence) -> dict:
    found = {"name": phase.name, "calls": phase.calls, "memory_bytes": phase.memory, "resident_bytes": phase.resident,
             "total_bytes": phase.total, "flops": phase.flops, "model_flops": phase.model_flops,
             "xla_flops_loop_bodies_once": phase.xla_flops, "compile_cpu_seconds": phase.compile_seconds, "error": phase.error}
    if phase.traffic:
        times = roofline.times(phase.flops, phase.traffic, run.topology, devices)
        found["seconds"] = {"compute": times.compute, "memory": times.memory, "ici": times.ici, "bound": times.bound,
                            "expected": times.expected}
        found["hbm_bytes"] = phase.traffic.hbm_bytes
        found["collectives"] = {}
        for collective in phase.traffic.collectives:
            entry = found["collectives"].setdefault(f"{collective.kind} x{len(collective.group)}", {"count": 0, "bytes": 0})
            entry["count"] += collective.count
            entry["bytes"] += collective.count * collective.bytes
    return found


def _iteration(run: Run, phases: list[dict]) -> dict:
    """Seconds of an iteration, apart and together, and what follows."""
    def total(key, kind):
        return sum(phase["calls"] * phase[key][kind] if kind else phase["calls"] * phase[key] for phase in phases)

    chips, config, peak = run.mesh.size, run.config, run.topology.chip.flops
    bound, expected = total("seconds", "bound"), total("seconds", "expected")
    parts = {phase["name"]: phase["calls"] * phase["seconds"]["expected"] for phase in phases}
    hours = config.steps * expected / 3600
    # "auto" computes old log-probabilities anew until an iteration has shown that it need not: only a run can tell.
    spared = parts.get("rescore", 0.0) if algorithm_of(config).rescore == "auto" else 0.0
    return {
        "expected_seconds": expected, "bound_seconds": bound, "parts_expected_seconds": parts,
        "model_flops": total("model_flops", "") * chips, "hardware_flops": total("flops", "") * chips,
        "mfu": total("model_flops", "") / expected / peak, "hfu": total("flops", "") / expected / peak,
        "mfu_bound": total("model_flops", "") / bound / peak,
        "samples_per_second": config.data.prompts_per_step * config.data.group_size / expected,
        "iterations": config.steps, "hours": hours, "chip_hours": hours * chips} | ({
            "expected_seconds_without_rescore": expected - spared,
            "hours_without_rescore": config.steps * (expected - spared) / 3600} if spared else {})


def _notes(run: Run) -> list[str]:
    config, shape, notes = run.config, run.mesh.shape, []
    parts = shape["data"] * shape["fsdp"]
    samples = config.data.prompts_per_step // config.data.chunks * config.data.group_size
    if samples % parts:
        notes.append(f"a rollout of {samples} samples does not divide over {parts} devices, so each computes all of them; "
                     f"lower config.data.chunks={config.data.chunks} or raise config.data.prompts_per_step")
    for name, evaluator in evaluators_of(config).items():
        if evaluator.batch % parts:
            notes.append(f"config.evals.{name}.batch={evaluator.batch} does not divide over {parts} devices: evaluation is "
                         f"computed by each of them; set it to a multiple of {parts}")
    if len(run.topology.shape) == 3 and min(run.topology.shape) > 2 and shape["fsdp"] == len(run.topology.devices):
        notes.append("fsdp over a whole 3-D torus: the compiler gathers weights by all-reduce, twice the traffic; split the "
                     "devices between config.mesh.data and config.mesh.fsdp")
    update = next((phase for phase in run.phases if phase.name == "update" and phase.memory), None)
    if update and update.memory["alias"] < 0.99 * run.state_bytes:
        notes.append("the update does not reuse the memory of the old state (donation failed)")
    return notes


def text(summary: dict, title: str) -> str:
    """The report of one topology for people. GB = 1e9 bytes."""
    mesh = " ".join(f"{name}={size}" for name, size in summary["mesh"].items() if size > 1) or "one device"
    lines = [f"{title} on {summary['topology']}: {summary['chips']} chips, mesh {mesh}", PREDICTION, "",
             summary["verdict"]]
    if "donated" in summary:
        state = summary["state_bytes"] / GB
        lines.append(f"donation: the update reuses {summary['donated']:.1%} of the state's {state:.2f} GB")
    lines.append("resident GB a chip: " + ", ".join(
        f"{name} {size / GB:.2f}" for name, size in summary["resident_bytes"].items() if size >= 5e6))
    lines += ["", f"{'GB a chip':16}{'argument':>9}{'output':>8}{'alias':>8}{'temp':>8}{'code':>7}{'peak':>8}{'resident':>10}"
                  f"{'total':>8}"]
    for phase in summary["phases"]:
        memory = phase["memory_bytes"]
        if not memory:
            lines.append(f"{phase['name']:16}{phase['error']}")
            continue
        cells = [memory[name] / GB for name in ("argument", "output", "alias", "temp", "code", "peak")]
        widths = (9, 8, 8, 8, 7, 8)
        lines.append(f"{phase['name']:16}" + "".join(f"{cell:{width}.2f}" for cell, width in zip(cells, widths, strict=True))
                     + f"{phase['resident_bytes'] / GB:10.2f}{phase['total_bytes'] / GB:8.2f}")
    lines += ["", f"{'one execution':16}{'calls':>6}{'TFLOP':>9}{'model':>9}{'XLA':>8}{'HBM GB':>9}{'compute':>9}{'memory':>8}"
                  f"{'ici':>8}{'bound':>8}{'expected s':>11}"]
    for phase in summary["phases"]:
        if "seconds" in phase:
            seconds = phase["seconds"]
            lines.append(f"{phase['name']:16}{phase['calls']:6}{phase['flops'] / TERA:9.1f}{phase['model_flops'] / TERA:9.1f}"
                         f"{phase['xla_flops_loop_bodies_once'] / TERA:8.2f}{phase['hbm_bytes'] / GB:9.1f}"
                         f"{seconds['compute']:9.3f}{seconds['memory']:8.3f}{seconds['ici']:8.3f}{seconds['bound']:8.3f}"
                         f"{seconds['expected']:11.3f}")
    lines.append("(per chip; model: without recomputation; XLA: its own count, the body of each loop once)")
    lines += ["", "collectives of one execution (xN: among N devices; GB of the buffer on a chip):"]
    for phase in summary["phases"]:
        moved = [f"{kind} {entry['count']}: {entry['bytes'] / GB:.2f}" for kind, entry in phase.get("collectives", {}).items()
                 if entry["bytes"] >= 5e7]
        if moved:
            lines.append(f"  {phase['name']:14}" + "; ".join(moved))
    if "iteration" in summary:
        lines += ["", *_iteration_text(summary["iteration"])]
    if "largest_microbatch" in summary:
        lines.append(f"largest config.optim.microbatch that fits: {summary['largest_microbatch'] or 'none'}")
    lines += [f"note: {note}" for note in summary["notes"]]
    return "\n".join(lines)


def _iteration_text(run: dict) -> list[str]:
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in run["parts_expected_seconds"].items() if seconds >= 0.005)
    lines = [f"iteration: {run['expected_seconds']:.1f} s expected ({parts}), {run['bound_seconds']:.1f} s at the bound",
             f"MFU {run['mfu']:.1%} expected ({run['mfu_bound']:.1%} at the bound), with recomputation {run['hfu']:.1%}; "
             f"{run['samples_per_second']:.2f} samples/s",
             f"{run['iterations']} iterations: {run['hours']:.2f} h, {run['chip_hours']:.0f} chip-hours"]
    if "expected_seconds_without_rescore" in run:
        short, hours = run["expected_seconds_without_rescore"], run["hours_without_rescore"]
        lines.append(f"rescore=auto: {run['expected_seconds']:.1f} s with the phase rescore, as in the first iteration; "
                     f"{short:.1f} s ({hours:.2f} h) once that has shown that rollout and update round alike")
    return lines


def table(titles: Sequence[str], summaries: Sequence[dict]) -> str:
    """Several runs as a Markdown table; the title of each in front."""
    lines = ["| run | topology | mesh | fits | GB a chip (limit) | s/iteration: rollout, update, all | bound | MFU | samples/s "
             "| hours | chip-hours |", "|" + "---|" * 11]
    for title, summary in zip(titles, summaries, strict=True):
        mesh = " ".join(f"{name} {size}" for name, size in summary["mesh"].items() if size > 1)
        total = max(phase["total_bytes"] for phase in summary["phases"])
        cells = [title, summary["topology"], mesh, "yes" if summary["fits"] else "**no**",
                 f"{total / GB:.1f} ({summary['limit_bytes'] / GB:.1f})"]
        if "iteration" in summary:
            run = summary["iteration"]
            parts = run["parts_expected_seconds"]
            cells += [f"{parts['rollout']:.1f}, {parts['update']:.1f}, {run['expected_seconds']:.1f}",
                      f"{run['bound_seconds']:.1f}", f"{run['mfu']:.0%}", f"{run['samples_per_second']:.2f}",
                      f"{run['hours']:.2f}", f"{run['chip_hours']:.0f}"]
        else:
            cells += [summary["verdict"].partition("(")[2].rstrip(")")] + [""] * 5
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
