"""What the tests share: fixtures, kernels that stop in mid-training, and the closing line that counts what ran."""
import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 1800     # seconds after which something hangs; on no machine does a result depend on it


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Of several processes, one runs all tests of a file, which share what is dear; lessons share nothing."
    from xdist.scheduler import LoadScopeScheduling
    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith("test_notebooks.py") else file
    return ByFile(config, log)


@pytest.fixture(scope="session")
def real_data():
    "The data root with real CIFAR-10H and SVHN; where it is absent, tests that need it are skipped, and counted so."
    root = ROOT / os.environ.get("SOFT_CIFAR_DATA", "data")
    if not all((root / f"{name}.npz").is_file() for name in ("cifar10h", "svhn")):
        pytest.skip(f"needs cifar10h.npz and svhn.npz in {root}: soft-cifar data, or set $SOFT_CIFAR_DATA")
    return root


def copy_of_the_project(folder):
    """Copies what notebooks and module need, tracked and new files, so that nothing touches the original. Returns their
    paths."""
    wanted = "settings.ini", "pyproject.toml", "nbs", "soft_cifar"
    words = ["git", "ls-files", "-co", "--exclude-standard", *wanted]
    files = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((ROOT / file).read_bytes())
    return files


def differences(one, two):
    "How far the predictions in two run folders are apart, by name; empty where the files are the same byte for byte."
    files = [folder / "predictions.npz" for folder in (one, two)]
    if files[0].read_bytes() == files[1].read_bytes(): return {}
    first, second = [np.load(file) for file in files]
    assert {*first} == {*second}, ({*first}, {*second})
    apart = {name: float(np.abs(first[name].astype(float) - second[name]).max()) for name in first}
    return {name: value for name, value in apart.items() if value} or "the same arrays in other bytes"


@contextmanager
def started(words, said, **environment):
    """The process of the command `words`, which writes to the file `said`. What is left of it and its children is
    killed."""
    def listen():     # a job in the background of a script inherits a deaf ear for Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with open(said, "w") as file:
        process = subprocess.Popen(
            words, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT, preexec_fn=listen)
    try: yield process
    finally:
        kill(family(process))
        process.wait()


def family(process):
    "`process` and all its children's children, as far as they live."
    try:
        head = psutil.Process(process.pid)
        return [head, *head.children(recursive=True)]
    except psutil.NoSuchProcess: return []


def kill(members):
    "SIGKILL for those of `members` that live."
    for member in members:
        with suppress(psutil.NoSuchProcess): member.kill()


def wait_for(condition, process, said):
    "What `condition()` returns once it is true. Raises `AssertionError` if `process` ends before, or patience does."
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if found := condition(): return found
        time.sleep(.02)
    ended = "still running" if process.poll() is None else f"exit status {process.poll()}"
    raise AssertionError(f"{ended}, and it never came: {said.read_text()[-3000:]}")


def watched(words, said):
    """(exit status, what it said, the most memory [bytes] that it and its children took together) of the command
    `words`, which writes to the file `said`. Until a child that has just been forked becomes a program, it shows its
    parent's command line and all its parent's memory, a second time: it isn't counted before."""
    peak = 0
    with started(words, said) as process:
        while process.poll() is None:
            now, lines = 0, {}
            for member in family(process):
                with suppress(psutil.NoSuchProcess):     # it may just have ended
                    lines[member.pid] = line = member.cmdline()
                    if line != lines.get(member.ppid()): now += member.memory_info().rss
            peak = max(peak, now)
            time.sleep(.1)
    return process.returncode, said.read_text(), peak


# A kernel executes this before its notebook. It then keeps every epoch, and the first run of a seed that is to be
# stopped waits after its second one, until somebody ends it.
STOP = """
import os, threading
from functools import partial
from pathlib import Path
from soft_cifar import training

def write_and_stop(path, state, write=training.write_checkpoint):
    write(path, state)
    place, seed = Path(get_ipython().ipython_dir), state["identity"]["seed"]
    if len(state["history"]) != 2: return
    try: (place / f"stop-{seed}").rename(place / f"stopped-{seed}-{os.getpid()}")
    except FileNotFoundError: return
    threading.Event().wait()

training.write_checkpoint = write_and_stop
training.fit = partial(training.fit, checkpoint_seconds=0)
"""


def stopping(place, *seeds):
    """The environment of kernels of which, for each of `seeds`, one stops after two epochs; `place`, a new folder, is
    IPython's own for them."""
    startup = place / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "stop.py").write_text(STOP)
    for seed in seeds: (place / f"stop-{seed}").touch()
    return dict(IPYTHONDIR=str(place))


def stopped(place, seed):
    "The kernel that has stopped after two epochs of a run with `seed`; None before."
    return next((psutil.Process(int(file.name.split("-")[2])) for file in place.glob(f"stopped-{seed}-*")), None)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("slowest")
    reports = [report for same in terminalreporter.stats.values() for report in same]
    calls = [report for report in reports if getattr(report, "when", "") == "call"]
    for report in sorted(calls, key=lambda report: -report.duration)[:8]:
        terminalreporter.write_line(f"{report.duration:6.1f} s  {report.nodeid}")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    if hasattr(config, "workerinput"): return     # one of several processes; the one that started them counts
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    counts = {kind: len(reporter.stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")}
    failed = counts["failed"] + counts["error"]
    print(f"\n{counts['passed']} passed, {failed} failed, {counts['skipped']} skipped")
