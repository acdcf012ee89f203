"""Peak host memory of loading a FLUX transformer: `python benchmarks/load_memory.py [--depth=0.5] [--devices=8]`.

Writes random bfloat16 weights in the released layout (depth 1 is the full 23.8 GB) into a temporary folder, streams them
onto the devices, and reports the peak of the process's anonymous memory. On CPU the arrays themselves are host memory
(so 1.0 is the least possible); on accelerators only what exceeds 1.0 remains.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def anonymous() -> int:
    """Bytes of memory that belong to this process alone; mapped files do not count."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def write(folder: Path, config: dict) -> None:
    """Random weights in shards of 4 GB."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from dancegrpo_jax.models.denoisers import flux
    from dancegrpo_jax.models.files import convert
    from dancegrpo_jax.models.layers import split

    (folder / "config.json").write_text(json.dumps(config))
    _, abstract = split(convert.abstract_model(flux.FluxTransformer2DModel, folder))
    shard, size, where, rng = {}, 0, {}, np.random.default_rng(0)
    noise = rng.integers(0, 1 << 15, 1 << 24, dtype=np.uint16).view(ml_dtypes.bfloat16)  # any bits will do

    def flush():
        nonlocal shard, size
        name = f"diffusion_pytorch_model-{len(set(where.values())):05d}.safetensors"
        save_file(shard, folder / name)
        where.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    for name, leaf in abstract.items():
        inner = leaf.shape[1:] if "stacked" in name.split(".") else leaf.shape
        for key in convert.torch_names(name, leaf.shape):
            shape = inner[::-1] if name.endswith("kernel") else inner
            shard[key] = np.resize(noise, shape)
            size += shard[key].nbytes
            if size > 4e9:
                flush()
    flush()
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=float, default=0.5)
    parser.add_argument("--devices", type=int, default=8, help="simulated devices, the fsdp axis")
    parser.add_argument("--folder", help="where to put the temporary file")
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    import jax
    import jax.numpy as jnp

    from dancegrpo_jax import sharding
    from dancegrpo_jax.models.denoisers import flux
    from dancegrpo_jax.models.files import convert
    from dancegrpo_jax.models.layers import split

    config = {"guidance_embeds": True, "num_layers": round(19 * args.depth), "num_single_layers": round(38 * args.depth)}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if (pid := os.fork()) == 0:  # so that writing leaves no trace in this process
            write(Path(folder), config)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        _, abstract = split(convert.abstract_model(flux.FluxTransformer2DModel, folder))
        mesh = sharding.make_mesh(data=1, fsdp=-1)
        shardings = sharding.param_shardings(abstract, mesh, flux.FluxTransformer2DModel.SHARDING)
        abstract = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=shardings[name])
                    for name, leaf in abstract.items()}
        before, peak, done = anonymous(), 0, threading.Event()

        def watch():
            nonlocal peak
            while not done.is_set():
                peak = max(peak, anonymous())
                time.sleep(0.01)
        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        params = convert.load_params(flux.FluxTransformer2DModel, folder, abstract)
        jax.block_until_ready(params)
        seconds = time.perf_counter() - start
        done.set(), watcher.join()
    peak, after = peak - before, anonymous() - before
    print(f"{size / 1e9:.2f} GB of bfloat16 in {seconds:.1f} s; peak {peak / 1e9:.2f} GB = {peak / size:.3f} of its size; "
          f"afterwards {after / size:.3f}")


if __name__ == "__main__":
    main()
