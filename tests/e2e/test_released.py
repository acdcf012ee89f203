"""The presets on tiny pipelines saved by diffusers in the released layout: precompute, train, resume, sample, export."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("diffusers")

from dancegrpo_jax import trainer
from dancegrpo_jax.metrics import read_metrics
from dancegrpo_jax.pipelines.base import make_pipeline
from dancegrpo_jax.session import open_run
from launch import export, precompute, sample, train
from tests.released import respell, write_flux, write_sd

sys.path.append(str(Path(__file__).parents[1] / "parity"))
OPTIMISED = True
SMALL = {"steps": 2, "model.height": 24, "model.width": 40, "sampler.steps": 4, "sampler.eval_steps": 3,
         "data.prompts_per_step": 4, "data.group_size": 4, "data.chunks": 1, "optim.updates_per_rollout": 1,
         "optim.microbatch": 16, "algorithm.grpo.timestep_fraction": 0.7, "rewards": '{"color": {}, "jpeg": {"weight": 0.5}}',
         "evals.eval.count": 5, "evals.eval.batch": 8, "checkpoint.every": 1, "log.prompts_in_grid": 2,
         "log.tensorboard": False}


def flags(config, run, folder, **more):
    settings = SMALL | {"run_dir": run, "model.folder": folder} | {key.replace("__", "."): value for key, value in more.items()}
    return [f"--config=configs/{config}.py", *(f"--config.{key}={value}" for key, value in settings.items())]


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """Spares the second launch of a run its compilation, as on a user's machine."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module", autouse=True)
def no_implicit_transfers():
    """A whole iteration puts arrays on the devices only where it says so."""
    guarded = []

    def guard(function):
        def call(*args, **kwargs):
            guarded.append(function)
            with jax.transfer_guard("disallow"):
                return function(*args, **kwargs)
        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("collect", "learn"):
            patch.setattr(trainer, name, guard(getattr(trainer, name)))
        yield
    assert guarded


@pytest.fixture(scope="module", params=["sd_hps", "flux_hps_lora"])
def trained(request, tmp_path_factory):
    """(config name, folder of the base, folder of the run) after two iterations, a stop, and one more."""
    root = tmp_path_factory.mktemp(request.param)
    (write_sd if request.param == "sd_hps" else write_flux)(root / "today")
    folder, run, more = respell(root / "today", root / "base"), root / "run", {}
    if request.param != "sd_hps":
        more = {"model__lora__rank": 4, "model__lora__alpha": 8.0, "data__embeddings": root / "embeddings"}
        argv = flags(request.param, run, folder, **more)
        assert precompute.main(["precompute.py", *argv, f"--out={root / 'embeddings'}", "--batch=8"]) == 0
    assert train.main(["train.py", *flags(request.param, run, folder, **more)]) == 0
    assert train.main(["train.py", *flags(request.param, run, folder, **more, steps=3)]) == 0
    return request.param, folder, run


def test_trains_and_resumes(trained):
    """In bfloat16, with classifier-free guidance for Stable Diffusion, on eight devices."""
    config, _, run = trained
    records = [record for record in read_metrics(run / "metrics.jsonl") if "train/loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert abs(record["train/ratio_first/min"] - 1) <= 1e-6 and abs(record["train/ratio_first/max"] - 1) <= 1e-6
        assert record["train/grad_norm"] > 0
    stored = json.loads((run / "config.json").read_text())["model"]
    assert stored["dtype"] == "bfloat16" and stored["guidance_scale"] == (5.0 if config == "sd_hps" else 1.0)
    assert (run / "report.html").exists()


def test_exports(trained, tmp_path):
    """What diffusers loads is the run's moving average, and the pipeline is otherwise the base's."""
    import diffusers
    import torch
    from safetensors.numpy import load_file

    config, folder, run = trained
    assert export.main(["export.py", f"--run={run}", f"--out={tmp_path / 'out'}"]) == 0
    _, _, params, _, step = open_run(run, text=False)
    assert step == 3
    if config == "sd_hps":
        from dancegrpo_jax.models.files.convert import to_torch
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
        state, base = pipeline.unet.state_dict(), load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(torch.from_numpy(value), state[key]) for key, value in to_torch(params["unet"]).items())
        changed = [key for key, value in to_torch(params["unet"]).items() if not np.array_equal(value, base[key])]
        assert len(changed) > 0.9 * len(base)
        again = make_pipeline(tmp_path / "out", height=24, width=40)
        assert jax.tree.structure(again.load()[0]) == jax.tree.structure(params)
    else:
        tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
        key = "transformer.transformer_blocks.1.attn.to_q.lora_B.weight"
        ours = params["transformer"]["transformer_blocks.stacked.attn.to_q.lora_b"][1]
        np.testing.assert_array_equal(tensors[key], 2.0 * np.asarray(ours).T)
        assert np.abs(tensors[key]).max() > 0
    assert export.main(["export.py", f"--run={run}", f"--out={tmp_path / 'out'}"]) == 2  # not empty


def test_samples(trained, tmp_path, capsys):
    """From the run and from the base: images, an index and a grid; the run's differ from the base's."""
    from PIL import Image
    _, folder, run = trained
    common = ["--prompt=a red circle", "--prompt=two blue squares", "--images_per_prompt=2", "--seed=1", "--steps=3"]
    sources = {"run": [f"--run={run}"], "base": [f"--model={folder}", "--size=24x40"]}
    for name, source in sources.items():
        assert sample.main(["sample.py", *source, *common, f"--out={tmp_path / name}", "--grid"]) == 0
    index = [json.loads(line) for line in (tmp_path / "run" / "index.jsonl").read_text().splitlines()]
    assert [entry["prompt"] for entry in index] == ["a red circle"] * 2 + ["two blue squares"] * 2
    images = {name: [np.asarray(Image.open(tmp_path / name / entry["file"])) for entry in index] for name in sources}
    assert images["run"][0].shape == (24, 40, 3)
    assert np.any(images["run"][0] != images["run"][1]) and np.any(images["run"][0] != images["base"][0])
    assert (tmp_path / "run" / "grid.png").exists()
    assert sample.main(["sample.py", f"--model={tmp_path}", "--prompt=x"]) == 2
    assert re.search(r"error: .*model_index\.json", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        sample.main(["sample.py", f"--run={run}", "--prompt=x", "--size=24x40"])
    assert "--size: only for --model" in capsys.readouterr().err


def test_embeddings_of_another_encoder(tmp_path, capsys, monkeypatch):
    """Wrong encoder, wrong length, unknown prompts, an unfinished set: one line each, before weights are read."""
    write_flux(tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a red circle\n\ntwo blue squares\na green star\n" + "very " * 2000 + "long\n")
    out = tmp_path / "set"
    common = {"data__train": tmp_path / "prompts.txt", "evals__eval__rows": tmp_path / "prompts.txt", "data__embeddings": out}

    def run(**more):
        return train.main(["train.py", *flags("flux_hps", tmp_path / "run", tmp_path / "flux", **common | more)])

    assert precompute.main(["precompute.py", *flags("flux_hps", "x", tmp_path / "flux", **common), f"--out={out}"]) == 0
    assert "1 of 5 prompts are too long" in capsys.readouterr().err  # the file's and the negative one
    monkeypatch.setattr("dancegrpo_jax.pipelines.base.Pipeline.load", lambda *args, **kwargs: pytest.fail("weights were read"))
    (tmp_path / "other.txt").write_text("a red circle\na yellow star\na\nb\n")
    assert run(data__train=tmp_path / "other.txt") == 2
    assert "3 of 4 prompts are not in the embedding set, first 'a yellow star'" in capsys.readouterr().err
    assert run(model__text_length=12) == 2
    assert "embedding set made with lengths" in capsys.readouterr().err
    config = tmp_path / "flux" / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout_rate": 0.5}))
    assert run() == 2
    assert "embedding set made with encoders" in capsys.readouterr().err
    (out / "manifest.json").unlink()
    assert run() == 2
    assert "no finished embedding set" in capsys.readouterr().err


def test_records_are_lossless_and_drop_constant_tails(tmp_path):
    from dancegrpo_jax import embeddings
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((20, 8)).astype(np.float32)
    hidden[7:] = hidden[7]
    cond = {"hidden": hidden, "pooled": rng.standard_normal(8).astype(np.float32)}
    record = embeddings.pack(cond)
    for name, array in embeddings.unpack(record).items():
        assert array.dtype == jax.numpy.bfloat16
        np.testing.assert_array_equal(array, cond[name].astype(jax.numpy.bfloat16))
    assert len(record) < 8 * 8 * 2 + 8 * 2 + 400

    def encode(prompts):
        calls.append(len(prompts))
        return {"pooled": np.array([[len(prompt), 1.0] for prompt in prompts])}

    calls, prompts = [], [f"{'x' * i}" for i in range(10)]
    steps = embeddings.write(tmp_path / "set", prompts, encode, {"encoders": "a"}, batch=2, shard=4)
    assert next(steps) == (4, 10)  # killed after one shard of three
    done = len(calls)
    assert list(embeddings.write(tmp_path / "set", prompts, encode, {"encoders": "a"}, batch=2, shard=4))[-1] == (10, 10)
    assert len(calls) - done == 3  # the first shard was not encoded again
    found = embeddings.EmbeddingSet(tmp_path / "set", {"encoders": "a"})
    np.testing.assert_array_equal(found(["xxx", ""])["pooled"].astype(int), [[3, 1], [0, 1]])
    with pytest.raises(ValueError, match="other prompts"):
        next(embeddings.write(tmp_path / "set", prompts[1:-1], encode, {"encoders": "a"}))
