"""FLUX.1-dev with the HPS-v2.1 reward, LoRA: DanceGRPO's 8-GPU preset.

    python launch/train.py --config=configs/flux_hps_lora.py --config.data.train=hpdv2_train.txt

As flux_hps.py, but rank-128 adapters on the attention projections are all that is trained and stored: the frozen weights
are 24 GB of bfloat16, split over the devices. `python launch/export.py --run=runs/flux_hps_lora --out=lora` writes
`pytorch_lora_weights.safetensors`.
"""

from configs import flux_hps


def get_config():
    config = flux_hps.get_config()
    config.run_dir = "runs/flux_hps_lora"
    config.model.lora.rank, config.model.lora.alpha = 128, 256.0
    config.model.lora.targets = (r".*attn\.to_(q|k|v|out\.0)",)  # single blocks have no to_out
    config.sampler.steps = 12
    config.data.prompts_per_step = 16  # 8 devices with 2 prompts each
    config.optim.updates_per_rollout = 2  # 96 samples an update
    config.optim.learning_rate = 3e-4
    return config
