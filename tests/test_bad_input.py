"""The wrong configs and files a user may well bring to launch/train.py: each ends in one line that names the culprit.

Nothing may be computed before: sampling, evaluating and updating are forbidden here. (Every key's own range is tested
in test_config.py, every defect of a model folder in test_convert.py.)
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from dancegrpo_jax import evaluate, iteration, rollout
from launch.train import main
from tests.pipelines import write_pipeline

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("bad") / "flow", "flow")


@pytest.fixture
def run(pipeline, tmp_path, monkeypatch, capsys):
    """run(*overrides, change=None) -> (exit status, stderr) of the command on a copy of a sound pipeline."""
    def forbidden(*args, **kwargs):
        raise AssertionError("compute was spent")

    for module, name in ((evaluate, "generate"), (iteration, "rollout"), (iteration, "update"), (rollout, "sample")):
        monkeypatch.setattr(module, name, forbidden)
    shutil.copytree(pipeline, tmp_path / "model")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.py").write_text("def get_config(:\n")

    def call(*overrides, config=CONFIGS / "shapes_flow.py", change=None):
        if change:
            change(tmp_path / "model")
        overrides = [f"--config.{text}".replace("TMP", str(tmp_path)) for text in overrides]
        status = main(["train.py", f"--config={config}".replace("TMP", str(tmp_path)), f"--config.run_dir={tmp_path}/run",
                       f"--config.model.folder={tmp_path}/model", *overrides])
        return status, capsys.readouterr().err
    return call


CONFIG = [
    (["algorithm.grpo.clip_rnge=1e-4"], ["config.algorithm.grpo.clip_rnge", "clip_range"]),
    (["algorithm=ppo"], ["config.algorithm='ppo'", "ddpo"]),
    (["optim.learning_rate=fast"], ["config.optim.learning_rate='fast'"]),
    (["optim.learning_rate=-1"], ["config.optim.learning_rate=-1.0"]),
    (["steps=0"], ["config.steps=0"]),
    (["sampler.kernel=euler"], ["config.sampler.kernel='euler'", "dance"]),
    (["sampler.kernel=ddim"], ["config.sampler.kernel='ddim'", "dance or flow or cps"]),
    (["model.pipeline=sdxl"], ["config.model.pipeline='sdxl'", "FluxPipeline"]),
    (["model.height=36"], ["config.model.height=36", "multiple of 8", "32 and 40"]),
    (["model.parts={\"vaee\": \"TMP/model\"}"], ["config.model.parts", "'vaee'", "vae"]),
    (["data.group_size=1"], ["config.data.group_size=1"]),
    (["optim.microbatch=5"], ["config.optim.microbatch=5", "near are"]),
    (["mesh.fsdp=3"], ["mesh", "devices"]),
    (["rewards={\"verifyer\": {}}"], ["verifyer", "verifier"]),
    (["rewards={\"hps\": {\"model\": \"TMP/hps.pt\"}}"], ["hps", "TMP/hps.pt"]),
    (["rewards={\"mine\": {\"reward\": \"nowhere:score\"}}"], ["nowhere"]),
    (["rewards={\"jpeg\": {\"qualty\": 5}}"], ["jpeg", "qualty"]),
    (["evals.eval.rewards={\"jpeg\": {\"qualty\": 5}}"], ["jpeg", "qualty"]),
    (["evals.eval.num_prompts=5"], ["config.evals.eval.num_prompts", "count"]),
    (["rewards={\"clip_score\": {\"model\": \"TMP/nowhere\"}}"], ["TMP/nowhere"]),
    (["model.lora.rank=4", "model.lora.targets=(\"nothing\",)"], ["nothing"]),
]


@pytest.mark.parametrize(("overrides", "words"), CONFIG, ids=[overrides[-1] for overrides, _ in CONFIG])
def test_wrong_config(run, tmp_path, overrides, words):
    status, error = run(*overrides)
    check(status, error, words, tmp_path)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def rename_key(path):
    tensors = load_file(path)
    tensors["proj_out.wieght"] = tensors.pop("proj_out.weight")
    save_file(tensors, path)


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FILES = {
    "no config file": (dict(config="TMP/absent.py"), ["TMP/absent.py"]),
    "syntax error": (dict(config="TMP/broken.py"), ["TMP/broken.py", "SyntaxError"]),
    "no prompt file": (["data.train=TMP/absent.txt"], ["TMP/absent.txt"]),
    "empty prompt file": (["data.train=TMP/empty.txt"], ["TMP/empty.txt"]),
    "no file to evaluate": (["evals.eval.rows=TMP/absent.txt"], ["TMP/absent.txt"]),
    "no model folder": (["model.folder=TMP/absent"], ["TMP/absent"]),
    "run_dir is a file": (["run_dir=TMP/file"], ["TMP/file"]),
    "no index": (lambda m: (m / "model_index.json").unlink(), ["TMP/model/model_index.json", "config.model.pipeline"]),
    "unknown kind": (lambda m: edit_json(m / "model_index.json", _class_name="SanaPipeline"),
                     ["TMP/model/model_index.json", "SanaPipeline", "FluxPipeline"]),
    "no vae": (lambda m: shutil.rmtree(m / "vae"), ["TMP/model/vae"]),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), ["TMP/model/tokenizer"]),
    "truncated weights": (lambda m: truncate(m / WEIGHTS), [WEIGHTS, "copy the file again"]),
    "unknown key": (lambda m: rename_key(m / WEIGHTS), ["proj_out.weight", "proj_out.wieght"]),
    "wrong shape": (lambda m: edit_json(m / "transformer/config.json", in_channels=8),
                    ["model/transformer", "has shape (16,), expected (8,)"]),
    "unknown setting": (lambda m: edit_json(m / "vae/config.json", latent_chanels=4), ["vae/config.json", "latent_channels"]),
    "config is no JSON": (lambda m: truncate(m / "text_encoder/config.json"), ["text_encoder/config.json", "JSON"]),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_files(run, tmp_path, case):
    what, words = FILES[case]
    if callable(what):
        status, error = run(change=what)
    elif isinstance(what, dict):
        status, error = run(**what)
    else:
        status, error = run(*what)
    check(status, error, words, tmp_path)


def check(status, error, words, tmp_path):
    assert status == 2, error
    message = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and error.rstrip().endswith(message[0]), error
    for word in words:
        assert word.replace("TMP", str(tmp_path)) in message[0], message[0]
    assert "Traceback" not in error and not list(tmp_path.glob("run/metrics.jsonl"))
