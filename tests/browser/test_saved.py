"""What is left of the views where no kernel is: in a page that embeds them, in an exported notebook, and where no script runs."""

from __future__ import annotations

import re
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import anywidget
import nbformat
import pytest
from ipywidgets.embed import dependency_state, embed_minimal_html
from playwright.sync_api import expect

from nbengine import Engine, SamplingParams
from nbengine.widgets import BlockTableView, Dashboard, Timeline, compare

PICTURES = 'img[src*="PHN2ZyBjbGFzcz0ibmJlbmdpbmUtc3RpbGwt"]'  # as nbconvert writes them; so begins the class of each
ROOT = Path(__file__).parents[2]
EMBED = ROOT / "build/embed"
PARAMS = SamplingParams(max_tokens=60, ignore_eos=True)
CODE = """\
%load_ext nbengine
%engine load tales --num-gpu-blocks-override 64 --max-model-len 256 --out e
%blocks
%%generate -m 30 --ignore-eos --no-chat --seed 1\nOnce upon a time
%timeline
%dashboard
from nbengine.widgets import compare; compare(e.trace, e.trace)"""


@pytest.fixture(scope="module")
def scripts():
    """What a page fetches, by a part of its address: html-manager, which draws widgets outside of Jupyter, its loader, and anywidget."""
    subprocess.run(["make", "build/embed/.ready"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # nothing to do after `make test`'s own
    own = Path(anywidget.__file__).parent / "nbextension/index.js"
    return {"/html-manager": EMBED / "embed-amd.js", "/require": EMBED / "require.js", "/anywidget@": own}


@pytest.fixture
def show(browser, scripts):
    """Open a page as a person does who has no kernel; whatever it fetches comes from this machine. It and what it complains of."""
    contexts = []
    expect.set_options(timeout=30_000)

    def answer(route):
        found = next((file for part, file in scripts.items() if part in route.request.url), None)
        if found is None:
            route.abort()
        else:
            route.fulfill(path=found, content_type="text/javascript", headers={"Access-Control-Allow-Origin": "*"})

    def show(path, **options):
        path.write_text(re.sub(r' integrity="[^"]*"', "", path.read_text()))  # of the same loader, made smaller
        context = browser.new_context(viewport={"width": 1000, "height": 2000}, **options)
        contexts.append(context)
        page, complaints = context.new_page(), []
        page.on("pageerror", lambda error: complaints.append(f"{error.message}\n{error.stack}"))
        page.route(re.compile("^https?://"), answer)
        page.goto(path.as_uri())
        return page, complaints

    yield show
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A notebook that was run where nobody looked at it, as a page."""
    folder = tmp_path_factory.mktemp("exported")
    cells, magic = [], ""
    for line in CODE.splitlines():
        if line.startswith("%%"):
            magic = line + "\n"
        else:
            cells.append(nbformat.v4.new_code_cell(magic + line))
            magic = ""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "run.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--execute", "--to", "html", str(folder / "run.ipynb")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder / "run.html"


def test_a_page_that_embeds_views_draws_them_without_a_kernel(show, shots, tmp_path):
    with Engine("tales", num_gpu_blocks_override=64, max_model_len=256) as engine:
        engine.generate(["Once upon a time", "The fox"], PARAMS)
        engine.pause()
        engine.submit_all(["A king and his three sons"] * 3, PARAMS)
        engine.step(30)
        views = [kind(engine) for kind in (BlockTableView, Timeline, Dashboard)]
        for view in views:
            view._eyes["here"] = True
            view.refresh()
        frames = [view.frame for view in views]
        together = [*views, compare(engine.trace, engine.trace)]
        embed_minimal_html(tmp_path / "views.html", views=together, state=dependency_state(together))
    page, complaints = show(tmp_path / "views.html")
    blocks, timeline, board = (page.get_by_role("region", name=name) for name in ("KV blocks", "Timeline", "Dashboard"))
    expect(blocks.locator("canvas[data-frames]").first).to_be_visible()
    expect(blocks).to_contain_text(f"held {frames[0]['totals']['held']}")
    colours = "canvas => new Set(new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"
    assert blocks.locator("canvas").first.evaluate(colours) > 4
    expect(timeline.locator(".nbengine-batch li")).to_have_count(len(frames[1]["batch"]["rows"]))
    assert timeline.locator("canvas").evaluate(colours) > 3
    expect(board.locator(".nbengine-numbers").first).to_contain_text(frames[2]["numbers"][1][1])
    expect(board.locator(".nbengine-charts")).to_contain_text("snapshot() of the view makes one")
    expect(page.locator(".nbengine-compare canvas").first).to_be_visible()
    for view in (blocks, timeline, board):
        expect(view.locator(".nbengine-status").first).to_contain_text("saved, without its kernel")
        expect(view.locator(".nbengine-hard")).to_be_hidden()
        assert all(button.is_disabled() for button in view.locator(".nbengine-time button").all())
    page.screenshot(path=shots / "embedded.png", full_page=True)
    assert complaints == []


def test_an_exported_notebook_shows_the_pictures_of_views_that_nobody_looked_at(show, shots, exported):
    page, complaints = show(exported)
    expect(page.locator(".nbengine-compare canvas").first).to_be_visible()
    live = page.locator(".nbengine-view:not(.nbengine-compare)")
    expect(live).to_have_count(3)
    assert [view.is_visible() for view in live.all()] == [False] * 3
    expect(page.locator(PICTURES).filter(visible=True)).to_have_count(3)
    assert page.locator(PICTURES).count() == 4  # the comparison is drawn, and its picture hidden
    blocks = b64decode(page.locator(PICTURES).first.get_attribute("src").split(",")[1]).decode()
    assert int(re.search(r"after record (-?\d+)", blocks)[1]) >= 29  # it was shown before the text was generated
    page.screenshot(path=shots / "exported.png", full_page=True)
    assert complaints == []


def test_where_no_script_runs_the_pictures_are_there(show, exported):
    page, _ = show(exported, java_script_enabled=False)
    expect(page.locator(PICTURES).filter(visible=True)).to_have_count(4)
