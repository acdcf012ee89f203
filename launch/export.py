"""Turns a training run into files that diffusers loads: `python launch/export.py --run=runs/sd_hps --out=exported`.

A run with LoRA gives `pytorch_lora_weights.safetensors` (for `pipeline.load_lora_weights`), a run that trained all
weights a whole pipeline folder (for `from_pretrained`): the base model's, with the new denoiser. Weights are the
moving average, if the run keeps one.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def export(run_dir, out, dtype: str | None = None, max_shard_size: str = "5GB") -> Path:
    """Writes the newest checkpoint of a run into the folder `out`; returns what diffusers loads (file or folder).

    Args:
      dtype: of the written weights: "float32" or "bfloat16"; None: that of the base model's file (adapters: float32).
      max_shard_size: of one safetensors file, e.g. "5GB".
    Raises: ConfigError or CheckpointError if there is nothing to export, FileExistsError if `out` is not empty.
    """
    from dancegrpo_jax.models.files.convert import WEIGHT_FILES, Folder, save_params
    from dancegrpo_jax.models.files.lora import save_adapters
    from dancegrpo_jax.session import open_run

    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"--out={out}: not empty; choose another folder")
    config, pipeline, trainable, _, step = open_run(run_dir, text=False)
    out.mkdir(parents=True, exist_ok=True)
    if config.model.lora.rank:
        path = out / "pytorch_lora_weights.safetensors"
        save_adapters(path, trainable, scale=pipeline.lora_scale, dtype=dtype or "float32")
    else:
        trained = [pipeline.part(name) for name in trainable]

        def unwanted(folder, names):  # weights of the base denoiser, and what is no part of the pipeline
            stale = ".safetensors" if Path(folder) in (*trained, pipeline.folder) else ".bin"
            return [name for name in names if stale in name or name.startswith(".")]
        shutil.copytree(pipeline.folder, out, ignore=unwanted, dirs_exist_ok=True)
        for name, params in trainable.items():
            dtypes = dtype or Folder(pipeline.part(name)).dtypes()
            save_params(out / name, params, WEIGHT_FILES[0], dtypes, max_shard_size)
        path = out
    print(f"step {step} of {run_dir} -> {path}")
    return path


def main(argv: list[str]) -> int:
    from dancegrpo_jax.config import exit_status, program

    parser = argparse.ArgumentParser(prog=program(argv[0]), description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run", required=True, help="run_dir of a training run")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; default: as the base model's file")
    parser.add_argument("--max_shard_size", default="5GB", help="of one safetensors file")
    args = parser.parse_args(argv[1:])
    return exit_status(export, args.run, args.out, args.dtype, args.max_shard_size)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
