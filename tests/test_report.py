"""The report: self-contained, complete, and made from whatever a run has left so far."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from dancegrpo_jax import config as c
from dancegrpo_jax import metrics as m
from dancegrpo_jax.media import image_grid
from dancegrpo_jax.report import write_report


def record(step):
    values = {}
    for name in ("verifier", "clip"):
        values |= {f"train/reward/{name}/{key}": 0.1 * step
                   for key in ("mean", "std", "zero_std_ratio", "valid_ratio", "p10", "p90")}
    for kind in ("ratio", "ratio_first"):
        values |= {f"train/{kind}/{key}": 1.0 for key in ("mean", "min", "max")}
    values |= {f"train/{key}": 0.01 for key in ("clip_fraction/low", "clip_fraction/high", "approx_kl", "kl_base",
                                                "loss", "grad_norm", "advantage/abs_max")}
    values |= {f"time/{phase}": 1.0 for phase in ("rollout", "decode", "reward", "update")}
    return values | {"time/total": 4.0, "perf/samples_per_second": 3.0}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "shapes<b>"
    config = c.default()
    config.steps, config.rewards = 4, {"verifier": {"weight": 1.0}, "clip": {"weight": 0.5}}
    config.model.folder = "somewhere/tiny"
    config.algorithm = {"grpo": {"window": 3}}
    config.evals = {"eval": {"rows": "heldout.txt"}, "hard<i>": {"rows": "hard.txt", "every": 2}}
    m.start_run_dir(folder, config)
    writer = m.MetricWriter(folder, tensorboard=False)
    writer.scalars(0, {"eval/verifier/mean": 0.25, "eval/verifier/stderr": 0.03,
                       "eval/clip/mean": 0.5, "eval/clip/stderr": float("nan")})
    for step in range(1, 5):
        writer.scalars(step, record(step))
    writer.scalars(4, {"eval/verifier/mean": 0.75, "eval/verifier/stderr": 0.04,
                       "eval/clip/mean": 0.4, "eval/clip/stderr": 0.1})
    for step in (0, 2, 4):
        writer.scalars(step, {"hard<i>/verifier/mean": 0.125 * step, "hard<i>/verifier/stderr": 0.01, "hard<i>/diversity": 3.0})
    writer.close()
    for name in ("before", "after"):
        image_grid(np.zeros((1, 2, 8, 8, 3), np.uint8), ["x"]).save(folder / f"{name}.png")
    return folder


def pictures(page):
    return {caption: Image.open(io.BytesIO(base64.b64decode(data)))
            for caption, data in re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)"', page)}


def test_complete_report(run):
    path = write_report(run)
    page = path.read_text()
    assert path == run / "report.html"
    text = re.sub(r"base64,[^\"]*", "", page)
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", text)  # nothing external
    assert str(run.parent) not in page and "shapes<b>" not in page and "shapes&lt;b&gt;" in page
    assert "0.25 ± 0.03 → 0.75 ± 0.04" in page and "+0.5, 10.0 standard errors" in page
    assert "0.5 → 0.4 ± 0.1" in page and "-0.1</p>" in page  # no standard error at the start
    assert "iteration 4 of 4 ·" in page and "not finished" not in page and "grpo on tiny" in page
    assert page.index("eval: before and after") < page.index("hard&lt;i&gt;: before and after") and "hard<i>" not in page
    assert "0 ± 0.01 → 0.5 ± 0.01" in page and '<div class="card">diversity<br><b>3 → 3</b>' in page
    found = pictures(page)
    for words in ("before: the same", "after: the same", "reward verifier", "reward clip", "reward diversity",
                  "importance ratio", "first update", "clipped", "approximate KL", "KL to the base", "gradient norm",
                  "equal rewards", "time of an iteration"):
        assert any(words in caption for caption in found), words
    assert all(np.asarray(picture.convert("RGB")).std() > 1 for caption, picture in found.items())
    assert "<td>optim.learning_rate</td><td>1e-05</td>" in page and "<td>jax</td>" in page
    for option, value in {"algorithm.grpo.window": 3, "algorithm.grpo.clip_range": 0.0001, "evals.eval.every": 0,
                          "evals.hard&lt;i&gt;.every": 2}.items():
        assert f"<td>{option}</td><td>{value}</td>" in page, option
    assert "prefers-color-scheme: dark" in page


def test_partial_runs(run):
    for name in ("after.png", "before.png", "config.json", "versions.json"):
        (run / name).unlink()
    whole = (run / "metrics.jsonl").read_text()
    for text, words in [("\n".join(whole.splitlines()[:3])[:-40], "iteration 1"),  # the third line is torn
                        (whole.splitlines()[0], "0.25 ± 0.03"), ("", "iteration 0"),
                        (json.dumps({"step": 3, "x": "text"}), "iteration 3")]:
        (run / "metrics.jsonl").write_text(text)
        assert words in write_report(run).read_text()
    (run / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError):
        write_report(run)


def test_unfinished_run_says_so_and_a_rewritten_step_counts_once(run):
    with open(run / "metrics.jsonl", "w") as file:
        for step, value in ((0, 0.25), (2, 0.5), (2, 0.375)):
            file.write(json.dumps({"step": step, "eval/verifier/mean": value}) + "\n")
    page = write_report(run).read_text()
    assert "iteration 2 of 4 (not finished)" in page and "0.25 → 0.375" in page


def test_an_algorithm_without_ratios(run):
    """Its own scalars are drawn, named alike in one picture; nothing is empty."""
    config = json.loads((run / "config.json").read_text()) | {"algorithm": {"mine": {"type": "nowhere:Mine", "speed": 5}}}
    (run / "config.json").write_text(json.dumps(config))
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, 5):
            found = {"towards": 2.0 / step, "away": 3.0, "kl_base": 0.1, "loss": 1.0, "grad_norm": 1.0, "gap/low": 0.1,
                     "gap/high": 2.0, "reward/own/mean": 0.5, "compiles/update": 1}
            file.write(json.dumps({"step": step} | {f"train/{name}": value for name, value in found.items()}) + "\n")
    page = write_report(run).read_text()
    assert [caption for caption in pictures(page) if "before" not in caption and "after" not in caption] == [
        "reward own", "KL to the base weights, or what the algorithm measures in its place", "gradient norm", "loss", "away",
        "gap", "towards"]
    assert "mine on tiny" in page and "&#x27;speed&#x27;: 5" in page
