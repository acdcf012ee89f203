"""The commands that `launch/pod.py` prints or runs: gcloud for TPU VMs and queued resources, xpk for GKE.

Everything here is text; nothing is executed. A step is a command of this machine, and where it is `gcloud ... ssh`, its
last argument holds a shell script for the workers. Flags as in gcloud 528 and xpk 1.16.
"""

import difflib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "dancegrpo_jax"  # of the workers' files: the folder, and with a suffix what is sent
GCSFUSE = "3.11.1"


class Step(NamedTuple):
    """One command and what it is for."""

    note: str
    argv: list[str]

    def __str__(self) -> str:
        return f"# {self.note}\n{shlex.join(self.argv)}"


class PodError(ValueError):
    """What stops a launcher; one line with the remedy."""


# ------------------------------------------------------------------------------------------ accelerators


class Accelerator(NamedTuple):
    """A slice: `chips`, which are as many JAX devices, and the software version of its VMs."""

    chips: int
    runtime_version: str


_SMALL = (1, 4, 8, 16, 32, 64, 128, 256)
_CUBES = (8, 16, 32, 64)
# family: (TensorCores that the name counts per chip, sizes, runtime version: cloud.google.com/tpu/docs/runtimes)
FAMILIES = {
    "v4": (2, (*_CUBES, *range(128, 8193, 128)), "tpu-ubuntu2204-base"),
    "v5litepod": (1, _SMALL, "v2-alpha-tpuv5-lite"),
    "v5p": (2, (*_CUBES, *range(128, 12289, 128)), "v2-alpha-tpuv5"),
    "v6e": (1, _SMALL, "v2-alpha-tpuv6e"),
}


def accelerator(name: str) -> Accelerator:
    """The slice of a type such as "v5p-128". Raises: PodError for an unknown type, with the nearest known one."""
    family, _, size = name.partition("-")
    cores, sizes, version = FAMILIES.get(family, (1, (), ""))
    if size.isdecimal() and int(size) in sizes:
        return Accelerator(int(size) // cores, version)
    wanted = re.sub(r"^v5e\b|^v5lite\b", "v5litepod", name)
    known = [f"{family}-{size}" for family, (_, sizes, _) in FAMILIES.items() for size in sizes]
    near = difflib.get_close_matches(wanted, known, 1, cutoff=0)[0]
    raise PodError(f"--accelerator={name}: unknown type; did you mean {near}? (v4 and v5p count TensorCores, two a chip; "
                   "v5litepod and v6e chips)")


# ------------------------------------------------------------------------------------------ what is sent


def requirements() -> list[str]:
    """Arguments of pip: requirements.txt, and jax[tpu] of the version that it pins. Raises: PodError outside a checkout."""
    if not (ROOT / "requirements.txt").is_file():
        raise PodError(f"{ROOT}: not a checkout of the repository, which is what is sent; clone it and use its launch/pod.py")
    pinned = re.search(r"^jax(==.+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    return ["-r", "requirements.txt", f"jax[tpu]{pinned[1]}"]


def pack(folder: Path, ref: str) -> Step:
    """Packs the repository into `folder`: commit `ref`, or, if empty, the working tree with changed and new files."""
    archive, root = shlex.quote(str(folder / f"{SOURCE}.tar.gz")), shlex.quote(str(ROOT))
    if ref:
        command, note = f"git -C {root} archive --output={archive} {shlex.quote(ref)}", f"pack commit {ref}"
    else:
        command = (f"set -o pipefail; git -C {root} ls-files -z --cached --others --exclude-standard | "
                   f"tar -C {root} --null --files-from=- --ignore-failed-read -czf {archive}")
        note = "pack the working tree: what git tracks, and new files that it does not ignore"
    return Step(note, ["bash", "-c", f"mkdir -p -m 700 {shlex.quote(str(folder))}; {command}"])


# ------------------------------------------------------------------------------------------ TPU VMs


class TpuVm(NamedTuple):
    """A TPU VM, of one host or many."""

    name: str
    zone: str
    project: str

    def gcloud(self, *command: str, flags: Sequence[str] = ()) -> list[str]:
        """`gcloud compute tpus COMMAND --zone --project FLAGS`."""
        project = [f"--project={self.project}"] if self.project else []
        return ["gcloud", "compute", "tpus", *command, f"--zone={self.zone}", *project, "--quiet", *flags]

    def ssh(self, script: str, worker: str = "all", flags: Sequence[str] = ()) -> list[str]:
        return self.gcloud("tpu-vm", "ssh", self.name, flags=[f"--worker={worker}", *flags, f"--command={script}"])


def mount(bucket: str) -> str:
    """Script: mounts a bucket at /gcs/BUCKET.

    Hosts must see each other's files at once (no metadata cache), and orbax ends a save by renaming a folder.
    """
    point, package = f"/gcs/{bucket}", f"gcsfuse_{GCSFUSE}_amd64.deb"
    url = f"https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v{GCSFUSE}/{package}"
    return f"""\
command -v gcsfuse > /dev/null || {{ curl -LsSf -o /tmp/{package} {url} && sudo dpkg --install /tmp/{package}; }}
sudo mkdir -p {point} && sudo chown "$USER" {point}
mountpoint -q {point} || gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 \
--metadata-cache-negative-ttl-secs=0 --kernel-list-cache-ttl-secs=0 {bucket} {point}
"""


def start(vm: TpuVm, folder: Path, training: Sequence[str], ref: str = "", secrets: Sequence[str] = (),
          bucket: str | None = None) -> list[Step]:
    """Syncs the repository to all workers, installs it and starts `launch/train.py` on each, in the background.

    Args:
      folder: of this machine, for the files to send.
      training: arguments of launch/train.py.
      secrets: names of environment variables of this machine; their values travel in a file that only the user can read.
      bucket: to mount at /gcs/BUCKET.
    """
    archive, env = str(folder / f"{SOURCE}.tar.gz"), str(folder / f"{SOURCE}.env")
    send = Step("send to all workers", vm.gcloud(
        "tpu-vm", "scp", archive, *([env] if secrets else []), f"{vm.name}:", flags=["--worker=all"]))
    write = (f"umask 077; for name in {shlex.join(secrets)}; do "
             f'printf "export %s=%q\\n" "$name" "${{!name}}"; done > {shlex.quote(env)}')
    sent = [send] if not secrets else [
        Step(f"{', '.join(secrets)} into a file that nobody else can read", ["bash", "-c", write]), send,
        Step("which need not stay here", ["rm", env])]
    install = f"""\
set -e
mkdir -p ~/{SOURCE} && tar -xzf ~/{SOURCE}.tar.gz -C ~/{SOURCE} && cd ~/{SOURCE}
[ -x ~/.local/bin/uv ] || python3 -m pip install --quiet --user uv
[ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.12 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python {shlex.join(requirements())}
"""
    # The subshell outlives the connection and notes the exit status; the process id is that of Python, which takes SIGTERM.
    begin = f"""\
set -e
cd ~/{SOURCE}
! kill -0 "$(cat train.pid 2> /dev/null)" 2> /dev/null || {{ echo "a run is still going here; stop it first" >&2; exit 1; }}
rm -f train.exit{f"; . ~/{SOURCE}.env" if secrets else ""}
(trap "" HUP; .venv/bin/python launch/train.py {shlex.join(training)} & echo $! > train.pid
wait $! && code=0 || code=$?; echo $code > train.exit) > train.log 2>&1 < /dev/null &
"""
    return [pack(folder, ref), *sent,
            Step("install on all workers", vm.ssh(install + (mount(bucket) if bucket else ""))),
            Step("start on all workers", vm.ssh(begin))]


def logs(vm: TpuVm, worker: str, lines: int, follow: bool, out: str) -> Step:
    """Prints the end of the log, or writes whole logs to `out`/WORKER.log."""
    tail = "tail -n +1" if out else f"tail -n {lines}" + " -F" * follow
    flags = [f"--output-directory={out}"] if out else []
    return Step(f"log of worker {worker}", vm.ssh(f"{tail} ~/{SOURCE}/train.log", worker, flags))


def stop(vm: TpuVm) -> Step:
    """SIGTERM to all workers, which then save the same step; returns when they have ended."""
    script = f"""\
cd ~/{SOURCE} && pid=$(cat train.pid) && kill -TERM "$pid" || {{ echo "no run is going here" >&2; exit 1; }}
tail --pid="$pid" -f /dev/null
tail -n 3 train.log
"""
    return Step("stop all workers after a checkpoint, and wait for it", vm.ssh(script))


def status(vm: TpuVm) -> Step:
    """Prints `running`, `absent` (never started on this VM), or `ended` with the exit status, if it is known."""
    script = f"""\
cd ~/{SOURCE} 2> /dev/null && [ -f train.pid ] || {{ echo absent; exit 0; }}
if kill -0 "$(cat train.pid)" 2> /dev/null; then echo running; else echo ended $(cat train.exit 2> /dev/null); fi
"""
    return Step("is the run going on?", vm.ssh(script, "0"))


# ------------------------------------------------------------------------------------------ queued resources


def create(vm: TpuVm, kind: str, runtime_version: str, capacity: str = "", extra: Sequence[str] = ()) -> Step:
    """Asks for a TPU VM. Args: capacity: "spot", "reserved", or "" for on demand; extra: more flags, as they are."""
    return Step("ask for the TPU", vm.gcloud("queued-resources", "create", vm.name, flags=[
        f"--node-id={vm.name}", f"--accelerator-type={kind}",
        f"--runtime-version={runtime_version or accelerator(kind).runtime_version}",
        *([f"--{capacity}"] if capacity else []), *extra]))


def describe(vm: TpuVm) -> Step:
    return Step("its state", vm.gcloud("queued-resources", "describe", vm.name, flags=["--format=json(state)"]))


def delete(vm: TpuVm) -> Step:
    return Step("give the TPU back", vm.gcloud("queued-resources", "delete", vm.name, flags=["--force"]))


# ------------------------------------------------------------------------------------------ GKE


def gke(args, folder: Path, training: Sequence[str]) -> list[Step]:
    """Submits the run as a JobSet through xpk, on `args.num_slices` slices.

    xpk kills the shell that it runs the command in, hence `exec`: SIGTERM must reach Python. Secrets are named in an
    environment file; xpk takes their values from this machine's environment.
    Raises: PodError for an argument that xpk's manifest cannot hold.
    """
    if broken := [argument for argument in training if "\n" in argument]:
        raise PodError(f"{broken[0]!r}: xpk writes the command into YAML as one line; remove the line break")
    command = f"exec python launch/train.py {shlex.join(training)}"
    steps, image = [], [f"--docker-image={args.docker_image}"]
    if not args.docker_image:
        archive, source = shlex.quote(str(folder / f"{SOURCE}.tar.gz")), str(folder / SOURCE)
        unpack = f"rm -rf {shlex.quote(source)} && mkdir {shlex.quote(source)} && tar -xzf {archive} -C {shlex.quote(source)}"
        steps = [pack(folder, args.ref), Step("the files of the image", ["bash", "-c", unpack])]
        image = [f"--base-docker-image={args.base_docker_image}", f"--script-dir={source}"]
        command = f"python -m pip install --quiet {shlex.join(requirements())} && {command}"
    flags = [f"--zone={args.zone}"] + ([f"--project={args.project}"] if args.project else [])
    if args.secret:
        env = folder / f"{SOURCE}.env"
        quoted = shlex.quote(str(env))
        names = f'mkdir -p -m 700 {shlex.quote(str(folder))} && printf "%s\\n" {shlex.join(args.secret)} > {quoted}'
        steps.append(Step("names of environment variables", ["bash", "-c", names]))
        flags.append(f"--env-file={env}")
    return [*steps, Step("submit", [
        "xpk", "workload", "create", f"--cluster={args.cluster}", f"--workload={args.name}", f"--tpu-type={args.accelerator}",
        f"--num-slices={args.num_slices}", *image, *flags, *(f"--storage={name}" for name in args.storage),
        f"--max-restarts={args.max_restarts}", f"--termination-grace-period-seconds={args.grace}", *args.extra,
        f"--command={command}"])]
