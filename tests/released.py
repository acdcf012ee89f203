"""Tiny random pipelines saved by diffusers, and their copies in the spellings of the released checkpoints."""

import json
import re
import shutil

import diffusers
import numpy as np
import torch
import transformers
from parity.against_torch import perturb
from safetensors.numpy import load_file, save_file

from dancegrpo_jax.worlds.tokenizer import write_tokenizer

WORDS = ["a", "an", "and", "the", "of", "red", "green", "blue", "yellow", "circle", "square", "triangle", "star", "two",
         "three", "four", "left", "right", "above", "below", "is"]
CLIP_LENGTH, T5_LENGTH, WIDTH = 16, 20, 24


def _clip(folder):
    """CLIP text encoder with a tokenizer whose words are the world's."""
    write_tokenizer(folder)
    vocabulary = len(json.loads((folder / "vocab.json").read_text()))
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH, eos_token_id=2, bos_token_id=vocabulary - 2, projection_dim=WIDTH)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_LENGTH)
    return tokenizer, _init(transformers.CLIPTextModel(config), attention=True)


def _t5():
    letters = [(letter, -6.0 - i / 10) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz,")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -5.0)]
    vocabulary += [("\u2581" + word, -2.0 - i / 10) for i, word in enumerate(WORDS)] + letters
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=T5_LENGTH)
    config = transformers.T5Config(vocab_size=len(vocabulary) + 3, d_model=WIDTH, d_kv=8, d_ff=40, num_layers=2, num_heads=2,
                                   relative_attention_num_buckets=8, relative_attention_max_distance=12,
                                   feed_forward_proj="gated-gelu")
    return tokenizer, _init(transformers.T5EncoderModel(config), attention=True)


def _vae(latent, quant, **config):
    return _init(diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        latent_channels=latent, norm_num_groups=4, layers_per_block=1, sample_size=32, use_quant_conv=quant,
        use_post_quant_conv=quant, **config))


def _init(module, attention=False):
    perturb(module)
    if attention:  # keeps the softmax of random weights from saturating
        with torch.no_grad():
            for name, p in module.named_parameters():
                if re.search(r"(SelfAttention\.q|q_proj)\.weight", name):
                    p.mul_(0.3)
    return module.eval()


def write_sd(folder):
    """A StableDiffusionPipeline; returns it. Its VAE halves the size once."""
    tokenizer, text = _clip(folder / "words")
    unet = _init(diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8))
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                        set_alpha_to_one=False, clip_sample=False)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=_vae(4, True, scaling_factor=0.18215), text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    shutil.rmtree(folder / "words")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_flux(folder, max_shard_size="15KB"):
    """A FluxPipeline with guidance and T5, transformer and T5 in several shards; returns it."""
    tokenizer, text = _clip(folder / "words")
    tokenizer_2, text_2 = _t5()
    transformer = _init(diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(4, 6, 6)))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = diffusers.FluxPipeline(
        scheduler=scheduler, vae=_vae(4, False, scaling_factor=0.3611, shift_factor=0.1159), text_encoder=text,
        tokenizer=tokenizer, text_encoder_2=text_2, tokenizer_2=tokenizer_2, transformer=transformer)
    pipeline.save_pretrained(folder)
    for name in ("transformer", "text_encoder_2"):
        shutil.rmtree(folder / name)
        pipeline.components[name].save_pretrained(folder / name, max_shard_size=max_shard_size)
        assert list((folder / name).glob("*-of-*.safetensors"))
    shutil.rmtree(folder / "words")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def respell(folder, new):
    """A copy of a pipeline folder with the keys and config entries of the files that were released years ago."""
    shutil.copytree(folder, new)
    text = new / "text_encoder" / "model.safetensors"
    tensors = {"text_model." + key: value for key, value in load_file(text).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": np.arange(CLIP_LENGTH)[None]}, text)
    if (new / "unet").exists():  # the legacy names of Stable Diffusion's VAE
        vae = new / "vae" / "diffusion_pytorch_model.safetensors"
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        save_file({re.sub(r"(mid_block\.attentions\.0)\.(to_[qkv]|to_out\.0)\b", lambda m: f"{m[1]}.{names[m[2]]}", key): value
                   for key, value in load_file(vae).items()}, vae)
        dropped = {"unet": ("class_embed_type", "dropout", "encoder_hid_dim"),
                   "vae": ("force_upcast", "mid_block_add_attention")}
    else:
        dropped = {"transformer": (), "vae": ("mid_block_add_attention",)}
    for part, keys in dropped.items():
        path = new / part / "config.json"
        config = {key: value for key, value in json.loads(path.read_text()).items() if key not in keys}
        if "guidance_embeds" in config:
            config["guidance_embeds"] = "true"
        path.write_text(json.dumps(config))
    return new
