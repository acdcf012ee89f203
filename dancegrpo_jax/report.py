"""The report of a run: one HTML file that needs nothing else, made from what the run left in its folder."""

import base64
import dataclasses
import html
import io
import json
import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from dancegrpo_jax.config import RESERVED, ConfigError, algorithm_of, evaluators_of, flatten
from dancegrpo_jax.metrics import read_metrics

PHASES = ("rollout", "decode", "reward", "update")
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #667; --paper: #fff; --card: #f5f6f8; --line: #dde;
  --good: #17803d; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa3ad; --paper: #15171a; --card: #1f2226;
  --line: #33383e; --good: #5fd08a; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1100px; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.soft, figcaption { color: var(--soft); font-size: .9rem; margin: .2rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: .8rem; margin-top: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.card b { font-size: 1.25rem; } .up { color: var(--good); } .down { color: var(--bad); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: .8rem; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .4rem; }
figure img { width: 100%; height: auto; display: block; } figure figcaption { color: #667; padding: 0 .4rem; }
table { border-collapse: collapse; font-size: .88rem; }
td { border-bottom: 1px solid var(--line); padding: .15rem .9rem .15rem 0; vertical-align: top; }
td { overflow-wrap: anywhere; }
td:first-child { color: var(--soft); white-space: nowrap; }
details summary { cursor: pointer; font-weight: 600; margin-top: 1.2rem; }
"""


def write_report(run_dir) -> Path:
    """Writes `<run_dir>/report.html` from metrics.jsonl, config.json, versions.json, before.png and after.png.

    Whatever is missing, as in a run that is still going, is left out.

    Returns: the file. Raises: FileNotFoundError if `run_dir` has no metrics.jsonl.
    """
    folder = Path(run_dir)
    records = read_metrics(folder / "metrics.jsonl")
    series = _series(records)
    config, versions = _json(folder / "config.json"), _json(folder / "versions.json")
    evaluations = _evaluations(series, config)
    rewards = sorted({name.split("/")[2] for name in series if name.startswith("train/reward/")})

    parts = [_head(folder, records, config, versions)]
    for evaluation, measured in evaluations.items():
        parts += [f"<h2>{html.escape(evaluation)}: before and after</h2>", '<div class="cards">',
                  *(_card(label, series, *names) for label, names in measured.items()), "</div>"]
    grids = [(name, folder / f"{name}.png") for name in ("before", "after")]
    shown = [_figure(file.read_bytes(), f"{name}: the same prompts and noise")
             for name, file in grids if file.exists()]
    if shown:
        parts += ['<h2>Samples</h2><div class="plots">', *shown, "</div>"]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                                "grid.alpha": 0.25, "lines.linewidth": 1.3}):
        curves = [_reward_plot(name, series, evaluations) for name in sorted({*rewards, *(
            label for measured in evaluations.values() for label in measured)})]
        if curves:
            parts += ['<h2>Rewards</h2><div class="plots">', *curves, "</div>"]
        diagnostics = [plot for plot in _diagnostics(series, rewards) if plot]
        if diagnostics:
            parts += ['<h2>Optimization</h2><div class="plots">', *diagnostics, "</div>"]
    parts += _table("Configuration", _settings(config)) + _table("Versions", versions)

    title = html.escape(folder.resolve().name)
    page = (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>\n'
            + "\n".join(parts) + "\n</body></html>\n")
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    return file


# ------------------------------------------------------------------------------------------ reading


def _json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _series(records: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{metric: (steps, values)}; a step that was written twice counts once, the last time."""
    points: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                points.setdefault(name, {})[record["step"]] = float(value)
    return {name: (np.array(sorted(found)), np.array([found[step] for step in sorted(found)]))
            for name, found in points.items()}


def _evaluations(series: dict, config: dict) -> dict[str, dict[str, tuple[str, str]]]:
    """{evaluation: {what it measures: (metric, that of its standard error)}}, in the config's order."""
    found: dict[str, dict] = {name: {} for name in config.get("evals") or {}}
    for name in sorted(series):
        evaluation, given, what = name.partition("/")
        if given and evaluation not in RESERVED and not what.endswith("/stderr"):
            label = what.removesuffix("/mean")
            found.setdefault(evaluation, {})[label] = name, f"{evaluation}/{label}/stderr"
    return {evaluation: measured for evaluation, measured in found.items() if measured}


def _settings(config: dict) -> dict:
    """{dotted key: value}; of algorithm and evaluations every option, those with their defaults too."""
    settings = flatten(ConfigDict(config))
    try:
        algorithm, evaluators = algorithm_of(ConfigDict(config)), evaluators_of(ConfigDict(config))
    except (ConfigError, AttributeError):  # of an older version, or one's own that is not here: as it was given
        return settings
    name = next(iter(settings["algorithm"]))
    places = {"algorithm": {f"algorithm.{name}": algorithm},
              "evals": {f"evals.{name}": evaluator for name, evaluator in evaluators.items()}}
    expanded = {}
    for key, value in settings.items():
        if key in places:
            expanded |= {f"{place}.{option}": chosen for place, built in places[key].items()
                         for option, chosen in dataclasses.asdict(built).items()}
        else:
            expanded[key] = value
    return expanded


# ------------------------------------------------------------------------------------------ parts of the page


def _head(folder: Path, records: list[dict], config: dict, versions: dict) -> str:
    done = max((record["step"] for record in records), default=0)
    total = config.get("steps")
    facts = [f"iteration {done}" + (f" of {total}" if total else "")]
    if total and done < total:
        facts[0] += " (not finished)"
    seconds = sum(record.get("time/total", 0.0) for record in records)
    if seconds:
        facts.append(f"{seconds / 3600:.2f} h of training" if seconds > 600 else f"{seconds:.0f} s of training")
    if config.get("model") and config.get("algorithm"):
        facts.append(f"{next(iter(config['algorithm']))} on {Path(config['model'].get('folder', '')).name}")
    if versions.get("device"):
        facts.append(f"{versions.get('devices', '1')} x {versions['device']}")
    return f"<h1>{html.escape(folder.resolve().name)}</h1>\n<p class=soft>{html.escape(' · '.join(facts))}</p>"


def _card(label: str, series: dict, metric: str, stderr: str) -> str:
    steps, means = series[metric]
    errors = dict(zip(*series.get(stderr, ((), ())), strict=True))

    def value(i):
        error = errors.get(steps[i], math.nan)
        return f"{means[i]:.4g}" + (f" ± {error:.2g}" if math.isfinite(error) else "")
    if len(steps) < 2:
        body = f"<b>{value(0)}</b><p class=soft>at iteration {steps[0]}</p>"
    else:
        change = means[-1] - means[0]
        spread = math.hypot(errors.get(steps[0], math.nan), errors.get(steps[-1], math.nan))
        sure = f", {abs(change) / spread:.1f} standard errors" if spread > 0 else ""  # False for NaN too
        body = (f"<b>{value(0)} → {value(-1)}</b><p class='{'up' if change > 0 else 'down'}'>{change:+.4g}{sure}</p>"
                f"<p class=soft>iteration {steps[0]} → {steps[-1]}</p>")
    return f'<div class="card">{html.escape(label)}<br>{body}</div>'


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    return (f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def _table(title: str, values: dict) -> list[str]:
    if not values:
        return []
    rows = "".join(f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
                   for name, value in values.items())
    return [f"<details><summary>{title}</summary><table>{rows}</table></details>"]


# ------------------------------------------------------------------------------------------ plots


def _plot(draw, title: str) -> str:
    """A figure drawn by `draw(axes)`, as HTML. `Figure` without pyplot: no display, no global state, no leak."""
    figure = Figure(figsize=(5, 3), dpi=110)
    axes = figure.add_axes((0.16, 0.14, 0.81, 0.76))  # a layout engine would draw everything twice
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
    draw(axes)
    axes.set_xlabel("iteration")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return _figure(buffer.getvalue(), title)


def _reward_plot(name: str, series: dict, evaluations: dict) -> str:
    def draw(axes):
        if f"train/reward/{name}/mean" in series:
            steps, mean = series[f"train/reward/{name}/mean"]
            axes.plot(steps, mean, color="C0", label="train mean", marker="." if len(steps) < 3 else None)
            if f"train/reward/{name}/std" in series:
                std = series[f"train/reward/{name}/std"][1]
                if len(std) == len(mean):
                    axes.fill_between(steps, mean - std, mean + std, color="C0", alpha=0.15, lw=0,
                                      label="± std over samples")
        for i, (evaluation, measured) in enumerate(evaluations.items(), 1):
            if name in measured:
                metric, stderr = measured[name]
                steps, mean = series[metric]
                error = dict(zip(*series.get(stderr, ((), ())), strict=True))
                axes.errorbar(steps, mean, [error.get(step, math.nan) for step in steps], color=f"C{i}", marker="o",
                              capsize=3, ls="--", label=f"{evaluation} ± standard error")
    return _plot(draw, f"reward {name}")


def _diagnostics(series: dict, rewards: list[str]):
    """The plots that tell whether the optimization is healthy; None for those without data.

    What an algorithm finds besides comes last, one plot for all that is named alike.
    """
    drawn = {name for name in series if name.startswith(("train/reward/", "train/advantage/", "train/compiles/"))}

    def lines(title, names, **options):
        drawn.update(name for name, _ in names)
        present = [(name, label) for name, label in names if name in series]
        if not present:
            return None

        def draw(axes):
            for name, label in present:
                steps, values = series[name]
                axes.plot(steps, values - options.get("minus", 0), label=label, marker="." if len(steps) < 3 else None)
            if options.get("log") and any((series[name][1] > 0).any() for name, _ in present):
                axes.set_yscale("log")
        return _plot(draw, title)

    extremes = [(key, key) for key in ("max", "mean", "min")]
    yield lines("importance ratio - 1", [(f"train/ratio/{key}", label) for key, label in extremes], minus=1)
    yield lines("importance ratio - 1 in the first update of a rollout: must be 0 (on-policy)",
                [(f"train/ratio_first/{key}", label) for key, label in extremes], minus=1)
    yield lines("share of pairs that are clipped",
                [("train/clip_fraction/low", "low"), ("train/clip_fraction/high", "high")])
    yield lines("approximate KL to the rollout policy", [("train/approx_kl", "approx KL")])
    if np.any(series.get("train/kl_base", ((), np.zeros(1)))[1]):
        yield lines("KL to the base weights, or what the algorithm measures in its place", [("train/kl_base", "KL")])
    drawn.add("train/kl_base")
    yield lines("gradient norm", [("train/grad_norm", "grad norm")], log=True)
    yield lines("loss", [("train/loss", "loss")])
    yield lines("share of groups with equal rewards (no signal)",
                [(f"train/reward/{name}/zero_std_ratio", name) for name in rewards])
    yield lines("share of valid rewards", [(f"train/reward/{name}/valid_ratio", name) for name in rewards])
    yield lines("largest absolute advantage", [("train/advantage/abs_max", "abs max")])
    groups: dict[str, list] = {}
    for name in sorted(name for name in series if name.startswith("train/") and name not in drawn):
        stem, _, last = name.removeprefix("train/").rpartition("/")
        groups.setdefault(stem or last, []).append((name, last))
    for title, names in groups.items():
        yield lines(title, names)
    yield _time_plot(series)
    yield lines("samples per second", [("perf/samples_per_second", "samples/s")])


def _time_plot(series: dict) -> str | None:
    names = [f"time/{phase}" for phase in PHASES if f"time/{phase}" in series]
    if not names:
        return None
    steps = series[names[0]][0]
    names = [name for name in names if np.array_equal(series[name][0], steps)]

    def draw(axes):
        values = [series[name][1] for name in names]
        axes.stackplot(steps, values, labels=[name.removeprefix("time/") for name in names], alpha=0.8)
        if len(steps) > 3:  # the first iteration compiles and would hide the rest
            axes.set_ylim(0, 1.3 * float(np.max(np.sum(values, axis=0)[1:])) or None)
        axes.set_ylabel("seconds")
    return _plot(draw, "time of an iteration" + (" (the first one compiles)" if len(steps) > 3 else ""))
