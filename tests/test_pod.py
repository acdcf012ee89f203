"""Pod launchers: what a dry run prints, what the workers' shells make of it, and the watch over a queued resource.

The gcloud on PATH is a small script: it plays back states from files, and runs the scripts that are meant for workers in a
local shell whose home is the folder `worker`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import pod, pod_steps

ROOT = Path(__file__).parents[1]
CONFIG = "--config=configs/shapes_flow.py"
AWKWARD = '--config.rewards={"it\'s \\"a\\"  b": {"reward": "verifier", "note": "$HOME `id` \\\\ * é; exit 3"}}'

GCLOUD = r"""#!/usr/bin/env bash
here=$(dirname "$0")
echo "$3 $4" >> "$here/calls"
pop() { head -n 1 "$here/$1"; [ "$(wc -l < "$here/$1")" = 1 ] || sed -i 1d "$here/$1"; }
case "$3 $4" in
  "queued-resources describe")
    state=$(pop states)
    case $state in
      absent) echo "ERROR: (gcloud.compute) NOT_FOUND: Resource was not found" >&2; echo "- '@type': details" >&2; exit 1;;
      broken) echo "ERROR: (gcloud.compute) UNAVAILABLE: try later" >&2; exit 1;;
      *) echo "{\"state\": {\"state\": \"$state\", \"failedData\": {\"error\": {\"message\": \"no quota\"}}}}";;
    esac;;
  "tpu-vm scp") for value in "$@"; do if [ -f "$value" ]; then cp -p "$value" "$here/worker"; fi; done;;
  "tpu-vm ssh")
    for value in "$@"; do case $value in --command=*) script=${value#--command=};; esac; done
    if [ ! -f "$here/runs" ]; then HOME=$here/worker exec bash -c "$script"
    elif [[ $script == *"echo absent"* ]]; then run=$(pop runs); echo "$run"; [ "$run" != unreachable ] || exit 255; fi;;
esac
"""

# Stands for uv: the "python" it installs notes its arguments and waits for SIGTERM.
UV = f"""#!/usr/bin/env bash
if [ "$1" = pip ]; then echo "$@" > ~/pip; exit; fi
mkdir -p .venv/bin
cat > .venv/bin/python <<'END'
#!{sys.executable} -SE
import json, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("checkpoint written"), sys.exit(143)))
print("started", flush=True)
json.dump({{"argv": sys.argv, "token": os.environ.get("A_TOKEN"), "pid": os.getpid()}}, open("seen.part", "w"))
os.rename("seen.part", "seen.json")
signal.pause()
END
chmod +x .venv/bin/python
"""


def executable(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The folder of the fake gcloud; the repository is a small one."""
    folder, repository = tmp_path / "cloud", tmp_path / "repository"
    executable(folder / "gcloud", GCLOUD)
    executable(folder / "worker" / ".local" / "bin" / "uv", UV)
    (repository / "launch").mkdir(parents=True)
    files = {"launch/train.py": "", "requirements.txt": "jax==1.2.3\njaxlib==1.2.3\n", ".gitignore": "ignored\n"}
    for name, text in files.items():
        (repository / name).write_text(text)
    git = ["git", "-C", str(repository), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run(git + command, check=True)
    monkeypatch.setattr(pod_steps, "ROOT", repository)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


def command(text: str, *training: str) -> int:
    return pod.main(["launch/pod.py", *shlex.split(text), *training])


def wait_for(file: Path) -> Path:
    deadline = time.time() + 20
    while not file.exists():
        assert time.time() < deadline, f"{file} did not appear"
        time.sleep(0.02)
    return file


# ------------------------------------------------------------------------------------------ printing


def test_dry_runs_print_what_the_documentation_shows(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PATH", "")  # nothing may run
    text = (ROOT / "docs" / "pods.md").read_text()
    examples = re.findall(r"```\n\$ python launch/pod.py ([^\n]*)\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 5
    for line, expected in examples:
        assert command(line) == 0, capsys.readouterr().err
        assert capsys.readouterr().out.replace(str(ROOT), "/home/me/dancegrpo_jax") == expected
        for step in [part for part in expected.split("# ") if part.startswith("gcloud")]:
            assert "--zone=us-east5-a" in shlex.split(step)


def test_secrets_are_named_and_never_printed(monkeypatch, capsys):
    monkeypatch.setenv("A_TOKEN", "hidden")
    shared = "--zone=z --secret=A_TOKEN --dry_run"
    assert command(f"start t {shared}", CONFIG) == 0
    assert command(f"gke t {shared} --cluster=c --accelerator=v6e-4", CONFIG, "--config.run_dir=/gcs/b/r") == 0
    out = capsys.readouterr().out
    assert "A_TOKEN" in out and "hidden" not in out


@pytest.mark.parametrize("line, training, named", [
    ("queued t --zone=z --accelerator=v5e-16", (CONFIG,), "did you mean v5litepod-16?"),
    ("queued t --zone=z --accelerator=v5p-100", (CONFIG,), "did you mean v5p-1"),
    ("gke t --zone=z --cluster=c --accelerator=h100-8", (CONFIG,), "--accelerator=h100-8: unknown type"),
    ("start t --zone=z", ("--config=configs/shape_flow.py",), "no such file; did you mean configs/shapes_flow.py?"),
    ("start t --zone=z", (), "--config=path.py is missing"),
    ("start t --zone=z", (str(CONFIG.replace("configs", str(ROOT / "configs"))),), "name a file in it, relative to its root"),
    ("start t --zone=z", (CONFIG, "--config.smapler.eta=1"), "did you mean config.sampler.eta"),
    ("start t --zone=z", (CONFIG, "--dry_run"), "--dry_run: unknown argument"),
    ("start t --zone=z", (CONFIG, "--config.run_dir=gs://b/runs/x"), "--config.run_dir=/gcs/b/runs/x"),
    ("queued t --zone=z --accelerator=v5p-8", (CONFIG,), "lies on a disk that goes with the machine"),
    ("gke t --zone=z --cluster=c --accelerator=v5p-8", (CONFIG,), "lies on a disk that goes with the machine"),
    ("queued t --zone=z --accelerator=v5p-8", (CONFIG, "--config.mesh.fsdp=3", "--config.run_dir=/r"), "4 devices"),
    ("gke t --zone=z --cluster=c --accelerator=v5p-8 --num_slices=2", (CONFIG, "--config.mesh.fsdp=3", "--config.run_dir=/r"),
     "8 devices"),
    ("start t --zone=z --secret=NO_SUCH", (CONFIG,), "--secret=NO_SUCH: no such environment variable"),
    ("start t --zone=z --secret=A=b", (CONFIG,), "never its value"),
    ("gke t --zone=z --cluster=c --accelerator=v6e-4", (CONFIG, "--config.run_dir=/a\nb"), "remove the line break"),
])
def test_errors_are_one_line_with_the_remedy(line, training, named, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")  # nothing may run
    assert command(line, *training) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error.replace("\\n", "")


def test_missing_programs_are_named(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert command("logs t --zone=z") == 2
    assert capsys.readouterr().err.startswith("error: gcloud: not found; install the Google Cloud CLI")
    with pytest.raises(pod.PodError, match="xpk: not found; pip install xpk"):
        pod.run(pod_steps.Step("submit", ["xpk"]))


def test_accelerators():
    assert pod_steps.accelerator("v4-64") == (32, "tpu-ubuntu2204-base")
    assert pod_steps.accelerator("v5litepod-16") == (16, "v2-alpha-tpuv5-lite")
    assert pod_steps.accelerator("v5p-128") == (64, "v2-alpha-tpuv5")
    assert pod_steps.accelerator("v6e-256") == (256, "v2-alpha-tpuv6e")


# ------------------------------------------------------------------------------------------ a TPU VM


def test_start_logs_status_and_stop_on_a_worker(cloud, monkeypatch, capfd):
    monkeypatch.setenv("A_TOKEN", "it's $secret\nof two lines")
    (pod_steps.ROOT / "my_rewards.py").write_text("new")
    (pod_steps.ROOT / "ignored").write_text("")
    start = "start t --zone=z --secret=A_TOKEN"
    assert command(start, CONFIG, AWKWARD) == 0, capfd.readouterr().err
    home = cloud / "worker" / "dancegrpo_jax"
    seen = json.loads(wait_for(home / "seen.json").read_text())
    try:
        assert seen["argv"][1:] == ["launch/train.py", CONFIG, AWKWARD]
        assert seen["token"] == "it's $secret\nof two lines"
        assert (home / "my_rewards.py").exists() and not (home / "ignored").exists()
        assert (cloud / "worker" / "pip").read_text().endswith("-r requirements.txt jax[tpu]==1.2.3\n")
        assert (cloud / "worker" / "dancegrpo_jax.env").stat().st_mode & 0o077 == 0
        assert not list(Path(os.environ["HOME"]).rglob("*.env")), "the secret stayed on this machine"

        vm = pod_steps.TpuVm("t", "z", "")
        assert pod.run(pod_steps.status(vm), quiet=True) == "running\n"
        assert int((home / "train.pid").read_text()) == seen["pid"]  # SIGTERM must reach Python, not a shell
        capfd.readouterr()
        assert command(start, CONFIG) == 2
        assert "still going here" in capfd.readouterr().err
        assert command("logs t --zone=z --lines=1") == 0
        assert capfd.readouterr().out.endswith("\nstarted\n")

        assert command("stop t --zone=z") == 0
        assert capfd.readouterr().out.endswith("\ncheckpoint written\n")
        assert wait_for(home / "train.exit").read_text() == "143\n"
        assert pod.run(pod_steps.status(vm), quiet=True) == "ended 143\n"
        assert command("stop t --zone=z") == 2
        assert "no run is going here" in capfd.readouterr().err
    finally:
        if not (home / "train.exit").exists():
            os.kill(seen["pid"], 9)


def test_a_commit_is_sent_without_later_changes(cloud):
    (pod_steps.ROOT / "later.py").write_text("")
    folder = cloud / "a folder"
    for ref, expected in (("HEAD", set()), ("", {"later.py"})):
        pod.run(pod_steps.pack(folder, ref))
        listed = subprocess.run(["tar", "-tzf", folder / "dancegrpo_jax.tar.gz"], capture_output=True, text=True, check=True)
        names = {name for name in listed.stdout.split() if not name.endswith("/")}
        assert names == {"launch/train.py", "requirements.txt", ".gitignore"} | expected
    with pytest.raises(pod.PodError):
        pod.run(pod_steps.pack(folder, "no_such_commit"))


def test_gke_command_survives_xpk(cloud, tmp_path, capsys):
    line = "gke t --zone=z --cluster=c --accelerator=v6e-4 --extra=--spot --dry_run"
    assert command(line, CONFIG, AWKWARD, "--config.run_dir=/r") == 0
    submit = shlex.split(capsys.readouterr().out, comments=True)
    submit = submit[submit.index("xpk"):]
    assert submit[:4] == ["xpk", "workload", "create", "--cluster=c"] and "--spot" in submit
    text = next(value for value in submit if value.startswith("--command=")).removeprefix("--command=")
    executable(tmp_path / "bin" / "python", '#!/usr/bin/env bash\n[ "$1" = -m ] || printf "%s\\n" $$ "$@"\n')
    done = subprocess.run(["bash", "-c", f"({text}) & echo $!; wait $!"], capture_output=True, text=True,  # as xpk's manifest
                          env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}, check=True)
    shell, python, *arguments = done.stdout.splitlines()
    assert arguments == ["launch/train.py", CONFIG, AWKWARD, "--config.run_dir=/r"]
    assert shell == python  # xpk sends SIGTERM to that process


# ------------------------------------------------------------------------------------------ queued resources


QUEUED = "queued t --zone=z --accelerator=v5p-8 --poll=0.001 --max_restarts=2"


def watch(cloud, states: str, runs: str, *options: str) -> tuple[int, list[str]]:
    """(exit status, what was changed) with these answers of gcloud about the TPU and about the run."""
    (cloud / "states").write_text(states.replace(" ", "\n") + "\n")
    (cloud / "runs").write_text(runs.replace(" ", "\n").replace("_", " ") + "\n")
    code = pod.main(["launch/pod.py", *QUEUED.split(), *options, CONFIG, "--config.run_dir=/gcs/b/r"])
    names = {"queued-resources create": "create", "queued-resources delete": "delete", "tpu-vm scp": "start"}
    return code, [names[call] for call in (cloud / "calls").read_text().splitlines() if call in names]


@pytest.mark.parametrize("states, runs, changes", [
    # asked for, waited, started, finished
    ("absent WAITING_FOR_RESOURCES PROVISIONING ACTIVE", "absent running ended_0", "create start"),
    # was there and going: only watched
    ("ACTIVE", "running running ended_0", ""),
    # was there, and had been stopped: started again
    ("ACTIVE", "ended_143 running ended_0", "start"),
    # preempted twice, once while still installing; the stopped run is not taken for a finished one
    ("absent ACTIVE ACTIVE ACTIVE SUSPENDING SUSPENDED PROVISIONING ACTIVE SUSPENDED CREATING ACTIVE",
     "absent running ended_143 absent absent running ended_0", "create start delete create start delete create start"),
    # its workers answer no more, and then it is seen to be preempted
    ("ACTIVE ACTIVE ACTIVE SUSPENDED ACTIVE", "running unreachable unreachable absent running ended_0", "delete create start"),
    # rebooted: its process is gone without an exit status
    ("ACTIVE", "running ended running ended_0", "start"),
    # gcloud out of order for a moment, four times in a row
    ("absent broken broken broken broken ACTIVE broken ACTIVE", "absent ended_0", "create start"),
])
def test_watch_to_the_end(cloud, states, runs, changes, capfd):
    assert watch(cloud, states, runs) == (0, changes.split()), capfd.readouterr()
    assert "the TPU is kept; to give the TPU back: gcloud compute tpus queued-resources delete t" in capfd.readouterr().out


@pytest.mark.parametrize("states, runs, changes, named", [
    ("absent FAILED FAILED FAILED", "absent", "create delete create delete create",
     "FAILED: no quota; --max_restarts=2 is used up"),
    ("ACTIVE", "absent running ended_2", "start",
     "the run ended with status 2; look with python launch/pod.py logs t --zone=z"),
    ("ACTIVE", "running ended_143", "", "the run was stopped after a checkpoint; run this command again"),
    ("broken", "absent", "", "UNAVAILABLE: try later; 5 errors in a row"),
    ("nonsense\"", "absent", "", "gcloud's answer cannot be read"),
])
def test_watch_gives_up(cloud, states, runs, changes, named, capfd):
    assert watch(cloud, states, runs) == (2, changes.split())
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and named in error
    assert "queued-resources delete t --zone=z --quiet --force" in error


def test_finished_run_gives_the_tpu_back_if_asked(cloud):
    assert watch(cloud, "ACTIVE", "running ended_0", "--delete") == (0, ["delete"])


def test_waits_double_up_to_half_an_hour(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    args, _ = pod.parse(["pod", *QUEUED.replace("0.001", "60").split(), CONFIG])
    queue = pod.Queue(args, pod_steps.TpuVm("t", "z", ""), [])
    for times in (0, 1, 4, 9):
        queue.wait(times)
    assert slept == [60, 120, 960, 1800]
