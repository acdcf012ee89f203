"""Rewards on CLIP's two towers: CLIP score, HPS-v2, PickScore, LAION aesthetic. One module, sharded like any other.

| name | formula | preprocessing | text |
|---|---|---|---|
| `clip_score` | cosine (Hessel et al., arXiv:2104.08718, no factor) | shorter side to size, centre crop | as transformers |
| `hps` | cosine (Wu et al., arXiv:2306.09341) | longer side to size, padded with zeros | as open_clip |
| `pickscore` | exp(logit_scale) cosine (Kirstain et al., arXiv:2305.01569) | crop | as transformers |
| `aesthetic` | affine function of the normalised image features (LAION's improved predictor) | crop | none |

Each reads a transformers folder, an open_clip checkpoint (`.pt` without torch, `.safetensors`), or the same from the hub.
"""

import html
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from dancegrpo_jax.data import PACKAGE
from dancegrpo_jax.models.encoders.clip import IMAGE_MEAN, IMAGE_STD, CLIPModel, cosine
from dancegrpo_jax.models.encoders.open_clip import ARCHITECTURES, is_open_clip, to_transformers
from dancegrpo_jax.models.files.convert import CheckpointError, Folder, abstract_model, from_torch, stored_in
from dancegrpo_jax.models.files.hub import find_in_hub
from dancegrpo_jax.models.files.torch_file import read_torch
from dancegrpo_jax.models.layers import merge, split
from dancegrpo_jax.rewards.base import DeviceReward

RESIZE = ("crop", "pad", "squash")
CLEAN = ("transformers", "open_clip")
OPENAI = "openai/clip-vit-large-patch14"
KNOWN = {"yuvalkirstain/PickScore_v1": "ViT-H-14", OPENAI: "ViT-L-14-quickgelu"}  # architectures of models on the hub


def preprocess(images, size: int, resize: str = "crop", antialias: bool = True):
    """Images [B, H, W, 3] in [0, 1] -> [B, size, size, 3] normalised for CLIP, in fp32; bicubic, as PIL on floats.

    resize: "crop": shorter side to `size`, centre cut out, clipped to [0, 1] (OpenAI, transformers, open_clip);
      "pad": longer side to `size`, zeros around, not clipped (HPS-v2); "squash": both sides to `size` (DFN5B).
    antialias: False is what HPS-v2 saw with torchvision before 0.17.
    """
    height, width = images.shape[1:3]
    if (height, width) != (size, size):
        if resize == "squash":
            height = width = size
        elif resize == "crop":
            shorter = min(height, width)
            height, width = height * size // shorter, width * size // shorter
        else:
            longer = max(height, width)
            height, width = round(height * size / longer), round(width * size / longer)
        shape = (images.shape[0], height, width, 3)
        images = jax.image.resize(images, shape, "cubic", antialias=antialias, precision=jax.lax.Precision.HIGHEST)
        if resize == "pad":
            top, left = (size - height) // 2, (size - width) // 2
            images = jnp.pad(images, ((0, 0), (top, size - height - top), (left, size - width - left), (0, 0)))
        else:
            top, left = (height - size) // 2, (width - size) // 2
            images = jnp.clip(images[:, top:top + size, left:left + size], 0, 1)  # bicubic overshoots at edges
    return (images - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)


def clean_text(prompt: str) -> str:
    """open_clip's cleaning of a prompt: mojibake and curly quotes repaired, HTML entities resolved, one space, lower case."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()).strip().lower()


def load_clip(path: Path, architecture: str | None):
    """(abstract CLIPModel, its tensors under transformers' keys) of a folder or of a checkpoint file.

    Raises: CheckpointError naming the file, and the architectures to choose from if a file needs one.
    """
    if path.is_dir() and (path / "config.json").exists() and any(path.glob("model*.safetensors*")):
        return abstract_model(CLIPModel, path), Folder(path)
    if path.is_dir():
        files = [path / name for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
                                          "open_clip_pytorch_model.bin") if (path / name).exists()]
        if not files:
            raise CheckpointError(f"{path}: neither a transformers CLIPModel nor an open_clip checkpoint is here")
        path = files[0]
    if path.suffix == ".safetensors":
        file = safe_open(path, framework="numpy")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    else:
        tensors = read_torch(path)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{path}: a file without config.json needs the option architecture, one of "
                              f"{', '.join(ARCHITECTURES)}")
    model = nnx.eval_shape(lambda: CLIPModel(ARCHITECTURES[architecture], rngs=nnx.Rngs(0)))
    return model, to_transformers(tensors) if is_open_clip(tensors) else tensors


class ClipScore(DeviceReward):
    """Cosine in [-1, 1] of CLIP's image and text features; each prompt is encoded once for its group.

    Args:
      model: a CLIPModel folder of transformers, an open_clip checkpoint, or a hub id "owner/name[/file]".
      tokenizer: folder or hub id; default: `model` if that is a folder with a tokenizer, else OpenAI's.
      architecture: of a checkpoint file, a key of `open_clip.ARCHITECTURES`.
      resize, antialias: `preprocess`.
      clean: "transformers", or "open_clip" for scorers that were trained there (`clean_text`).
      dtype: compute type of the towers, "float32" or "bfloat16"; norms, projections and the cosine are fp32 always.
    Raises: CheckpointError if there is no such model or tokenizer; ValueError for a wrong option.
    """

    sharding = CLIPModel.SHARDING

    def __init__(self, model: str | os.PathLike, tokenizer: str | os.PathLike | None = None, architecture: str | None = None,
                 resize: str = "crop", antialias: bool = True, clean: str = "transformers", dtype: str = "float32"):
        for option, value, known in (("dtype", dtype, ("float32", "bfloat16")), ("resize", resize, RESIZE),
                                     ("clean", clean, CLEAN)):
            if value not in known:
                raise ValueError(f"reward {self.name!r}: {option} is {value!r}, expected one of {', '.join(map(repr, known))}")
        self.dtype, self.resize, self.antialias, self.clean = jnp.dtype(dtype), resize, antialias, clean
        self.load(model, tokenizer, architecture)

    def load(self, model, tokenizer, architecture):
        """Sets what the files hold: `config`, `graphdef`, `params`, `tokenizer`."""
        path = find(model)
        abstract, tensors = load_clip(path, architecture)
        self.params = from_torch(tensors, self.layout(abstract), source=path, ignore=CLIPModel.IGNORED_KEYS)
        self.tokenizer = self.load_tokenizer(path, tokenizer)

    def layout(self, abstract: CLIPModel) -> dict:
        """Takes over an abstract model: its parameters as they are stored here, without shardings."""
        self.config = abstract.config
        self.graphdef, leaves = split(abstract)
        return stored_in(self.dtype, leaves, within=("text_model.", "vision_model."))  # projections stay fp32

    def load_tokenizer(self, path: Path, tokenizer):
        from transformers import CLIPTokenizer  # slow to import, and only needed here

        if tokenizer is None:
            here = path if path.is_dir() else path.parent
            tokenizer = here if any((here / name).exists() for name in ("vocab.json", "tokenizer.json")) else OPENAI
        return CLIPTokenizer.from_pretrained(find(tokenizer), local_files_only=True)

    @classmethod
    def abstract(cls, options, mesh):
        """Of an architecture that the options or `KNOWN` name, or of a folder with at least its config.json.

        Raises: CheckpointError if there is neither.
        """
        def load(self, model, tokenizer, architecture):
            architecture = architecture or KNOWN.get(str(model))
            self.params = self.layout(nnx.eval_shape(lambda: CLIPModel(ARCHITECTURES[architecture], rngs=nnx.Rngs(0)))
                                      if architecture in ARCHITECTURES else abstract_model(CLIPModel, model))
            self.tokenizer = lambda prompts, max_length, **_: {"input_ids": np.zeros((len(prompts), max_length), np.int32)}
        return type(cls.__name__, (cls,), {"load": load})(**options)

    def signature(self):
        return type(self), self.graphdef, self.resize, self.antialias, self.dtype

    def prepare(self, rows):
        prompts = [clean_text(row.prompt) if self.clean == "open_clip" else row.prompt for row in rows]
        length = self.config.text_config.max_position_embeddings
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, split_special_tokens=True)
        return np.array(ids["input_ids"], np.int32)

    def features(self, model, images):
        """Projected image features fp32 [P, G, E]."""
        pixels = preprocess(images.reshape(-1, *images.shape[2:]), self.config.vision_config.image_size, self.resize,
                            self.antialias)
        return model.image_features(pixels, self.dtype).reshape(*images.shape[:2], -1)

    def apply(self, params, images, text):
        model = merge(self.graphdef, params)
        return cosine(self.features(model, images), model.text_features(text, self.dtype)[:, None])


class HPS(ClipScore):
    """Human Preference Score v2.1 (or v2.0, by another `model`): about 0.15 to 0.36, comparable within one prompt only."""

    def __init__(self, model: str | os.PathLike = "xswu/HPSv2/HPS_v2.1_compressed.pt",
                 tokenizer: str | os.PathLike | None = None, architecture: str | None = "ViT-H-14", antialias: bool = True,
                 dtype: str = "float32"):
        super().__init__(model, tokenizer, architecture, "pad", antialias, "open_clip", dtype)


class PickScore(ClipScore):
    """PickScore v1: about 17 to 25. Others divide it by 26; here its weight does, and within a group it makes no difference."""

    def __init__(self, model: str | os.PathLike = "yuvalkirstain/PickScore_v1",
                 tokenizer: str | os.PathLike | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", dtype: str = "float32"):
        super().__init__(model, tokenizer, dtype=dtype)

    def apply(self, params, images, text):
        return jnp.exp(params["logit_scale"]) * super().apply(params, images, text)


def fold_head(layers: dict[str, np.ndarray], features: int, path: Path) -> dict[str, jax.Array]:
    """{"head.weight": [features], "head.bias": []} of five Linear layers with nothing between them, which are one affine map.

    Raises: CheckpointError if these are other layers or take another number of features.
    """
    names = [f"layers.{i}" for i in (0, 2, 4, 6, 7)]  # between them are dropouts
    if layers.keys() != {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")}:
        raise CheckpointError(f"{path}: not a five-layer head; it has keys {', '.join(sorted(layers)[:3])}, ...")
    weight, bias = np.eye(layers["layers.0.weight"].shape[1]), np.zeros(layers["layers.0.weight"].shape[1])
    for name in names:
        matrix = layers[f"{name}.weight"].astype(np.float64)
        weight, bias = matrix @ weight, matrix @ bias + layers[f"{name}.bias"]
    if weight.shape != (1, features):
        raise CheckpointError(f"{path}: a head from {weight.shape[1]} features to {len(weight)}, expected from {features} to 1")
    return {"head.weight": jnp.asarray(weight[0], jnp.float32), "head.bias": jnp.asarray(bias[0], jnp.float32)}


class Aesthetic(ClipScore):
    """LAION's improved aesthetic predictor: about 4.5 to 7, whatever the prompt.

    Args:
      head: `sac+logos+ava1-l14-linearMSE.pth`; its five layers have nothing between them, so they are one affine map.
      model: OpenAI's ViT-L/14.
    """

    def __init__(self, head: str | os.PathLike, model: str | os.PathLike = OPENAI, dtype: str = "float32"):
        self.head = head
        super().__init__(model, dtype=dtype)

    def load(self, model, tokenizer, architecture):
        super().load(model, tokenizer, architecture)
        self.params |= fold_head(read_torch(find(self.head)), self.config.projection_dim, find(self.head))

    def load_tokenizer(self, path, tokenizer):
        return None

    @classmethod
    def abstract(cls, options, mesh):
        reward = super().abstract(options, mesh)
        reward.params |= abstract_head(reward.config.projection_dim)
        return reward

    def prepare(self, rows):
        return ()

    def apply(self, params, images, text):
        params, head = split_head(params)
        x = self.features(merge(self.graphdef, params), images)
        return head(x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True)))


def abstract_head(features: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `fold_head` gives."""
    return {"head.weight": jax.ShapeDtypeStruct((features,), jnp.float32), "head.bias": jax.ShapeDtypeStruct((), jnp.float32)}


def split_head(params: dict) -> tuple[dict, Callable]:
    """(the parameters without the head of `fold_head`, the head as a function [..., features] -> [...])."""
    weight, bias = params["head.weight"], params["head.bias"]
    return ({name: leaf for name, leaf in params.items() if not name.startswith("head.")},
            lambda x: (x * weight).sum(-1) + bias)


find = partial(find_in_hub, root=PACKAGE.parent)
