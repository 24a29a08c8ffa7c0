"""What all engines answer together, and the page of them."""

from __future__ import annotations

import json

from stand_in import KERNELS, told

ONE, TWO = (kernel[:8] for kernel in KERNELS)
METRICS = """# HELP nbengine:num_requests_running Requests that run
# TYPE nbengine:num_requests_running gauge
nbengine:num_requests_running{{model_name="tales"}} {value}
# HELP nbengine:prompt_tokens_total Tokens
# TYPE nbengine:prompt_tokens_total counter
nbengine:prompt_tokens_total{{model_name="tales"}} {value}
# HELP nbengine:latency_seconds Latency
# TYPE nbengine:latency_seconds histogram
nbengine:latency_seconds_bucket{{le="1.0"}} {value}
nbengine:latency_seconds_bucket{{le="+Inf"}} {value}
nbengine:latency_seconds_count {value}
nbengine:latency_seconds_sum {value}
"""


async def test_models_of_all_engines_are_listed_under_names_that_work(serve, ask):
    await serve(models=["tales", "qwen"])
    await serve(KERNELS[1], models=["tales", "llama"])
    models = json.loads((await ask("/v1/models")).body)
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == [f"tales@{ONE}", "qwen", f"tales@{TWO}", "llama"]
    assert models["data"][0]["max_model_len"] == 512
    for model in models["data"]:
        assert json.loads((await ask(f"/v1/models/{model['id']}")).body) == model
    assert told(await ask("/v1/models/tales"))["code"] == "ambiguous_model"
    assert (await ask("/v1/models/nothing")).code == 404


async def test_an_engine_that_does_not_answer_is_left_out_of_the_list(serve, ask):
    await serve()
    gone = await serve(KERNELS[1], models=["other"])
    gone.server.stop()
    assert [model["id"] for model in json.loads((await ask("/v1/models")).body)["data"]] == ["tales"]


async def test_health_is_well_while_any_engine_is(serve, ask, kernels):
    assert told(await ask("/health"))["code"] == "no_engine"
    one, two = await serve(), await serve(KERNELS[1])
    one.answers["/health"], two.answers["/health"] = 503, {}
    response = await ask("/health")
    assert (response.code, json.loads(response.body)) == (200, {"engines": {f"{ONE}.0": 503, f"{TWO}.0": 200}})
    two.answers["/health"] = 503
    assert (await ask("/health")).code == 503


async def test_load_is_the_sum(serve, ask):
    for kernel, load in zip(KERNELS, (2, 5), strict=True):
        (await serve(kernel)).answers["/load"] = {"server_load": load}
    assert json.loads((await ask("/load")).body) == {"server_load": 7}
    for number, engine in enumerate(("a", "b", "b"), 1):  # two of them are one engine's
        (await serve(KERNELS[0], number, engine=engine)).answers["/load"] = {"server_load": 10}
    assert json.loads((await ask("/load")).body) == {"server_load": 27}


async def test_each_series_of_the_metrics_carries_its_kernel(serve, ask):
    for kernel, value in zip(KERNELS, (1.0, 2.0), strict=True):
        (await serve(kernel)).answers["/metrics"] = METRICS.format(value=value)
    response = await ask("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain")
    lines = response.body.decode().splitlines()
    for label, value in ((ONE, 1.0), (TWO, 2.0)):
        assert f'nbengine:num_requests_running{{kernel="{label}",model_name="tales",server="0"}} {value}' in lines
        assert f'nbengine:prompt_tokens_total{{kernel="{label}",model_name="tales",server="0"}} {value}' in lines
        assert f'nbengine:latency_seconds_bucket{{kernel="{label}",le="+Inf",server="0"}} {value}' in lines
    assert lines.count("# TYPE nbengine:prompt_tokens_total counter") == 1


async def test_the_version_is_nbengines(ask, kernels):
    import nbengine

    assert json.loads((await ask("/version")).body) == {"version": nbengine.__version__}


async def test_the_page_shows_engines_and_neither_secret_nor_address(serve, ask):
    engine = await serve(models=["<b>tales</b>"])
    for accept, shown in (("application/json", "<b>tales</b>"), ("text/html", "&lt;b&gt;tales&lt;/b&gt;")):
        response = await ask("/", headers={"Accept": accept})
        assert response.code == 200
        assert response.headers["Content-Type"].startswith(accept)
        page = response.body.decode()
        assert shown in page
        assert "/a%40b/nbengine/v1" in page
        assert engine.secret not in page
        assert str(engine.port) not in page
    [found] = json.loads((await ask("")).body)["engines"]
    assert found == {
        "kernel": ONE, "number": 0, "kernel_id": KERNELS[0], "notebook": None, "state": "ready", "models": ["<b>tales</b>"], "requests": 0,
    }  # fmt: skip
    assert "<b>" not in (await ask("/", headers={"Accept": "text/html"})).body.decode()


async def test_a_page_without_engines_says_what_to_run(ask, kernels):
    assert "%engine serve" in (await ask("/", headers={"Accept": "text/html"})).body.decode()
