"""flux_hps_lora.py on 8 v6e chips (`v6e-8`).

    python launch/train.py --config=configs/pods/flux_hps_lora_v6e_8.py --config.data.train=hpdv2_train.txt

Fits, by launch/compile_check.py --topology=v6e:2x4; docs/compile_reports.md has its predictions.
"""

from configs import flux_hps_lora


def get_config():
    config = flux_hps_lora.get_config()
    config.mesh.data, config.mesh.fsdp = 1, 8
    return config
