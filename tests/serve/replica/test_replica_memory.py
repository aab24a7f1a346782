"""A replica's memory is known, and held against its device, before anything is loaded."""

import json
import re
from dataclasses import replace

import pytest
from tiny import save_tiny_bundle
from typer.testing import CliRunner

import tidar
from serve_apps.replica import replica_memory as module
from serve_apps.replica.replica_memory import free_bytes, replica_memory
from serve_apps.rollout.model_version import resolve_model
from serve_apps.settings import ServeSettings
from tidar_core.errors import ConfigError
from tidar_core.planning.decode_memory import memory_bound


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(save_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny"))


def memory_of(bundle, **settings):
    return replica_memory(resolve_model(ServeSettings(model=bundle, **settings))[0])


def test_one_line_holds_weights_cache_forwards_and_what_is_left(bundle):
    line = memory_of(bundle).line
    assert "\n" not in line
    assert re.search(r"weights 0\.[12] MiB", line)  # 0.2 where kernels in C hold them, with a second copy of the table
    for part in ("cache", "forwards", "in all", "left"):
        assert part in line


def test_a_gpu_that_this_machine_lacks_has_captured_steps_and_sampling_and_no_known_rest(bundle, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    memory = memory_of(bundle, num_gpus=1)
    assert "captured steps" in memory.line
    assert "sampling" in memory.line
    assert memory.facts()["left"] is None
    assert memory.fits


def test_what_does_not_fit_is_refused_in_one_line(bundle):
    memory = replace(memory_of(bundle), free=2**10)
    with pytest.raises(ConfigError, match=r"does not fit: .* too much; give fewer rows"):
        memory.require_fit()


def test_free_memory_is_no_more_than_the_control_group_allows(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\n")
    monkeypatch.setattr(module, "MEMINFO", meminfo)
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    assert free_bytes("cpu") == 5000 * 1024
    (tmp_path / "memory.current").write_text("1024\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes("cpu") == 5000 * 1024
    (tmp_path / "memory.max").write_text("4096\n")
    assert free_bytes("cpu") == 3072


def test_a_dry_run_prints_the_bound_and_starts_nothing(bundle, monkeypatch):
    monkeypatch.setattr("serve_apps.app.run", lambda settings: pytest.fail("it starts the service"))
    done = CliRunner().invoke(tidar.app, ["serve", bundle, "--dry-run", "--json"])
    assert done.exit_code == 0
    facts = json.loads(done.stdout)
    parts = ("weights", "cache", "tables", "captured_steps", "forwards", "sampling")
    assert facts["total"] == sum(facts[name] for name in parts)
    assert facts["left"] == facts["free"] - facts["total"]


def test_a_dry_run_of_what_does_not_fit_ends_with_2_and_one_line(bundle, monkeypatch, capsys):
    monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
    monkeypatch.setattr("sys.argv", ["tidar", "serve", bundle, "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        tidar.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_bound_is_computed_once_on_a_machine_and_again_for_other_settings_or_a_damaged_cache(
    bundle, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    computed = []

    def counted(*arguments, **settings):
        computed.append(settings)
        return memory_bound(*arguments, **settings)

    monkeypatch.setattr(module, "memory_bound", counted)
    first = memory_of(bundle).need
    assert memory_of(bundle).need == first
    assert len(computed) == 1
    assert memory_of(bundle, rows=2).need.cache < first.cache
    (damaged, other) = sorted((tmp_path / "tidar/memory").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for content in ("", "{}", damaged.read_text().replace(str(first.cache), '"much"')):
        damaged.write_text(content)
        assert memory_of(bundle).need == first
    assert len(computed) == 5
    assert memory_of(bundle, rows=2).need.cache == json.loads(other.read_text())["cache"]
    monkeypatch.setattr(module, "_code", lambda: "another version")
    assert memory_of(bundle).need == first
    assert len(computed) == 6
