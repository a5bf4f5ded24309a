"""Fixtures, and the closing line that counts what really ran."""
import os
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data():
    "The data root with real CIFAR-10H and SVHN; tests that need it are skipped, and counted as skipped, where it is absent."
    root = ROOT / os.environ.get("SOFT_CIFAR_DATA", "data")
    if not all((root / f"{name}.npz").is_file() for name in ("cifar10h", "svhn")):
        pytest.skip(f"needs cifar10h.npz and svhn.npz in {root}: soft-cifar data, or set $SOFT_CIFAR_DATA")
    return root


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("slowest")
    for report in sorted((r for rs in terminalreporter.stats.values() for r in rs if getattr(r, "when", "") == "call"), key=lambda r: -r.duration)[:8]:
        terminalreporter.write_line(f"{report.duration:6.1f} s  {report.nodeid}")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    count = lambda *kinds: sum(len(reporter.stats.get(kind, [])) for kind in kinds)
    print(f"\n{count('passed')} passed, {count('failed', 'error')} failed, {count('skipped')} skipped")
