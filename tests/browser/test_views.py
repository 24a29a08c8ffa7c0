"""The live views in a real JupyterLab."""

import os

import pytest


@pytest.fixture(scope="module")
def ready(notebook):
    notebook.run("%load_ext nbengine")
    assert "loaded in" in notebook.run("%engine load tales --num-gpu-blocks-override 256 --out e").text
    return notebook


def test_look(ready, console):
    b = ready.run("b = %blocks\nb")
    t = ready.run("t = %timeline\nt")
    ready.page.wait_for_timeout(1000)
    for i in range(6):
        ready.run(f"%%generate --bg -m {200 + 40 * i} -n 2 --ignore-eos --no-chat --seed {i}\nOnce upon a time there was a fox who")
    ready.page.wait_for_timeout(1500)
    b.box.scroll_into_view_if_needed()
    b.box.get_by_role("button", name="Pause").click()
    ready.page.wait_for_timeout(700)
    c = b.box.locator("canvas.nbengine-cells")
    c.click(position={"x": 30, "y": 8})
    ready.page.wait_for_timeout(1000)
    ready.shoot("blocks-light", b)
    c.hover(position={"x": 30, "y": 8})
    ready.page.wait_for_timeout(500)
    b.box.screenshot(path=os.environ["NBENGINE_SCREENSHOTS"] + "/blocks-hover.png")
    t.box.scroll_into_view_if_needed()
    ready.page.wait_for_timeout(500)
    ready.shoot("timeline-light", t)
    ready.theme("JupyterLab Dark")
    ready.page.wait_for_timeout(500)
    ready.shoot("timeline-dark", t)
    b.box.scroll_into_view_if_needed()
    ready.page.wait_for_timeout(500)
    ready.shoot("blocks-dark", b)
    print(console)
    assert not console
