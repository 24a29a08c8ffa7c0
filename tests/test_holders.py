"""Who holds the memory is found, named, counted once, and not held any longer by having been looked for."""

import gc
import os
import subprocess
import sys
import types
import weakref
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch

from nbengine import LLM, Engine, tensor_walk
from nbengine.holders import Holder, explain, forget_traceback, holders
from nbengine.memory import MemoryPlan, free_ram, total_ram
from nbengine.tensor_walk import Found, Place, Walk, find_tensors

MIB = 1 << 20
GIB = 1 << 30


def mib(count=1):
    return torch.zeros(count * MIB, dtype=torch.uint8)


def own(namespace, engines=None, device="cpu"):
    """Everything but the rest, by name."""
    return {one.name: one for one in holders(device, engines or {}, namespace) if one.kind not in {"process", "others"}}


def sizes(namespace):
    return {name: one.nbytes for name, one in own(namespace).items()}


class Box:
    def __init__(self, content):
        self.content = content


@dataclass
class State:
    step: int
    cache: dict


def test_tensors_are_found_in_variables_and_in_containers():
    assert sizes({"x": mib(3)}) == {"variable x": 3 * MIB}
    for value in (
        [mib()],
        {"a": mib()},
        (1, [mib()]),
        {"a": [mib()]},
        UserDict(a=mib()),
        [{"a": (mib(),)}],
        Box(mib()),
        Box([mib()]),
        State(1, {"k": mib()}),
        {mib(): 1},
    ):
        assert sizes({"value": value}) == {"variable value": MIB}
    assert sizes({"number": 3, "text": "x" * 100, "nothing": None, "code": sizes, "kind": Box, "torch": torch}) == {}
    assert sizes({"deep": [[[[mib()]]]]}) == {}  # one step too far


def test_modules_count_with_parameters_buffers_and_gradients():
    linear = torch.nn.Linear(512, 512)
    linear.register_buffer("seen", torch.zeros(256))
    weights = 4 * (512 * 512 + 512)
    assert sizes({"model": linear}) == {"variable model": weights + 1024}
    linear(torch.ones(512)).sum().backward()
    assert sizes({"model": linear}) == {"variable model": 2 * weights + 1024}
    assert sizes({"pipe": Box(linear)}) == {"variable pipe": 2 * weights + 1024}


def test_an_optimizer_counts_with_its_state_and_keeps_its_parameters():
    linear = torch.nn.Linear(512, 512, bias=False)
    optimizer = torch.optim.Adam(linear.parameters())
    linear(torch.ones(512)).sum().backward()
    optimizer.step()
    found = own({"model": linear, "optimizer": optimizer})
    assert found["variable model"].nbytes == 2 * MIB
    assert found["variable model"].also == ("variable optimizer",)
    assert found["variable optimizer"].nbytes == pytest.approx(2 * MIB, abs=64)


def test_a_storage_counts_once_and_a_view_keeps_all_of_it():
    whole = mib(4)
    assert sizes({"part": whole[:5]}) == {"variable part": 4 * MIB}
    found = own({"whole": whole, "part": whole[:5], "list": [whole, whole[7:]], "Out": {3: whole}, "_": whole})
    assert {name: one.nbytes for name, one in found.items()} == {"variable whole": 4 * MIB}
    assert found["variable whole"].also == ("variable part", "variable list", "Out[3]", "_")
    assert found["variable whole"].advice == "del whole; del part; del list; del Out[3]"


def test_outputs_are_looked_into_and_other_names_of_ipython_are_not():
    kept = mib()
    found = own({"Out": {7: [kept]}, "_oh": {7: [kept]}, "_7": [kept], "In": [mib()], "_ih": [mib()], "_i7": mib(), "__spec__": mib()})
    assert list(found) == ["Out[7]"]
    assert (found["Out[7]"].kind, found["Out[7]"].nbytes, found["Out[7]"].also) == ("output", MIB, ())
    assert found["Out[7]"].advice == "%xdel _7"
    assert sizes({"_12": mib()}) == {"Out[12]": MIB}  # after `del Out[12]`
    assert sizes({"__": mib()}) == {"__": MIB}
    assert sizes({"_mine": mib()}) == {"variable _mine": MIB}


def failed(error):
    """The exception as a cell would leave it."""
    try:
        error()
    except (KeyError, ValueError) as caught:
        return caught


def raise_with_tensor():
    batch = mib(2)
    raise ValueError(len(batch))


def raise_with_a_closed_over_tensor():
    batch = mib(2)
    raise ValueError([lambda: batch])


def raise_from_another():
    try:
        raise_with_tensor()
    except ValueError as error:
        raise KeyError from error


@pytest.mark.parametrize("cause", [raise_with_tensor, raise_with_a_closed_over_tensor, raise_from_another])
def test_the_last_traceback_keeps_tensors(monkeypatch, cause):
    error = failed(cause)
    monkeypatch.setattr(sys, "last_value", error, raising=False)
    monkeypatch.setattr(sys, "last_traceback", error.__traceback__, raising=False)
    (found,) = own({}).values()
    assert (found.kind, found.name, found.nbytes) == ("traceback", "the last traceback", 2 * MIB)
    assert found.advice == "nbengine.holders.forget_traceback()"


def test_a_traceback_whose_variables_were_read_is_forgotten_too(monkeypatch):
    error = failed(raise_from_another)
    monkeypatch.setattr(sys, "last_value", error, raising=False)
    tensors = [
        weakref.ref(value) for frame in tensor_walk._frames() for value in frame.f_locals.values() if isinstance(value, torch.Tensor)
    ]
    assert len(tensors) == 1
    forget_traceback()
    assert tensors[0]() is None
    assert own({}) == {}


NOTEBOOK = """if True:
    import gc, sys, weakref
    import torch
    from IPython.core.interactiveshell import InteractiveShell
    from nbengine.holders import holders

    shell = InteractiveShell.instance()

    def run(cell):
        shell.run_cell(cell, store_history=True)

    def held():
        return {one.name: one for one in holders("cpu", {}, shell.user_ns) if one.kind not in {"process", "others"}}

    run("import sys, torch, nbengine")
    run("x = torch.ones(3 << 20, dtype=torch.uint8)")
    run("torch.ones(5 << 20, dtype=torch.uint8)")
    run("y = [torch.ones(6 << 20, dtype=torch.uint8)]; y")
    run("def f():\\n    batch = torch.ones(7 << 20, dtype=torch.uint8)\\n    1 / 0")
    run("f()")
    found = held()
    print({name: (one.nbytes >> 20, one.also) for name, one in found.items()})
    tensors = [weakref.ref(one) for one in gc.get_objects() if type(one) is torch.Tensor]
    for one in found.values():
        for advice in one.advice.split("; "):
            run(advice)
    run("1")
    gc.collect()
    print(len(tensors), [one() is None for one in tensors], list(held()))
"""


def test_in_ipython_all_is_found_and_the_advice_frees_it(tmp_path):
    pytest.importorskip("IPython")
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], check=True, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("{", "4 "))]
    assert lines == [
        str({"the last traceback": (7, ()), "variable y": (6, ("Out[4]", "_")), "Out[3]": (5, ("__",)), "variable x": (3, ())}),
        "4 [True, True, True, True] []",
    ], done.stdout


def test_a_cells_own_frame_is_the_namespace_and_not_a_traceback(monkeypatch):
    namespace = {"x": mib()}
    try:
        exec("y = x[1:]\n1 / 0", namespace)
    except ZeroDivisionError as error:
        monkeypatch.setattr(sys, "last_traceback", error.__traceback__.tb_next, raising=False)
    found = own(namespace)
    assert list(found) == ["variable x"]
    assert found["variable x"].also == ("variable y",)


def test_looking_keeps_nothing_alive(monkeypatch):
    namespace = {"x": mib(), "model": torch.nn.Linear(3, 3), "Out": {1: mib()}}
    error = failed(raise_with_tensor)
    monkeypatch.setattr(sys, "last_traceback", error.__traceback__, raising=False)
    held = [weakref.ref(namespace["x"]), weakref.ref(namespace["model"]), weakref.ref(namespace["Out"][1])]
    frame = error.__traceback__.tb_next.tb_frame
    held.append(weakref.ref(next(value for value in gc.get_referents(frame) if isinstance(value, torch.Tensor))))
    del frame
    gc.collect()
    gc.disable()
    try:
        found = holders("cpu", {}, namespace)
        namespace.clear()
        forget_traceback()
        assert [one() for one in held] == [None] * 4
    finally:
        gc.enable()
    assert {"variable x", "variable model", "Out[1]", "the last traceback"} <= {one.name for one in found}


def test_what_misbehaves_is_passed_over():
    class Hostile(dict):
        def items(self):
            raise RuntimeError("no")

    class Picky:
        def parameters(self, kind):
            raise AssertionError

    sparse = torch.eye(10).to_sparse()
    namespace = {"a": Hostile(x=mib()), "b": Picky(), "c": sparse, "d": torch.empty(9, device="meta"), "e": mib()}
    namespace["f"] = loop = []
    loop.append(loop)
    assert sizes(namespace) == {"variable e": MIB}


def test_huge_containers_do_not_hold_up_an_error(monkeypatch):
    looked_at = []
    count = tensor_walk._is_engine
    monkeypatch.setattr(tensor_walk, "MOST", 50)
    monkeypatch.setattr(tensor_walk, "_is_engine", lambda value: looked_at.append(value) or count(value))
    rows = [[{}] for _ in range(1000)]
    assert sizes({"huge": {"rows": rows, "x": mib()}, "y": mib()}) == {"variable huge": MIB, "variable y": MIB}  # the near ones first
    assert len(looked_at) <= 50


def test_an_engine_counts_with_weights_and_cache():
    with Engine("tales", num_gpu_blocks_override=64, dtype="bfloat16") as engine:
        memory = engine.info.memory
        (found,) = own({}, {"fairy": engine}).values()
        assert found == Holder("engine", "engine 'fairy'", "cpu", memory.weights + memory.kv_cache, "%engine unload fairy")
        assert list(own({"engine": engine, "_": engine}, {"fairy": engine, "again": engine})) == ["engine 'fairy'"]
        (met,) = own({"llms": [engine]}).values()
        assert (met.name, met.nbytes) == ("the engine of 'tales' in llms", found.nbytes)
        engine.sleep(1)
        assert own({}, {"fairy": engine})["engine 'fairy'"].nbytes == memory.weights
        engine.wake_up()
        assert own({}, {"fairy": engine})["engine 'fairy'"].nbytes == found.nbytes
    assert own({}, {"fairy": engine}) == {}


def test_an_llm_in_a_variable_is_an_engine():
    with LLM("tales", num_gpu_blocks_override=64) as llm:
        (found,) = own({"llm": llm}).values()
        assert (found.kind, found.name) == ("engine", "the engine of 'tales' in llm")


def sleeping(level, device="cpu"):
    info = types.SimpleNamespace(memory=MemoryPlan(GIB, 2 * GIB, 1, 1, 0), device=device)
    return types.SimpleNamespace(info=info, status="asleep", sleep_level=level, config=types.SimpleNamespace(model="m"))


def test_deep_sleep_gives_the_weights_back():
    assert own({}, {"a": sleeping(1)})["engine 'a'"].nbytes == GIB
    assert own({}, {"a": sleeping(2)}) == {}


def test_on_a_cpu_the_rest_is_what_the_system_says():
    ballast = mib(200).fill_(1)
    found = {one.kind: one for one in holders("cpu", {}, {"ballast": ballast})}
    before = found["process"].nbytes
    assert 20 * MIB < before < 10 * GIB  # torch itself, and no more
    without = {one.kind: one for one in holders("cpu", {}, {})}["process"].nbytes
    assert without - before == pytest.approx(200 * MIB, abs=20 * MIB)
    assert found["others"].nbytes == pytest.approx(total_ram() - free_ram() - before - 200 * MIB, abs=GIB)


def test_memory_in_all_is_the_containers_where_it_has_a_limit(monkeypatch):
    whole = total_ram()
    assert whole > free_ram()
    monkeypatch.setattr("nbengine.memory._cgroup", lambda *_: 1 << 29)
    assert total_ram() == 1 << 29
    monkeypatch.setattr("nbengine.memory._cgroup", lambda *_: 1 << 60)
    assert total_ram() >= whole


CARD = {"total": 80 * GIB, "free": 10 * GIB, "reserved": 30 * GIB, "allocated": 28 * GIB}


@pytest.fixture
def card(monkeypatch):
    state = dict(CARD)
    asked = []

    def answers(*names):
        def answer(device):
            asked.append(device)
            values = tuple(state[name] for name in names)
            return values if len(values) > 1 else values[0]

        return answer

    monkeypatch.setattr(torch.cuda, "mem_get_info", answers("free", "total"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", answers("reserved"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", answers("allocated"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    state["asked"] = asked
    return state


def on_card(monkeypatch, *found):
    monkeypatch.setattr("nbengine.holders.find_tensors", lambda _: Walk(found=list(found)))


def tensor(name, gib, address, device="cuda:1"):
    return Found(Place("variable", f"variable {name}", f"del {name}"), device, (device, address), gib * GIB)


def awake(device):
    engine = sleeping(0, device)
    engine.status = "idle"
    return engine


def test_a_card_is_shared_out_among_all_who_hold_it(card, monkeypatch):
    on_card(monkeypatch, tensor("x", 5, 1), tensor("y", 5, 1), tensor("z", 7, 2), tensor("far", 9, 3, "cuda:0"))
    found = holders("cuda:1", {"a": awake("cuda:1"), "b": awake("cuda:0"), "c": awake("cpu")}, {})
    assert [(one.name, one.nbytes // GIB) for one in found] == [
        ("other processes and CUDA itself", 40),  # 80 in all, 10 free, 30 ours
        ("the rest of this process", 15),  # 30 reserved, of which 3 are the engine's, 12 tensors'
        ("variable z", 7),
        ("variable x", 5),
        ("engine 'a'", 3),
    ]
    assert sum(one.nbytes for one in found) == card["total"] - card["free"]
    assert set(card["asked"]) == {"cuda:1"}
    assert found[1].advice == "torch.cuda.empty_cache() gives 2.0 GiB of it back"


def test_cuda_without_a_number_is_the_current_card(card, monkeypatch):
    on_card(monkeypatch, tensor("x", 5, 1))
    for device in ("cuda", torch.device("cuda"), torch.device("cuda", 1)):
        assert {one.device for one in holders(device, {}, {})} == {"cuda:1"}


def test_nobody_holds_less_than_nothing(card, monkeypatch):
    on_card(monkeypatch, tensor("x", 5, 1))
    card.update(reserved=4 * GIB, allocated=4 * GIB, free=77 * GIB)
    assert [one.name for one in holders("cuda:1", {}, {})] == ["variable x"]


def test_an_explanation_names_who_holds_and_what_to_type(card, monkeypatch):
    small = Found(Place("variable", "variable tiny", "del tiny"), "cuda:1", ("cuda:1", 9), 1000)
    output = Found(Place("output", "Out[3]", "%xdel _3"), "cuda:1", ("cuda:1", 2), 7 * GIB)
    on_card(monkeypatch, tensor("x", 5, 1), small, output)
    text = explain(holders("cuda:1", {"tales": awake("cuda:1")}, {}))
    assert text.splitlines() == [
        "the card (cuda:1) is full:",
        "  Out[3] holds 7.0 GiB (%xdel _3)",
        "  variable x holds 5.0 GiB (del x)",
        "  engine 'tales' holds 3.0 GiB (%engine unload tales)",
        "  variable tiny holds 1000 B",
        "  other processes and CUDA itself hold 40.0 GiB",
        "  the rest of this process holds 15.0 GiB (torch.cuda.empty_cache() gives 2.0 GiB of it back)",
    ]


def test_an_explanation_stays_short():
    many = [Holder("variable", f"variable v{i}", "cpu", (i + 1) * GIB, f"del v{i}") for i in range(50)]
    lines = explain([*many, Holder("others", "other processes", "cpu", 5)]).splitlines()
    assert lines[0] == "the memory (cpu) is full:"
    assert len(lines) == 9
    assert lines[1] == "  variable v49 holds 50.0 GiB (del v49)"
    assert lines[7] == "  44 more hold 990.0 GiB"
    shared = Holder("variable", "variable x", "cpu", GIB, "del x; %xdel _3", ("Out[3]",))
    assert "variable x holds 1.0 GiB, as does Out[3] (del x; %xdel _3)" in explain([shared])
    assert explain([]) == "nothing that can be seen from here holds the memory"


def test_torch_is_not_imported_to_look_for_tensors():
    script = """if True:
        import sys
        from nbengine.holders import explain, holders
        found = holders("cpu", {}, {"x": [1, 2]})
        assert {one.kind for one in found} <= {"process", "others"} and "process" in {one.kind for one in found}
        assert "the rest of this process holds" in explain(found)
        assert holders("cuda:0", {}, {}) == []
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_is_found_holds_plain_values():
    for one in find_tensors({"x": mib(), "Out": {1: [mib()]}}).found:
        assert {type(value) for value in (one.device, one.nbytes, *one.storage, one.place.name)} == {str, int}
