"""Tiny random pipelines in the diffusers layout, written by our own converter."""

import json
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dancegrpo_jax.models.codecs import autoencoder_kl as vae
from dancegrpo_jax.models.denoisers import flux, unet
from dancegrpo_jax.models.encoders import clip
from dancegrpo_jax.models.files.convert import save_model
from dancegrpo_jax.models.layers import split
from dancegrpo_jax.pipelines.base import make_pipeline
from dancegrpo_jax.worlds.tokenizer import MAX_LENGTH, write_tokenizer

WIDTH = 32
VAE = vae.AutoencoderKL.Config(
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 16),
    latent_channels=4, norm_num_groups=4, scaling_factor=0.7, shift_factor=0.1)
FLUX = flux.FluxTransformer2DModel.Config(
    in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
    pooled_projection_dim=WIDTH, guidance_embeds=False, axes_dims_rope=(4, 6, 6))
UNET = unet.UNet2DConditionModel.Config(
    sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    norm_num_groups=8)
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
             "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False, "prediction_type": "epsilon"}


def random_params(model_class, config, seed: int = 0) -> dict:
    """Random fp32 parameters {name: array}, distributed as the initialisers draw them.

    They would compile a draw for every leaf, which takes up to a minute.
    """
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        if name.endswith("kernel"):
            positions = math.prod(shape[:2]) if len(shape) == 4 else 1  # of a convolution; stacked layers have three axes
            limit = math.sqrt(6 / positions / (shape[-2] + shape[-1]))
            return rng.uniform(-limit, limit, shape)
        if name.endswith("embedding"):
            return 0.02 * rng.standard_normal(shape)
        return np.full(shape, float(name.endswith("scale")))
    abstract = split(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))[1]
    return {name: draw(name, leaf.shape).astype(np.float32) for name, leaf in abstract.items()}


def write_pipeline(folder, paradigm: str, seed: int = 0):
    """Writes a `flow` (FLUX) or `diffusion` (Stable Diffusion) pipeline with random fp32 weights; returns the folder."""
    write_tokenizer(folder / "tokenizer")
    vocabulary = len(json.loads((folder / "tokenizer" / "vocab.json").read_text()))
    text = clip.CLIPTextConfig(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1, num_attention_heads=2,
                               vocab_size=vocabulary, max_position_embeddings=MAX_LENGTH, eos_token_id=vocabulary - 1)
    denoiser = ((flux.FluxTransformer2DModel, FLUX, "transformer") if paradigm == "flow"
                else (unet.UNet2DConditionModel, UNET, "unet"))
    for model_class, config, part in ((vae.AutoencoderKL, VAE, "vae"), (clip.CLIPTextModel, text, "text_encoder"), denoiser):
        save_model(folder / part, model_class, config, random_params(model_class, config, seed), dtype=jnp.float32)
    name = "FluxPipeline" if paradigm == "flow" else "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder


def load_pipeline(folder, *, lora_rank: int = 0, **options):
    """A tiny pipeline with its parameters: (pipeline, trainable, frozen)."""
    lora = {"rank": lora_rank, "alpha": 8.0, "targets": (r".*attn.*\.to_(q|k|v|out\.0)",)} if lora_rank else None
    pipeline = make_pipeline(folder, **{"height": 32, "width": 32, "lora": lora} | options)
    return pipeline, *pipeline.load()
