"""Scores images with any rewards: `python launch/score.py --index=samples/index.jsonl --rewards='{"hps": {}}' --out=s.csv`.

The index names images and prompts, one JSON object a line with `file` (or `path`, relative to the index) and `prompt`:
what `launch/sample.py` writes; its other fields reach the rewards as metadata. A folder of images in place of the index
scores them with `--prompt` for all.
"""

import argparse
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_index(path: str, prompt: str) -> list[tuple]:
    """(image Path, data.Row) pairs of an index file, or of a folder. Raises: ValueError naming file and line."""
    from dancegrpo_jax.data import Row

    path = Path(path)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES]
        items = [(file, Row(i, prompt, {})) for i, file in enumerate(files)]
    else:
        items = []
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
                file, prompt = path.parent / (fields.get("file") or fields["path"]), fields.pop("prompt")
                items.append((file, Row(len(items), prompt, fields)))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{path}:{i}: expected {{\"file\": ..., \"prompt\": ...}} ({error!r})") from error
    missing = [file for file, _ in items if not file.exists()]
    if missing or not items:
        raise ValueError(f"{missing[0]}: no such image (named in {path})" if missing else f"{path}: no images")
    return items


def score(args: argparse.Namespace) -> dict[str, float]:
    """Writes one row an image into `args.out` (if given), prints a table; returns the means."""
    import jax
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from dancegrpo_jax import sharding
    from dancegrpo_jax.media import read_images
    from dancegrpo_jax.rewards import RewardSet

    try:
        config = json.loads(args.rewards)
    except ValueError as error:
        raise ValueError(f"--rewards={args.rewards}: not JSON ({error})") from error
    if not isinstance(config, dict) or not config:
        raise ValueError(f"--rewards={args.rewards}: expected {{name: {{options}}, ...}}")
    items = read_index(args.index, args.prompt)
    by_size = defaultdict(list)  # one compilation a size
    for i, (file, _) in enumerate(items):
        with Image.open(file) as image:
            by_size[image.size].append(i)
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh), tqdm(total=len(items), unit="image") as bar:
        rewards = RewardSet(config, mesh)
        found = {name: np.full(len(items), np.nan) for name in rewards.weights}
        for indices in by_size.values():
            for start in range(0, len(indices), args.batch):
                part = indices[start:start + args.batch]
                padded = part + part[-1:] * (args.batch - len(part))
                media = read_images([items[i][0] for i in padded])
                media = media._replace(pixels=sharding.shard_batch(media.pixels, mesh))
                scores = rewards(media, [items[i][1] for i in padded])
                for name, (values, ok) in scores.items():
                    values, ok = np.asarray(values)[:len(part), 0], np.asarray(ok)[:len(part), 0]
                    found[name][part] = np.where(ok, values, np.nan)
                bar.update(len(part))
    if args.out:
        with open(args.out, "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["file", "prompt", *found])
            writer.writerows([file, row.prompt, *(found[name][i] for name in found)] for i, (file, row) in enumerate(items))
    means = {}
    print(f"{'reward':24} {'mean':>10} {'stderr':>10} {'scored':>8}")
    for name, values in found.items():
        valid = values[np.isfinite(values)]
        means[name] = float(valid.mean()) if valid.size else float("nan")
        stderr = valid.std(ddof=1) / valid.size**0.5 if valid.size > 1 else float("nan")
        print(f"{name:24} {means[name]:10.5f} {stderr:10.5f} {valid.size:8}")
    return means


def main(argv: list[str]) -> int:
    from dancegrpo_jax.config import exit_status, program

    parser = argparse.ArgumentParser(prog=program(argv[0]), description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, help="index.jsonl, or a folder of images")
    parser.add_argument("--rewards", required=True, help="as config.rewards, JSON")
    parser.add_argument("--prompt", default="", help="of all images of a folder")
    parser.add_argument("--out", help="csv file to write")
    parser.add_argument("--batch", type=int, default=8, help="images at a time (default: 8)")
    args = parser.parse_args(argv[1:])
    if args.batch < 1:
        parser.error("--batch must be at least 1")
    return exit_status(score, args)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
