"""Pretrains the embedded world's models from scratch: `python launch/pretrain.py` (a few hours on two cores).

Makes the folders of dancegrpo_jax/worlds/weights: a small CLIP, and two pipelines in the diffusers layout that share
its text encoder and one small autoencoder, `flow` (FLUX transformer) and `diffusion` (Stable Diffusion UNet). The base
models first learn to obey true captions, then see noisy ones for --noisy_steps steps (each attribute word is wrong with
probability --caption_noise, as captions of the web are): able but misaligned, which is what GRPO needs.

Stages run in order and each is skipped if its folder exists; delete a folder to make it again. `--steps` scales nothing
else: the learning-rate schedule ends where the steps do. The same seed gives the same weights on the same machine.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import CLIPTokenizer

from dancegrpo_jax.config import program
from dancegrpo_jax.models.codecs import autoencoder_kl as vae
from dancegrpo_jax.models.denoisers import flux, unet
from dancegrpo_jax.models.encoders import clip
from dancegrpo_jax.models.files.convert import load_model, save_model
from dancegrpo_jax.models.layers import merge, split
from dancegrpo_jax.sde import ddim_schedule
from dancegrpo_jax.worlds import shapes, verifier
from dancegrpo_jax.worlds.tokenizer import write_tokenizer

LEVELS = (16, 32, 64)
VAE = vae.AutoencoderKL.Config(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                 block_out_channels=LEVELS, layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=32)
FLUX = flux.FluxTransformer2DModel.Config(in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=32,
                   num_attention_heads=4, joint_attention_dim=128, pooled_projection_dim=128, guidance_embeds=False,
                   axes_dims_rope=(8, 12, 12))
UNET = unet.UNet2DConditionModel.Config(sample_size=8, block_out_channels=(48, 96), layers_per_block=1, cross_attention_dim=128,
                   down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                   attention_head_dim=4, norm_num_groups=16)
DDPM = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "prediction_type": "epsilon"}
CAPTIONS = [shapes.caption(spec) for spec in shapes.all_specs()]


def clip_config(vocab_size: int) -> clip.CLIPConfig:
    """The embedded CLIP: two small towers, text length 12, images 32x32 in patches of 8."""
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    return clip.CLIPConfig(
        clip.CLIPTextConfig(num_hidden_layers=2, vocab_size=vocab_size, max_position_embeddings=12,
                            eos_token_id=vocab_size - 1, **tower),
        clip.CLIPVisionConfig(num_hidden_layers=4, image_size=32, patch_size=8, **tower), projection_dim=64)


class Log:
    """Prints a line and keeps it in a file beside the weights."""

    def __init__(self, path: Path):
        self.path, self.start = path, time.time()

    def __call__(self, text: str):
        line = f"[{time.time() - self.start:7.0f} s] {text}"
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def fit(loss_fn, params, batches, steps: int, learning_rate: float, log, save, every=500, ema=0.999):
    """Minimises `loss_fn(params, batch, key) -> (loss, metrics)` by AdamW with warm-up and cosine decay.

    The exponential moving average of the weights is returned, and goes to `save(params)` now and then and at the end;
    if that returns True training is done.
    """
    if not steps:
        return params
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, min(200, steps // 10 + 1), steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-4))

    @jax.jit
    def step(params, average, state, batch, i):
        key = jax.random.fold_in(jax.random.key(1), i)
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(ema, (1 + i) / (10 + i))
        return params, jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params), state, metrics

    average, state, window, start = params, tx.init(params), [], time.time()
    for i in range(steps):
        params, average, state, metrics = step(params, average, state, next(batches), i)
        window.append(metrics)
        if (i + 1) % every == 0 or i + 1 == steps:
            mean = {k: float(np.mean([m[k] for m in window])) for k in window[0]}
            left = (time.time() - start) / (i + 1) * (steps - i - 1) / 60
            log(f"  step {i + 1}/{steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in mean.items()) + f"  {left:.0f} min left")
            window = []
            if save(average):
                log("  good enough, stopped")
                break
    return average


def train_clip(out: Path, steps: int, seed: int, log):
    """Contrastive (InfoNCE) training on clean captions."""
    write_tokenizer(out)
    tokenizer = CLIPTokenizer.from_pretrained(out)
    config = clip_config(len(tokenizer))
    graphdef, params = split(clip.CLIPModel(config, rngs=nnx.Rngs(seed)))
    rng, all_ids = np.random.default_rng(seed), tokenize(tokenizer, CAPTIONS)
    mean, std = np.float32(clip.IMAGE_MEAN), np.float32(clip.IMAGE_STD)

    def batches():
        while True:
            images, index = shapes.pretraining_batch(rng, 128)
            yield (images / np.float32(255) - mean) / std, all_ids[index]

    def loss_fn(params, batch, key):
        images, ids = batch
        model = merge(graphdef, params)
        a, b = model.image_features(images), model.text_features(ids)
        a, b = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
        logits = a @ b.T * jnp.exp(jnp.minimum(model.logit_scale[...], np.log(100.0)))
        same = (ids[:, None] == ids[None]).all(-1)  # a caption that occurs twice is no negative of itself
        logits = jnp.where(same & ~jnp.eye(len(ids), dtype=bool), -1e9, logits)
        labels = jnp.arange(len(ids))
        loss = (optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
                + optax.softmax_cross_entropy_with_integer_labels(logits.T, labels).mean()) / 2
        return loss, {"loss": loss, "top1": (logits.argmax(1) == labels).mean()}

    def save(params):
        save_model(out, clip.CLIPModel, config, params)
    fit(loss_fn, params, batches(), steps, 1e-3, log, save)


def train_vae(out: Path, steps: int, seed: int, log):
    """Pixel reconstruction with a small KL, until the verifier accepts 98 % of the reconstructions.

    The latents' mean and scale are measured and stored.
    """
    graphdef, params = split(vae.AutoencoderKL(VAE, rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(seed + 1)

    def batches():
        while True:
            yield shapes.pretraining_batch(rng, 32)[0] / np.float32(127.5) - 1

    def loss_fn(params, images, key):
        model = merge(graphdef, params)
        mean, logvar = model.encode(images)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = model.decode(latents) - images
        l1, l2 = jnp.abs(error).mean(), jnp.square(error).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
        return l1 + l2 + 1e-3 * kl, {"l1": l1, "mse": l2, "kl": kl}

    test_images, index = shapes.pretraining_batch(np.random.default_rng(seed + 4), 512)
    encode = jax.jit(lambda p, x: merge(graphdef, p).encode(x)[0])
    decode = jax.jit(lambda p, z: jnp.clip(merge(graphdef, p).decode(z) / 2 + 0.5, 0, 1))

    def save(params):
        latents = encode(params, test_images / np.float32(127.5) - 1)
        config = dataclasses.replace(VAE, scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
        save_model(out, vae.AutoencoderKL, config, params)
        strict, _ = verifier.score_batch(np.asarray(decode(params, latents)), [CAPTIONS[i] for i in index])
        log(f"  verifier accepts {strict.mean():.3f} of the reconstructions")
        return strict.mean() >= 0.98
    fit(loss_fn, params, batches(), steps, 2e-3, log, save)


def tokenize(tokenizer, captions):
    """Captions to int32 ids [B, L], padded to the tokenizer's length."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                     return_tensors="np")["input_ids"].astype(np.int32)


def latent_data(root: Path, count: int, seed: int, log):
    """`count` scenes as (unit-scale latents [N, 8, 8, 4], index of the spec [N]), encoded once."""
    cache = root / "latents.npz"
    if cache.exists():
        data = np.load(cache)
        return data["latents"], data["index"]
    graphdef, params = split(load_model(vae.AutoencoderKL, root / "vae"))
    encode = jax.jit(lambda p, x: merge(graphdef, p).normalize_latents(merge(graphdef, p).encode(x)[0]))
    rng = np.random.default_rng(seed + 2)
    latents, index = [], []
    for _ in range(count // 500):
        images, specs = shapes.pretraining_batch(rng, 500)
        latents.append(np.asarray(encode(params, images / np.float32(127.5) - 1)))
        index.append(specs)
    latents, index = np.concatenate(latents), np.concatenate(index)
    log(f"encoded {len(index)} scenes: latents mean {latents.mean():.3f} std {latents.std():.3f}")
    np.savez(cache, latents=latents, index=index)
    return latents, index


def train_base(paradigm: str, out: Path, root: Path, args, log):
    """Flow matching (FLUX) or denoising (UNet) in the latent space, conditioned on the CLIP text tower."""
    latents, index = latent_data(root, args.scenes, args.seed, log)
    clip_model = load_model(clip.CLIPModel, root / "clip")
    text_graph, text = split(clip_model.text_model)
    config, model_class, name = ((FLUX, flux.FluxTransformer2DModel, "transformer") if paradigm == "flow"
                                 else (UNET, unet.UNet2DConditionModel, "unet"))
    exists = (out / name / "config.json").exists()
    graphdef, params = split(load_model(model_class, out / name) if exists
                             else model_class(config, rngs=nnx.Rngs(args.seed)))
    ids = tokenize(CLIPTokenizer.from_pretrained(root / "clip"), CAPTIONS)
    hidden, pooled = (np.asarray(x) for x in jax.jit(lambda p, i: merge(text_graph, p)(i))(text, ids))
    specs, number = shapes.all_specs(), {text: i for i, text in enumerate(CAPTIONS)}
    rng = np.random.default_rng(args.seed + 3)
    schedule = ddim_schedule(1000, steps_offset=0)
    noise_levels = jnp.asarray(schedule.sigmas[:-1][::-1])  # sigma of training timestep 0..999

    def batches(noise):
        while True:
            rows = rng.integers(len(latents), size=64)
            texts = [number[shapes.caption(shapes.corrupt(specs[i], rng, noise))] for i in index[rows]]
            yield latents[rows], hidden[texts], pooled[texts]

    def loss_fn(params, batch, key):
        x0, hidden, pooled = batch
        key_t, key_eps = jax.random.split(key)
        model, eps = merge(graphdef, params), jax.random.normal(key_eps, x0.shape)
        if paradigm == "flow":
            sigma = jax.nn.sigmoid(jax.random.normal(key_t, x0.shape[:1]) + 0.5)  # logit-normal, towards the noise
            column = sigma[:, None, None, None]
            tokens = flux.pack((1 - column) * x0 + column * eps)
            output = flux.unpack(model(tokens, hidden, pooled, 1000 * sigma, (4, 4), remat="none"), (4, 4))
            loss = jnp.square(output - (eps - x0)).mean()
        else:
            t = jax.random.randint(key_t, x0.shape[:1], 0, 1000)
            sigma = noise_levels[t][:, None, None, None]
            output = model(jnp.sqrt(1 - sigma**2) * x0 + sigma * eps, t, hidden, remat="none")
            loss = jnp.square(output - eps).mean()
        return loss, {"loss": loss}

    def save(params):
        write_pipeline(out, root, paradigm)
        save_model(out / name, model_class, config, params)
    steps = {"flow": 8000, "diffusion": 8000}[paradigm] if args.steps is None else args.steps
    params = fit(loss_fn, params, batches(0.0), steps, 1e-3, log, save)
    fit(loss_fn, params, batches(args.caption_noise), args.noisy_steps, 3e-4, log, save)


def write_pipeline(out: Path, root: Path, paradigm: str):
    """Lays the shared parts (vae, text_encoder, tokenizer) and the scheduler of a diffusers pipeline into `out`."""
    shutil.copytree(root / "vae", out / "vae", dirs_exist_ok=True)
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    for file in (root / "clip").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, out / "tokenizer")
    model = load_model(clip.CLIPModel, root / "clip")
    save_model(out / "text_encoder", clip.CLIPTextModel, model.config.text_config, split(model.text_model)[1])
    parts = {"vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "CLIPTokenizer"]}
    if paradigm == "flow":
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
        index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    else:
        scheduler = {"_class_name": "DDIMScheduler"} | DDPM
        index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    index |= parts | {"scheduler": ["diffusers", scheduler["_class_name"]]}
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(prog=program(sys.argv[0]), description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = Path(shapes.__file__).parent / "weights"
    parser.add_argument("--out", type=Path, default=weights, help="folder of the weights (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", default=["clip", "vae", "flow", "diffusion"],
                        choices=["clip", "vae", "flow", "diffusion"], help="what to make, in this order")
    parser.add_argument("--steps", type=int, help="training steps (defaults: clip 2000, vae 2500, flow and diffusion "
                        "8000 with true captions)")
    parser.add_argument("--scenes", type=int, default=120_000, help="scenes of the base models' training set")
    parser.add_argument("--noisy_steps", type=int, default=300, help="steps with noisy captions, last (default: %(default)s)")
    parser.add_argument("--caption_noise", type=float, default=0.15, help="probability that an attribute word is wrong "
                        "there (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="train the base models' existing weights further, with a "
                        "fresh optimizer, instead of skipping the stage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        out, log = args.out / stage, Log(args.out / f"{stage}.log")
        if (out / "config.json").exists() or ((out / "model_index.json").exists() and not args.resume):
            log(f"{out} exists, skipped")
            continue
        steps = "default" if args.steps is None else args.steps
        log(f"{stage}: seed {args.seed}, steps {steps}, jax {jax.__version__}, {os.cpu_count()} cores")
        if stage == "clip":
            train_clip(out, args.steps or 2000, args.seed, log)
        elif stage == "vae":
            train_vae(out, args.steps or 2500, args.seed, log)
        else:
            train_base(stage, out, args.out, args, log)


if __name__ == "__main__":
    main()
