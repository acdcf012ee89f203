"""flux_hps_lora.py on 16 v5e chips (`v5litepod-16`).

    python launch/train.py --config=configs/pods/flux_hps_lora_v5e_16.py --config.data.train=hpdv2_train.txt

Fits, by launch/compile_check.py --topology=v5e:4x4; docs/compile_reports.md has its predictions.
"""

from configs import flux_hps_lora


def get_config():
    config = flux_hps_lora.get_config()
    config.mesh.data, config.mesh.fsdp = 1, 16
    return config
