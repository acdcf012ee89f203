"""CLIP checkpoints in open_clip's naming: HPS, LAION, DFN5B (architectures, and keys as transformers names them)."""

import re
from collections.abc import Mapping

import numpy as np

from dancegrpo_jax.models.encoders.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

_H_TEXT = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, eos_token_id=2)
_H_VISION = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14)
_L_TEXT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2)
_L_VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
# OpenAI's and DFN's weights were trained with quick_gelu, LAION's (and HPS, made of them) with gelu.
ARCHITECTURES = {
    "ViT-H-14": CLIPConfig(CLIPTextConfig(**_H_TEXT, hidden_act="gelu"), CLIPVisionConfig(**_H_VISION, hidden_act="gelu"),
                           1024),
    "ViT-H-14-378-quickgelu": CLIPConfig(CLIPTextConfig(**_H_TEXT), CLIPVisionConfig(**_H_VISION, image_size=378), 1024),
    "ViT-L-14-quickgelu": CLIPConfig(CLIPTextConfig(**_L_TEXT), CLIPVisionConfig(**_L_VISION), 768),
}
_RENAME = (
    (r"^text\.(?!_)", ""),  # of open_clip's CustomTextCLIP
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def is_open_clip(keys) -> bool:
    """Whether these are open_clip's names (and not transformers')."""
    return any(key.startswith("visual.") for key in keys)


def to_transformers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """open_clip's tensors under transformers' CLIPModel keys, as views: `in_proj` becomes q, k and v, projections transpose."""
    renamed = {}
    for key, value in tensors.items():
        if key.endswith("attn_mask"):
            continue
        for pattern, replacement in _RENAME:
            key = re.sub(pattern, replacement, key)
        if ".self_attn.in_proj_" in key:
            for name, part in zip("qkv", np.split(value, 3), strict=True):
                renamed[key.replace("in_proj_", f"{name}_proj.")] = part
        elif key in ("visual.proj", "text_projection"):
            renamed["visual_projection.weight" if key == "visual.proj" else "text_projection.weight"] = value.T
        else:
            renamed[key] = value
    return renamed
