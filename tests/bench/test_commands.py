import json
import signal
import sys
from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch

from nbengine import SamplingParams
from nbengine.bench import busy, switches
from nbengine.bench.measure import Settings, opened
from nbengine.bench.online import Arrivals, percentiles
from nbengine.config import EngineConfig
from nbengine.ops import Ops

CPU = torch.device("cpu")


def test_a_third_of_mixed_is_particular_and_read_as_it_comes(measure):
    [row] = measure("mixed", "--repeats", "2")
    assert row["requests"] == 100
    assert len(row["runs_tok_s"]) == 2
    assert row["tok_s"] == pytest.approx(max(row["runs_tok_s"]), rel=1e-3)
    assert row["of_plain"] == pytest.approx(row["tok_s"] / row["plain_tok_s"], rel=1e-3)


def test_every_option_that_turns_something_off_is_tried_alone_and_all_together(measure):
    rows = measure("switches", "--workloads", "single")
    known = {field.name for field in fields(EngineConfig)} & set(switches.OFF)
    assert [row["switch"] for row in rows] == [
        "all on",
        *[f"{name}={value}" for name, value in switches.OFF.items() if name in known],
        "all off",
        "all on, again",
    ]
    assert "enable_prefix_caching" in known
    assert all(row["all_on_is_faster_by"] == pytest.approx(rows[0]["tok_s"] / row["tok_s"], rel=1e-2) for row in rows)


def test_a_kernel_is_exchanged_for_its_reference_where_it_is_in_use(monkeypatch, tmp_path):
    class Kernels:
        def in_use(self):
            return {"linear": "triton", "sample": "reference"}

    monkeypatch.setattr(switches.Ops, "default", lambda device: Kernels())
    found = switches.switches(Settings(CPU, tmp_path))
    assert found["linear by its reference"] == {"ops": {"linear": "reference"}}
    assert "sample by its reference" not in found
    assert found["all off"]["ops"] == {"linear": "reference"}
    assert "linear by its reference" not in switches.switches(Settings(CPU, tmp_path), [])


def test_determinism_is_a_row_of_its_own_where_there_is_any_and_never_among_what_is_off(monkeypatch, tmp_path):
    monkeypatch.setattr(switches.Ops, "default", lambda device: Ops(torch.device("cpu")))
    on_a_gpu, on_a_cpu = (switches.switches(Settings(torch.device(kind), tmp_path)) for kind in ("cuda", "cpu"))
    assert on_a_gpu.pop("deterministic=True, a cost") == {"deterministic": True}
    assert on_a_gpu == on_a_cpu
    assert not any("deterministic" in options for options in on_a_cpu.values())


def test_what_determinism_costs_is_how_much_faster_the_usual_engine_is(measure, monkeypatch):
    given = []

    @contextmanager
    def opening(model, settings, **options):
        given.append(options)
        with opened(model, settings, **{name: value for name, value in options.items() if name != "deterministic"}) as found:
            yield found

    monkeypatch.setattr(switches, "opened", opening)
    monkeypatch.setattr(switches, "switches", lambda settings, ops: {"overlap=False": {}, "deterministic=True, a cost": switches.COSTS})
    usual, deterministic, _ = measure("switches", "--workloads", "single", "--only", "determ")
    assert given == [{}, {"deterministic": True}, {}]
    assert deterministic["all_on_is_faster_by"] == pytest.approx(usual["tok_s"] / deterministic["tok_s"], rel=1e-2)


def test_a_switch_that_cannot_be_turned_off_is_said_and_the_others_go_on(measure, monkeypatch):
    monkeypatch.setattr(switches, "OFF", {"block_size": 0})
    rows = measure("switches", "--workloads", "single")
    assert [("error" in row, row["switch"]) for row in rows] == [
        (False, "all on"), (True, "block_size=0"), (True, "all off"), (False, "all on, again"),
    ]  # fmt: skip


def test_latency_is_measured_under_arrivals_and_beside_a_long_prompt(measure):
    first, second, *long = measure("online")
    assert [first["time"], second["time"]] == ["first", "second"]
    for arriving in (first, second):
        assert arriving["rate_per_s"] > 0
        assert arriving["first_token_p50_ms"] <= arriving["first_token_p99_ms"]
    assert [row["chunked"] for row in long] == [True, False]
    for row in long:
        assert 0 < row["between_p50_ms"] <= row["between_p99_ms"]
        assert row["long_tokens"] == 500
        assert row["before_p50_ms"] > 0


def test_every_token_of_a_request_is_timed(tmp_path):
    with opened("tiny", Settings(CPU, tmp_path)) as (llm, _):
        llm.engine.pause()
        request = llm.engine.submit([5] * 8, SamplingParams(max_tokens=20, ignore_eos=True))
        watched = Arrivals(request)
        llm.engine.resume()
        request.result()
    assert len(watched.times) == 20
    assert watched.times[0] == pytest.approx(request.metrics.first_token_time, abs=0.05)
    assert sum(watched.gaps()) == pytest.approx(request.metrics.decode_time, abs=0.05)
    assert watched.gaps(end=watched.times[4]) == watched.gaps()[:4]


def test_percentiles_are_in_milliseconds():
    assert percentiles([0.001] * 99 + [1.0]) == (1.0, pytest.approx(1.0, abs=15))
    assert percentiles([]) == (None, None)


@pytest.fixture
def short_turns():
    """Threads that take turns often, without which a busy thread slows the engine many times over."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("short_turns")
def test_a_busy_main_thread_is_compared_with_an_idle_one(measure):
    [row] = measure("busy", "--workloads", "single")
    assert row["busy_tok_s"] > 0
    assert row["lost"] == pytest.approx(1 - row["busy_tok_s"] / row["idle_tok_s"], abs=0.01)
    assert row["allowed"] == 0.25
    assert row["main_thread_turns_s"] > 0
    assert row["switch_interval_restored"] is True


def test_a_switch_interval_that_is_left_changed_is_found(monkeypatch):
    monkeypatch.setattr(busy, "RESTORED", 0.05)
    usual = sys.getswitchinterval()
    try:
        sys.setswitchinterval(usual / 10)
        assert not busy.restored(usual)
    finally:
        sys.setswitchinterval(usual)
    assert busy.restored(usual)


def test_three_cells_are_run_in_a_real_kernel(measure):
    pytest.importorskip("ipykernel")
    rows = measure("kernel")
    assert [row["workload"] for row in rows] == ["single", "fifty", "sharegpt"]
    for row in rows:
        assert row["of_script"] == pytest.approx(row["kernel_tok_s"] / row["script_tok_s"], rel=1e-3)
        assert row["kernel_engine_tok_s"] > row["kernel_tok_s"] > 0


def test_a_cell_that_fails_in_the_kernel_ends_the_measurement():
    pytest.importorskip("ipykernel")
    from nbengine.bench.kernel import run, started, value

    with started() as client:
        run(client, "x = 6 * 7")
        assert value(client, "x") == 42
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            run(client, "1 / 0")


def test_starting_is_timed_in_processes_of_their_own_cold_and_warm(measure):
    rows = measure("start", "--parts", "ready", "--repeats", "1")
    assert [row["triton_cache"] for row in rows] == ["cold", "warm"]
    for row in rows:
        assert min(row["import_torch_s"], row["ready_s"], row["first_token_s"], row["close_s"]) > 0


def test_a_checkpoint_is_written_read_and_loaded_and_removed(measure, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    [row] = measure("start", "--parts", "disk", "--repeats", "1", "--folder", str(disk))
    assert row["bytes"] > 600_000
    assert row["of_disk"] == pytest.approx(row["load_GB_s"] / row["disk_GB_s"], rel=1e-2)
    assert list(disk.iterdir()) == []


def test_rounds_end_by_closing_an_exception_and_an_interrupt(measure):
    before = signal.getsignal(signal.SIGINT)
    rounds, light, deep = measure("start", "--parts", "memory")
    assert rounds["rounds"] == 3
    assert len(rounds["each_after_MB"]) == 3
    assert [light["level"], deep["level"]] == [1, 2]
    assert light["wake_up_s"] >= 0
    assert deep["single_after_tok_s"] > 0
    assert signal.getsignal(signal.SIGINT) is before


def test_everything_can_be_asked_for_at_once_and_stops_with_the_time(measure, capsys):
    assert measure("all", "--pace", "0", "--no-out") == []
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("== ")] == [
        f"== {name}" for name in ("cells", "mixed", "kernel", "busy", "online", "start", "switches")
    ]


def test_options_of_the_engine_come_through(measure):
    with pytest.raises(TypeError, match="block_sise"):
        measure("cells", "--config", json.dumps({"block_sise": 32}))
