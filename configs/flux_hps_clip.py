"""FLUX.1-dev with two rewards, HPS-v2.1 and CLIP: each is normalised within its group, then the advantages are summed.

    python launch/train.py --config=configs/flux_hps_clip.py --config.data.train=hpdv2_train.txt

As flux_hps.py, with DanceGRPO's weights 0.7 : 1.4. HPS alone tends to glossy pictures; CLIP keeps them to the prompt.
"""

from configs import flux_hps


def get_config():
    config = flux_hps.get_config()
    config.run_dir = "runs/flux_hps_clip"
    config.rewards = {
        "hps": {"weight": 0.7, "dtype": "bfloat16"},
        "clip": {"reward": "clip_score", "weight": 1.4, "model": "apple/DFN5B-CLIP-ViT-H-14-378", "resize": "squash",
                 "architecture": "ViT-H-14-378-quickgelu", "clean": "open_clip", "dtype": "bfloat16"}}
    return config
