"""sd_hps.py on 4 v5p chips (`v5p-8`).

    python launch/train.py --config=configs/pods/sd_hps_v5p_4.py --config.data.train=hpdv2_train.txt

Fits, by launch/compile_check.py --topology=v5p:2x2x1; docs/compile_reports.md has its predictions.
"""

from configs import sd_hps


def get_config():
    config = sd_hps.get_config()
    config.mesh.data, config.mesh.fsdp = 4, 1
    return config
