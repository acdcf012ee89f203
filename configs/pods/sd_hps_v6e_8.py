"""sd_hps.py on 8 v6e chips (`v6e-8`).

    python launch/train.py --config=configs/pods/sd_hps_v6e_8.py --config.data.train=hpdv2_train.txt

Fits, by launch/compile_check.py --topology=v6e:2x4; docs/compile_reports.md has its predictions.
"""

from configs import sd_hps


def get_config():
    config = sd_hps.get_config()
    config.mesh.data, config.mesh.fsdp = 1, 8
    return config
