"""flux_hps_lora.py on 4 v5p chips (`v5p-8`).

    python launch/train.py --config=configs/pods/flux_hps_lora_v5p_4.py --config.data.train=hpdv2_train.txt

Predicted by launch/compile_check.py for v5p:2x2x1, not measured: 40 of 103 GB a chip, 203 s an iteration (MFU 49 %), 16.9 hours and 68 chip-hours
for the 300 iterations (docs/compile_reports.md).
"""

from configs import flux_hps_lora


def get_config():
    config = flux_hps_lora.get_config()
    config.mesh.data, config.mesh.fsdp = 1, 4
    return config
