"""Draws images from a base model, an exported folder or a training run.

    python launch/sample.py --model=dancegrpo_jax/worlds/weights/flow --prompt="a red circle" --out=samples --size=32
    python launch/sample.py --run=runs/shapes_flow --prompts=prompts.txt --images_per_prompt=4 --out=samples --grid

The sampler is deterministic (DDIM, or Euler for rectified flow), as in diffusers' pipelines. `--model` is a pipeline folder
or a hub id; `--run` takes model, size, steps and guidance from the run's config and its newest checkpoint.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse(argv: list[str]) -> argparse.Namespace:
    from dancegrpo_jax.config import program

    parser = argparse.ArgumentParser(prog=program(argv[0]), description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="pipeline folder or hub id")
    source.add_argument("--run", help="run_dir of a training run")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", help="prompt file, as config.data.train")
    parser.add_argument("--out", default="samples", help="folder of the images (default: samples)")
    parser.add_argument("--images_per_prompt", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the model's usual, 50 (Stable Diffusion), 28 (FLUX)")
    parser.add_argument("--guidance_scale", type=float,
                        help="default: the model's usual, 7.5 (Stable Diffusion), 3.5 (FLUX, as an input)")
    parser.add_argument("--negative_prompt", help="what guidance leads away from; default: none")
    parser.add_argument("--shift", type=float, default=0.0, help="of the flow schedule; default: the checkpoint's own")
    parser.add_argument("--size", help="HEIGHTxWIDTH or one number, pixels; default: 512 (Stable Diffusion), 1024 (FLUX)")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default: 4)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16")
    parser.add_argument("--decode_tile", type=int, help="side of the VAE's tiles; default: no tiles")
    parser.add_argument("--grid", action="store_true", help="also write grid.png, a row for each prompt")
    args = parser.parse_args(argv[1:])
    if not args.prompt and not args.prompts:
        parser.error("no prompts: give --prompt or --prompts")
    for name in ("size", "guidance_scale", "negative_prompt", "dtype", "decode_tile"):
        if args.run and getattr(args, name) is not None:
            parser.error(f"--{name}: only for --model; a run is sampled as its config says")
    for name in ("images_per_prompt", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.steps is not None and args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


def base_model(args: argparse.Namespace, mesh):
    """(pipeline, trainable, frozen, schedule) of `--model`, with what its kind is usually sampled with unless more is asked."""
    from dancegrpo_jax.pipelines.base import pipeline_class

    kind = pipeline_class(args.model)
    usual = kind.defaults
    height, _, width = (args.size or f"{usual.height}x{usual.width}").partition("x")
    # A distilled model takes its guidance as an input; for it, classifier-free guidance is off.
    name = "embedded_guidance" if usual.embedded_guidance else "guidance_scale"
    pipeline = kind(args.model, height=int(height), width=int(width or height), dtype=args.dtype or "bfloat16", remat="none",
                    decode_tile=args.decode_tile or 0, negative_prompt=args.negative_prompt or "",
                    **{name: getattr(usual, name) if args.guidance_scale is None else args.guidance_scale})
    schedule = pipeline.schedule(args.steps or usual.steps, args.shift)  # checked before anything is loaded
    return pipeline, *pipeline.load(mesh=mesh), schedule


def sample(args: argparse.Namespace) -> Path:
    """Writes the images of `args` (`parse`) and index.jsonl into `args.out`; returns that folder."""
    import jax
    from PIL import Image

    from dancegrpo_jax import sharding
    from dancegrpo_jax.data import read_rows, rows_of
    from dancegrpo_jax.media import image_grid, to_uint8
    from dancegrpo_jax.rollout import encode, generate
    from dancegrpo_jax.session import open_run, with_negatives

    rows = rows_of(args.prompt) + (read_rows(args.prompts) if args.prompts else [])
    mesh, out, count = sharding.make_mesh(), Path(args.out), args.images_per_prompt
    out.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(mesh), (out / "index.jsonl").open("w") as index:
        if args.run:
            config, pipeline, trainable, frozen, _ = open_run(args.run, mesh)
            schedule = pipeline.schedule(args.steps or config.sampler.eval_steps, args.shift or config.sampler.shift)
        else:
            pipeline, trainable, frozen, schedule = base_model(args, mesh)

        def condition(rows, key, call):
            return call("encode", encode, pipeline, frozen, sharding.shard_batch(pipeline.inputs(rows), mesh), key)
        wanted = [row for row in with_negatives(rows, pipeline) for _ in range(count)]
        pictures = []  # for the grid
        drawn = generate(pipeline, trainable, frozen, wanted, schedule, condition=condition, batch=min(args.batch, len(wanted)),
                         seed=args.seed)
        for part, media, valid in drawn:
            for row, picture in zip(part[:valid], to_uint8(media)[:valid, 0, 0], strict=True):
                number = len(pictures)
                file = f"{number // count:05d}_{number % count:02d}.png"
                Image.fromarray(picture).save(out / file)
                index.write(json.dumps({"file": file, "prompt": row.prompt, "seed": args.seed}) + "\n")
                pictures.append(picture if args.grid else None)
    if args.grid:
        images = np.stack(pictures).reshape(len(rows), count, *pictures[0].shape)
        image_grid(images, [row.prompt for row in rows]).save(out / "grid.png")
    print(f"{len(pictures)} images in {out}")
    return out


def main(argv: list[str]) -> int:
    from dancegrpo_jax.config import exit_status

    return exit_status(sample, parse(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
