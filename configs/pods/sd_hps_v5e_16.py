"""sd_hps.py on 16 v5e chips (`v5litepod-16`).

    python launch/train.py --config=configs/pods/sd_hps_v5e_16.py --config.data.train=hpdv2_train.txt

Predicted by launch/compile_check.py for v5e:4x4, not measured: 9 of 17 GB a chip, 182 s an iteration (MFU 29 %), 15.2 hours and 243 chip-hours
for the 300 iterations (docs/compile_reports.md).
"""

from configs import sd_hps


def get_config():
    config = sd_hps.get_config()
    config.mesh.data, config.mesh.fsdp = 1, 16
    return config
