import json
import subprocess
import sys
import threading

import pytest
import torch

from nbengine.bench import measure as measuring
from nbengine.bench.__main__ import main
from nbengine.bench.ceilings import ceilings
from nbengine.bench.cells import cell
from nbengine.bench.limits import H200
from nbengine.bench.measure import Opening, Run, Settings, opened, run
from nbengine.bench.results import Results, commit, table
from nbengine.bench.workloads import WORKLOADS, workload

MACHINE = {"card", "date", "versions", "commit", "copy_TB_s", "matmul_TFLOP_s"}
CPU = torch.device("cpu")


def test_a_row_of_every_cell_says_where_and_on_what_it_was_measured(measure):
    rows = measure("cells", "--peer", "transformers")
    cells = [row for row in rows if row["kind"] == "cell"]
    assert [row["workload"] for row in cells] == list(WORKLOADS)
    for row in rows:
        assert set(row) >= MACHINE | {"model", "workload", "requests", "tok_s", "seconds"}
        assert row["quick"] is True
        assert row["copy_TB_s"] > 0
        assert row["matmul_TFLOP_s"] > 0
        assert {"torch", "transformers", "nbengine", "python"} <= set(row["versions"])
    for row in cells:
        assert row["of_limit_here"] > 0
        assert row["steps"] >= 24
        assert row["ready_s"] > 0
        assert row["first_token_s"] > 0
        assert row["vllm_tok_s"] is None, "a short workload must not be compared with the figures of a long one"
    assert [row["workload"] for row in rows if row["kind"] == "peer"] == list(WORKLOADS)


def test_rows_are_added_to_those_of_the_runs_before(measure):
    assert len(measure("cells", "--workloads", "single")) == 1
    assert len(measure("cells", "--workloads", "single", models=("tiny", "tales"))) == 3


def test_a_whole_cell_is_compared_with_the_recorded_figures():
    sent = Run(seconds=2.0, tokens=12_800, requests=50, steps=256)
    row = cell("qwen3-0.6b", "fifty", sent, [sent], Opening(4.0, 0.5), H200, quick=False)
    assert (row["tok_s"], row["of_vllm"], row["of_goal"]) == (6_400, 6_400 / 20_734, 6_400 / 32_000)
    assert row["of_vllm_scaled"] == pytest.approx(row["of_vllm"], rel=1e-4), "on the same card both ratios are the same"
    assert row["of_limit"] == row["of_limit_here"] == pytest.approx(6_400 / 77_423, rel=1e-4)


def test_the_best_of_the_repeats_counts_and_each_has_prompts_of_its_own(monkeypatch, measure):
    seen = []
    rates = iter([10.0, 30.0, 20.0])

    def instead(llm, jobs):
        seen.append(tuple(jobs[0][0]))
        return Run(seconds=24 / next(rates), tokens=24, requests=1)

    monkeypatch.setattr(measuring, "run", instead)
    [row] = measure("cells", "--workloads", "single", "--repeats", "3")
    assert row["tok_s"] == 30
    assert row["runs_tok_s"] == [10, 30, 20]
    assert len(set(seen)) == 3


def test_an_output_that_is_too_short_is_no_result(monkeypatch, tmp_path):
    with opened("tiny", Settings(CPU, tmp_path, quick=True)) as (llm, _):
        jobs = workload("single", vocab_size=4096, quick=True)
        assert run(llm, jobs).tokens == 24
        whole = measuring.asked
        monkeypatch.setattr(measuring, "asked", lambda jobs: whole(jobs, max_tokens=5))
        with pytest.raises(AssertionError, match="shorter"):
            run(llm, jobs)


def test_an_engine_is_closed_when_what_is_measured_fails(tmp_path):
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), opened("tiny", Settings(CPU, tmp_path)) as (llm, _):
        1 / 0  # noqa: B018
    assert llm.engine.status == "closed"
    assert threading.active_count() == before


def test_a_workload_that_does_not_fit_is_refused():
    with pytest.raises(SystemExit, match="raise --max-model-len"):
        main(["cells", "--models", "tiny", "--workloads", "nano", "--no-out", "--max-model-len", "512", "--device", "cpu"])


def test_nothing_new_begins_when_the_time_is_over(measure, capsys):
    assert measure("cells", "--pace", "0") == []
    assert "left out, 0 minutes are over: tiny" in capsys.readouterr().out


def test_an_unknown_model_is_refused_before_anything_is_measured():
    with pytest.raises(SystemExit, match="did you mean 'tiny'"):
        main(["cells", "--models", "tinny", "--no-out"])


def test_a_peer_that_is_not_installed_is_refused_with_advice(measure):
    with pytest.raises(SystemExit, match="vllm is not installed here"):
        measure("cells", "--peer", "vllm")


def test_a_peer_that_fails_leaves_the_other_rows(measure, monkeypatch):
    from nbengine.bench import peers

    def fails(model, size):
        def way(jobs):
            raise RuntimeError("no kernel for this card")

        return way

    monkeypatch.setattr(peers, "_batched", fails)
    rows = measure("cells", "--peer", "transformers", "--workloads", "single")
    assert [row.get("error") for row in rows] == [None, "RuntimeError: no kernel for this card"]


def test_the_commit_can_be_told_where_there_is_no_repository(monkeypatch):
    monkeypatch.setenv("NBENGINE_COMMIT", "abc123")
    assert commit() == "abc123"


def test_a_run_that_is_cut_short_leaves_what_it_had(tmp_path):
    file = tmp_path / "rows.json"
    results = Results(file, {"card": "none"})
    results.add("cell", {"tok_s": 1.23456})
    results.add("cell", {"tok_s": 123456.7})
    assert json.loads(file.read_text()) == [
        {"kind": "cell", "tok_s": 1.235, "card": "none"},
        {"kind": "cell", "tok_s": 123457, "card": "none"},
    ]
    assert list(tmp_path.iterdir()) == [file]


def test_a_table_lines_its_columns_up(capsys):
    table("title", ("cell", "tok/s"), [("a", 12345.6), ("longer", None)])
    assert capsys.readouterr().out.splitlines()[1:] == ["title", "cell     tok/s", "a       12,346", "longer       -"]


def test_the_ceilings_are_of_this_machine():
    card = ceilings(CPU, quick=True)
    assert 1e8 < card.bandwidth < 1e13
    assert 1e8 < card.rate < 1e15


def test_the_cells_need_no_notebook_packages(tmp_path):
    code = """
        import sys
        for name in ("IPython", "ipykernel", "ipywidgets", "anywidget", "jupyter_client", "nest_asyncio2", "tornado", "plotly"):
            sys.modules[name] = None
        from nbengine.bench.__main__ import main
        main(["cells", "--quick", "--models", "tiny", "--workloads", "single", "--no-out", "--device", "cpu"])
        try:
            main(["kernel", "--quick", "--models", "tiny", "--no-out", "--device", "cpu"])
        except SystemExit as refused:
            print("refused:", refused)
    """
    lines = "\n".join(line.strip() if not line.startswith(" " * 12) else line[8:] for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "tiny single" in done.stdout
    assert "refused: this measures in a real Jupyter kernel and needs jupyter_client, ipykernel" in done.stdout
