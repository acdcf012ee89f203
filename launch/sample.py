"""Draws images from a base model, an exported folder or a training run.

    python launch/sample.py --model=dancegrpo_jax/worlds/weights/flow --prompt="a red circle" --out=samples --size=32
    python launch/sample.py --run=runs/shapes_flow --prompts=prompts.txt --images_per_prompt=4 --out=samples --grid

The sampler is deterministic (DDIM, or Euler for rectified flow), as in diffusers' pipelines. `--model` is a pipeline folder
or a hub id; `--run` takes model, size, steps and guidance from the run's config and its newest checkpoint.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Of diffusers' pipelines; FLUX's guidance is an input of its transformer, not classifier-free.
DEFAULTS = {"stable_diffusion": {"kernel": "ddim", "steps": 50, "guidance_scale": 7.5, "size": 512},
            "flux": {"kernel": "flow", "steps": 28, "guidance_scale": 3.5, "size": 1024}}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python launch/sample.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="pipeline folder or hub id")
    source.add_argument("--run", help="run_dir of a training run")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", help="prompt file, as config.data.train")
    parser.add_argument("--out", default="samples", help="folder of the images (default: samples)")
    parser.add_argument("--images_per_prompt", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: 50 (Stable Diffusion), 28 (FLUX)")
    parser.add_argument("--guidance_scale", type=float, help="default: 7.5 (Stable Diffusion), 3.5 (FLUX, as an input)")
    parser.add_argument("--shift", type=float, default=0.0, help="of the flow schedule; default: the checkpoint's own")
    parser.add_argument("--size", help="HEIGHTxWIDTH or one number, pixels; default: 512 (Stable Diffusion), 1024 (FLUX)")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default: 4)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16")
    parser.add_argument("--decode_tile", type=int, help="side of the VAE's tiles; default: no tiles")
    parser.add_argument("--grid", action="store_true", help="also write grid.png, a row for each prompt")
    args = parser.parse_args(argv[1:])
    if not args.prompt and not args.prompts:
        parser.error("no prompts: give --prompt or --prompts")
    for name in ("size", "guidance_scale", "dtype", "decode_tile"):
        if args.run and getattr(args, name) is not None:
            parser.error(f"--{name}: only for --model; a run is sampled as its config says")
    for name in ("images_per_prompt", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.steps is not None and args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


def sample(args: argparse.Namespace) -> Path:
    """Writes the images of `args` (`parse`) and index.jsonl into `args.out`; returns that folder."""
    import jax
    from PIL import Image

    from dancegrpo_jax import sharding
    from dancegrpo_jax.data import read_prompts
    from dancegrpo_jax.evaluate import encode_prompts, generate, load_run
    from dancegrpo_jax.metrics import image_grid
    from dancegrpo_jax.pipelines.base import find_folder, make_policy, pipeline_policy

    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        if args.run:
            config, policy, params, frozen, _ = load_run(args.run, mesh)
            steps, shift = args.steps or config.sampler.eval_steps, args.shift or config.sampler.shift
        else:
            folder = find_folder(args.model)
            name = pipeline_policy(folder)
            default = DEFAULTS[name]
            height, _, width = (args.size or str(default["size"])).partition("x")
            guidance = default["guidance_scale"] if args.guidance_scale is None else args.guidance_scale
            guidance = {"embedded_guidance" if name == "flux" else "guidance_scale": guidance}
            policy = make_policy(
                name, folder, kernel=default["kernel"], eta=1.0, height=int(height), width=int(width or height),
                dtype=args.dtype or "bfloat16", remat="none", decode_tile=args.decode_tile or 0, **guidance)
            params, frozen = policy.load(mesh=mesh)
            steps, shift = args.steps or default["steps"], args.shift

        embed = partial(encode_prompts, policy, frozen, mesh)
        repeated = [prompt for prompt in prompts for _ in range(args.images_per_prompt)]
        images = generate(policy, params, frozen, repeated, policy.schedule(steps, shift), embed=embed,
                          batch=min(args.batch, len(repeated)), seed=args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "index.jsonl").open("w") as index:
        for i, image in enumerate(images):
            file = f"{i // args.images_per_prompt:05d}_{i % args.images_per_prompt:02d}.png"
            Image.fromarray(image).save(out / file)
            index.write(json.dumps({"file": file, "prompt": repeated[i], "seed": args.seed}) + "\n")
    if args.grid:
        image_grid(images.reshape(len(prompts), args.images_per_prompt, *images.shape[1:]), prompts).save(out / "grid.png")
    print(f"{len(images)} images in {out}")
    return out


def main(argv: list[str]) -> int:
    from dancegrpo_jax.config import exit_status

    return exit_status(sample, parse(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
