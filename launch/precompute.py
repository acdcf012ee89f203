"""Encodes prompts once, so that training holds no text encoder: then `--config.data.embeddings=FOLDER`.

    python launch/precompute.py --config=configs/flux_hps.py --out=data/hpd_flux

takes model, lengths and all prompt files from a training config (overridden as for launch/train.py). Stopped, it
resumes with the next shard. A FLUX prompt takes 3.1 MB at T5's 512 tokens, and half with --config.model.text_length=256.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def precompute(argv: list[str], out: str, batch: int) -> Path:
    """Writes the embedding set of a config's prompts into `out`, `batch` prompts at a time.

    Args: argv: --config=path.py and its overrides.
    Raises: ConfigError, CheckpointError or ValueError for bad input, before anything is encoded.
    """
    import jax
    from tqdm import tqdm

    from dancegrpo_jax import embeddings, sharding
    from dancegrpo_jax.config import ConfigError, evaluators_of, load, validate
    from dancegrpo_jax.data import read_rows
    from dancegrpo_jax.rollout import encode
    from dancegrpo_jax.session import configured_pipeline, with_negatives

    config = load(argv)
    validate(config, jax.device_count())
    if not out:
        raise ConfigError("--out=FOLDER is missing")
    if batch < 1:
        raise ConfigError(f"--batch={batch}: must be at least 1 prompt")
    files = dict.fromkeys([config.data.train, *(evaluator.rows for evaluator in evaluators_of(config).values())])
    rows = [row for file in files for row in read_rows(file)]
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        pipeline = configured_pipeline(config)
        prompts = [row.prompt for row in rows] + pipeline.negatives(with_negatives(rows, pipeline))
        if cut := pipeline.truncated(prompts):
            print(f"{cut} of {len(prompts)} prompts are too long for the text encoder: their ends are cut", file=sys.stderr)
        frozen, key = pipeline.load_text(mesh), jax.random.key(0)

        def embed(prompts):
            tokens = sharding.shard_batch({"positive": pipeline.tokenize(prompts)}, mesh)
            return encode(pipeline, frozen, tokens, key).positive
        source = embeddings.fingerprint(pipeline)
        with tqdm(total=len(set(prompts) | {""}), unit="prompt") as bar:
            for done, _ in embeddings.write(out, prompts, embed, source, batch):
                bar.update(done - bar.n)
    manifest = Path(out) / "manifest.json"
    print(f"{manifest.parent}: {bar.n} prompts, {embeddings.read_json(manifest)['bytes'] / bar.n / 1e6:.3f} MB each")
    return manifest.parent


def main(argv: list[str]) -> int:
    from dancegrpo_jax.config import exit_status, program

    parser = argparse.ArgumentParser(prog=program(argv[0]), description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the embeddings are written")
    parser.add_argument("--batch", type=int, default=8, help="prompts encoded at a time")
    args, config = parser.parse_known_args(argv[1:])
    return exit_status(precompute, config, args.out, args.batch)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
