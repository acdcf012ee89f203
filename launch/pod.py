"""Trains on TPU pods: prints or runs the commands of gcloud (TPU VMs, queued resources) and xpk (GKE).

    python launch/pod.py start   NAME --zone=Z [options] --config=configs/flux_hps.py [--config.KEY=VALUE ...]
    python launch/pod.py logs    NAME --zone=Z [--follow]
    python launch/pod.py stop    NAME --zone=Z
    python launch/pod.py queued  NAME --zone=Z --accelerator=v5p-32 --spot [options] --config=... [...]
    python launch/pod.py gke     NAME --zone=Z --accelerator=v5p-32 --cluster=C [options] --config=... [...]

`start` trains on a TPU VM that exists; `queued` asks for one, starts, watches, and after a preemption asks again and
resumes; `gke` submits to a cluster. Everything from the first --config on goes to launch/train.py. With --dry_run the
commands are printed, to be read or pasted, and nothing runs. docs/pods.md tells more.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import pod_steps as steps
from launch.pod_steps import ROOT, PodError, Step, TpuVm

INSTALL = {"gcloud": "install the Google Cloud CLI, https://cloud.google.com/sdk/docs/install",
           "xpk": "pip install xpk, https://github.com/AI-Hypercomputer/xpk"}
STOPPED = "143"  # of launch/train.py, after a signal


# ------------------------------------------------------------------------------------------ running steps


class CommandFailed(PodError):
    """A command that ended with an error, which may be gone at the next attempt."""


def run(step: Step, quiet: bool = False) -> str:
    """Runs one step; what it prints is shown, or with `quiet` returned.

    Raises: CommandFailed, or PodError if there is no such program.
    """
    program = step.argv[0]
    if shutil.which(program) is None:
        raise PodError(f"{program}: not found; {INSTALL.get(program, 'install it')} (or look with --dry_run)")
    if not quiet:
        print(f"# {step.note}", flush=True)
    done = subprocess.run(step.argv, capture_output=quiet, text=True)
    if done.returncode:
        said = (done.stderr or "").strip().splitlines()
        said = [line for line in said if line.startswith("ERROR")] or said[-1:]  # gcloud adds details to the error
        raise CommandFailed(": ".join([f"{step.note}: {' '.join(step.argv[:5])} ... ended with status {done.returncode}",
                                       *said[:1]]))
    return done.stdout or ""


def run_or_print(todo: list[Step], dry_run: bool) -> None:
    for step in todo:
        if dry_run:
            print(step)
        else:
            run(step)


# ------------------------------------------------------------------------------------------ queued resources


class Queue:
    """Keeps a queued resource training: asks for it, starts the run when it is ACTIVE, and after it was taken away asks
    again. The run resumes by itself, since its run_dir does not lie on the VM.

    Args: args: of the command line; todo: the steps that start the run.
    """

    PATIENCE = 5  # errors of gcloud in a row: more than a moment's trouble
    LINGER = 10  # looks at a stopped run until a preemption must have shown in the state of its TPU

    def __init__(self, args, vm: TpuVm, todo: list[Step]):
        self.args, self.vm, self.todo = args, vm, todo
        capacity = "spot" if args.spot else "reserved" if args.reserved else ""
        self.create = steps.create(vm, args.accelerator, args.runtime_version, capacity, args.extra)
        self.started = False
        self.errors = self.restarts = self.restarts_in_vain = self.lingered = 0
        self.said = ""

    def plan(self) -> list[Step]:
        """What `watch` runs, for reading."""
        again = steps.delete(self.vm)._replace(note="when it is SUSPENDED or FAILED; then all again")
        return [self.create, steps.describe(self.vm), *self.todo, steps.status(self.vm), again]

    def watch(self) -> None:
        """Returns when the run has finished. Raises: PodError if it failed, was stopped, or cannot be kept going."""
        while True:
            try:
                if self.look():
                    return
                self.errors = 0
            except CommandFailed as error:
                self.errors += 1
                if self.errors == self.PATIENCE:
                    raise PodError(f"{error}; {self.PATIENCE} errors in a row; {self.hint()}") from error
                self.say(f"{error}; trying again")
            self.wait(self.errors)

    def look(self) -> bool:
        """Looks once and does what is next; True when the run has finished."""
        state, reason = self.state()
        if state == "ACTIVE":
            return self.attend()
        self.say(state + reason)
        if state in ("SUSPENDED", "FAILED"):
            if self.restarts == self.args.max_restarts:
                raise PodError(f"{self.vm.name}: {state}{reason}; --max_restarts={self.restarts} is used up; {self.hint()}")
            self.restarts += 1
            run(steps.delete(self.vm))
            self.wait(self.restarts_in_vain)
            self.restarts_in_vain += 1
            self.say(f"asking again, {self.restarts} of {self.args.max_restarts}")
            run(self.create)
        elif state == "absent":
            run(self.create)
        return False  # WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING move by themselves

    def attend(self) -> bool:
        """What to do about a VM that is there; True when the run has finished."""
        answer = run(steps.status(self.vm), quiet=True).split()
        if answer == ["running"]:
            self.started, self.restarts_in_vain, self.lingered = True, 0, 0
            self.say("the run is going")
        elif not self.started or answer in (["absent"], ["ended"]):  # a new VM, or one that was rebooted
            self.say("ACTIVE")
            for step in self.todo:
                run(step)
            self.started = True
        elif answer == ["ended", "0"]:
            self.say("the run has finished")
            return True
        elif answer == ["ended", STOPPED]:  # by a preemption, whose state follows, or by hand
            self.lingered += 1
            if self.lingered == self.LINGER:
                raise PodError(f"{self.vm.name}: the run was stopped after a checkpoint; run this command again to resume it; "
                               + self.hint())
        else:
            raise PodError(f"{self.vm.name}: the run ended with status {answer[-1]}; look with python launch/pod.py logs "
                           f"{self.vm.name} --zone={self.vm.zone}, mend it and run this command again; {self.hint()}")
        return False

    def state(self) -> tuple[str, str]:
        """(state, ": reason" or "") of the queued resource; "absent" if there is none."""
        try:
            answer = json.loads(run(steps.describe(self.vm), quiet=True))["state"]
            reason = answer.get("failedData", {}).get("error", {}).get("message", "")
            return answer["state"], reason and f": {reason}"
        except CommandFailed as error:
            if "NOT_FOUND" in str(error):
                return "absent", ""
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CommandFailed(f"gcloud's answer cannot be read ({error!r})") from error

    def say(self, text: str) -> None:
        if text != self.said:
            print(f"{time.strftime('%H:%M:%S')} {self.vm.name}: {text}", flush=True)
        self.said = text

    def wait(self, times: int) -> None:
        time.sleep(min(self.args.poll * 2**times, max(self.args.poll, 1800)))

    def hint(self) -> str:
        return f"to give the TPU back: {shlex.join(steps.delete(self.vm).argv)}"


# ------------------------------------------------------------------------------------------ checks


def check_training(training: list[str], devices: int | None, lasting: bool) -> None:
    """Finds wrong settings before a pod is asked for.

    Args:
      training: arguments of launch/train.py.
      devices: of the pod, if known, over which the config must divide.
      lasting: run_dir must outlive the machine.
    Raises: ConfigError or PodError.
    """
    from dancegrpo_jax.config import load, validate

    with contextlib.chdir(ROOT):  # where the workers run it
        config = load(training)
    validate(config, devices)
    path = next(value for value in reversed(training) if value.startswith("--config=")).partition("=")[2]
    if Path(path).is_absolute() or not (ROOT / path).resolve().is_relative_to(ROOT):
        raise PodError(f"--config={path}: the workers only get the repository; name a file in it, relative to its root")
    if "://" in config.run_dir:
        bucket, _, rest = config.run_dir.partition("://")[2].partition("/")
        raise PodError(f"config.run_dir={config.run_dir!r}: must be a folder; mount the bucket (--bucket={bucket} for TPU VMs, "
                       f"--storage for GKE) and set --config.run_dir=/gcs/{bucket}/{rest}")
    if lasting and not Path(config.run_dir).is_absolute():
        raise PodError(f"config.run_dir={config.run_dir!r}: lies on a disk that goes with the machine; set an absolute path on "
                       "shared storage, such as --config.run_dir=/gcs/BUCKET/runs/NAME")


def check_secrets(names: list[str]) -> None:
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise PodError("--secret: give the name of an environment variable, never its value")
        if name not in os.environ:
            raise PodError(f"--secret={name}: no such environment variable here; export it first")


# ------------------------------------------------------------------------------------------ command line


def _matching(pattern: str, text: str):
    """A type for argparse: text that fits the pattern, described by `text`."""
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise argparse.ArgumentTypeError(f"{value!r} must be {text}")
        return value
    return check


NAME = _matching(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", "lower-case letters, digits and dashes, at most 40")
BUCKET = _matching(r"[a-z0-9][-_.a-z0-9]+", "the name of a bucket, without gs://")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, arguments of launch/train.py)."""
    from dancegrpo_jax.config import program

    first = next((i for i, value in enumerate(argv) if value.startswith("--config")), len(argv))
    parser = argparse.ArgumentParser(prog=program(argv[0]), description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="start | logs | stop | queued | gke")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument("name", type=NAME, help="of the workload" if name == "gke" else "of the TPU VM")
        added.add_argument("--zone", required=True, help="such as us-east5-a")
        added.add_argument("--project", default="", help="default: gcloud's own setting")
        added.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
        return added

    starting = command("start", "train on an existing TPU VM")
    reading = command("logs", "show or fetch the logs of a TPU VM")
    command("stop", "save a checkpoint and stop the run of a TPU VM")
    queueing = command("queued", "get a TPU by a queued resource, train, and again after each preemption")
    cluster = command("gke", "train on a GKE cluster, through xpk")

    reading.add_argument("--worker", default="0", help="number, or all (default: 0, which prints the progress)")
    reading.add_argument("--lines", type=int, default=100, help="from the end (default: 100)")
    reading.add_argument("--follow", action="store_true", help="go on as the log grows")
    reading.add_argument("--out", default="", help="existing folder: write the whole logs there as WORKER.log instead")
    for added in (starting, queueing, cluster):
        added.add_argument("--ref", default="", help="commit to train with; default: the working tree as it is")
        added.add_argument("--secret", action="append", default=[], metavar="NAME",
                           help="environment variable to pass on, such as HF_TOKEN; repeatable")
    for added in (starting, queueing):
        added.add_argument("--bucket", type=BUCKET, help="Cloud Storage bucket to mount at /gcs/BUCKET")
    for added in (queueing, cluster):
        added.add_argument("--accelerator", required=True, help="such as v4-64, v5litepod-64, v5p-128, v6e-256")
        added.add_argument("--max_restarts", type=int, default=10, help="after preemptions (default: 10)")
        added.add_argument("--extra", action="append", default=[], metavar="FLAG",
                           help="one more flag of the create command, as it is; repeatable")
    queueing.add_argument("--runtime_version", default="", help="software of the VMs (default: the accelerator's)")
    capacity = queueing.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="cheaper, and may be preempted")
    capacity.add_argument("--reserved", action="store_true", help="from the project's reservation")
    queueing.add_argument("--poll", type=float, default=60.0, help="seconds between two looks (default: 60)")
    queueing.add_argument("--delete", action="store_true", help="give the TPU back when the run has finished")
    cluster.add_argument("--cluster", required=True, help="name of the GKE cluster")
    cluster.add_argument("--num_slices", type=int, default=1, help="slices, joined by the data-center network (default: 1)")
    cluster.add_argument("--storage", action="append", default=[], help="xpk storage to mount, for run_dir; repeatable")
    cluster.add_argument("--grace", type=int, default=120, help="seconds between SIGTERM and the end (default: 120)")
    cluster.add_argument("--docker_image", default="", help="image that holds the repository, as its working folder, and its "
                         "requirements; default: one is built from --base_docker_image")
    cluster.add_argument("--base_docker_image", default="python:3.12", help="(default: python:3.12)")

    args = parser.parse_args(argv[1:first])
    training = argv[first:]
    if training and args.command in ("logs", "stop"):
        parser.error(f"{args.command} takes no --config")
    return args, training


def launch(args: argparse.Namespace, training: list[str]) -> None:
    vm = TpuVm(args.name, args.zone, args.project)
    if args.command == "logs":
        return run_or_print([steps.logs(vm, args.worker, args.lines, args.follow, args.out)], args.dry_run)
    if args.command == "stop":
        return run_or_print([steps.stop(vm)], args.dry_run)

    devices = None
    if args.command != "start":
        devices = steps.accelerator(args.accelerator).chips * getattr(args, "num_slices", 1)
    check_training(training, devices, lasting=args.command != "start")
    check_secrets(args.secret)
    folder = Path.home() / ".cache" / "dancegrpo_jax" / args.name
    if args.command == "gke":
        return run_or_print(steps.gke(args, folder, training), args.dry_run)
    todo = steps.start(vm, folder, training, args.ref, args.secret, args.bucket)
    if args.command == "start":
        return run_or_print(todo, args.dry_run)
    queue = Queue(args, vm, todo)
    if args.dry_run:
        return run_or_print(queue.plan(), True)
    try:
        queue.watch()
    except KeyboardInterrupt:
        raise PodError(f"no longer watching; the TPU and its run go on. Run this command again to go on watching; "
                       f"{queue.hint()}") from None
    if args.delete:
        run(steps.delete(vm))
    else:
        print(f"the TPU is kept; {queue.hint()}")


def main(argv: list[str]) -> int:
    from dancegrpo_jax.config import exit_status

    return exit_status(launch, *parse(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
