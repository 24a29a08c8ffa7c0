"""A real JupyterLab, or Notebook 7, in a headless Chromium, driven as a person drives it."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Locator, Page, expect, sync_playwright

WAIT = 30.0  # seconds, for what takes moments on an idle machine
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "docmanager-extension/plugin": {"autosave": False},  # where both save at once, JupyterLab asks which to keep
}

# A cell that is out of sight has no text until it has been drawn again.
READ = """async output => {
    output.scrollIntoView({ block: 'nearest' });
    for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
    return output.innerText;
}"""
# Both watch from inside the page: a look from outside comes late. The first notes how long a running cell's output is at each change,
# the second how long after a click the cell is no longer running.
WATCH = """cell => {
    const [prompt, output] = ['.jp-InputPrompt', '.jp-OutputArea'].map(part => cell.querySelector(part));
    window.lengths = [];
    const note = () => { if (prompt.textContent.includes('*')) window.lengths.push(output.textContent.length); };
    new MutationObserver(note).observe(output, { childList: true, characterData: true, subtree: true });
}"""
TIME_FROM_CLICK = """cell => {
    const prompt = cell.querySelector('.jp-InputPrompt');
    window.leftAfter = new Promise(resolve => document.addEventListener('click', () => {
        const began = performance.now();
        const watch = new MutationObserver(() => {
            if (!prompt.textContent.includes('*')) { watch.disconnect(); resolve((performance.now() - began) / 1000); }
        });
        watch.observe(prompt, { childList: true, characterData: true, subtree: true });
    }, { capture: true, once: true }));
}"""
# Where each shows that there is a kernel, and that it is idle.
IDLE = {
    "lab/tree": "text=/^Python 3 \\(ipykernel\\) \\| Idle$/",
    "notebooks": "body:has(.jp-NotebookKernelStatus-fade):has(.jp-Notebook-ExecutionIndicator[data-status='idle']) "
    ".jp-KernelName:has-text('Python 3 (ipykernel)')",
}
# What a theme changes.
PAPER = "() => getComputedStyle(document.body).getPropertyValue('--jp-layout-color0')"


@dataclass
class Lab:
    """A server on a loopback port."""

    url: str
    token: str
    root: Path


class Cell:
    """A cell that was run, by what a person sees of it."""

    def __init__(self, box: Locator) -> None:
        self.box = box
        self.prompt = box.locator(".jp-InputPrompt")
        self.output = box.locator(".jp-OutputArea").first
        self.body = self.output.locator(".jp-OutputArea-output").first
        self.error = self.output.locator("[data-mime-type$=error], [data-mime-type$=stderr]")
        self.widget = box.locator(".nbengine-controls")

    def button(self, name: str) -> Locator:
        return self.box.get_by_role("button", name=name, exact=True)

    @property
    def text(self) -> str:
        return self.output.evaluate(READ)

    @property
    def running(self) -> bool:
        return "*" in self.prompt.text_content()

    def grows(self) -> None:
        """Wait until more text stands in the output than now."""
        self.box.page.wait_for_function(
            "([output, length]) => output.textContent.length > length",
            arg=[self.output.element_handle(), self.output.evaluate("output => output.textContent.length")],
            polling="raf",
        )

    def watch(self) -> None:
        """Note how its output grows, for `lengths`."""
        self.box.evaluate(WATCH)

    def lengths(self) -> list[int]:
        """Each length that its output had while it ran, since `watch`."""
        return sorted(set(self.box.page.evaluate("() => window.lengths")))

    def ended(self) -> Cell:
        """Wait until it has been run."""
        expect(self.prompt).to_have_text(re.compile(r"\[\d+\]:"))
        return self

    def seconds_to_end(self, press: Any) -> float:
        """From the click that `press` makes until the cell is no longer running."""
        self.box.evaluate(TIME_FROM_CLICK)
        press()
        return self.box.page.evaluate("() => window.leftAfter")


class Notebook:
    """An open notebook; cells are added at its end."""

    def __init__(self, page: Page, path: Path, shots: Path, front_end: str) -> None:
        self.page = page
        self.path = path
        self.panel = page.locator(".jp-NotebookPanel:visible")
        self.cells = self.panel.locator(".jp-Notebook .jp-Cell")
        self.idle = page.locator(IDLE[front_end])
        self._shots = shots

    def start(self, source: str) -> Cell:
        """Write a cell and run it, without waiting for it."""
        box = self.cells.nth(self.cells.count() - 1)
        box.locator(".cm-content").click()
        expect(box.locator(".cm-content")).to_be_focused()
        self.page.keyboard.insert_text(source)
        expect(box.locator(".cm-line").first).to_have_text(source.splitlines()[0])
        count = self.cells.count()
        self.page.keyboard.press("Shift+Enter")
        expect(self.cells).to_have_count(count + 1)
        return Cell(box)

    def run(self, source: str) -> Cell:
        return self.start(source).ended()

    def stop(self) -> None:
        """Press the toolbar's stop button."""
        self.panel.get_by_role("button", name="Interrupt the kernel").click()

    def save(self) -> dict[str, Any]:
        """Press Ctrl+S; what is then in the file."""
        before = self.path.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        deadline = time.monotonic() + WAIT
        while self.path.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline, "the notebook was not saved"
            self.page.wait_for_timeout(20)
        self.page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
        return json.loads(self.path.read_text())

    def theme(self, name: str) -> None:
        """Choose another theme in the settings menu."""
        paper = self.page.evaluate(PAPER)
        for entry in ("Settings", "Theme", name):
            self.page.locator(".lm-MenuBar-itemLabel, .lm-Menu-itemLabel").get_by_text(entry, exact=True).click()
        self.page.wait_for_function(f"before => ({PAPER})() !== before", arg=paper)
        expect(self.page.locator(".lm-Menu")).to_have_count(0)

    def shoot(self, name: str, cell: Cell | None = None) -> None:
        """A picture of a cell, or of the whole window."""
        self.page.mouse.move(0, 0)  # nothing is hovered
        (self.page if cell is None else cell.box).screenshot(path=self._shots / f"{name}.png")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A server with settings of its own; it, its kernels and what they started are gone afterwards."""
    base, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(16)
    root, settings = base / "root", base / "config/lab/user-settings/@jupyterlab"
    root.mkdir()
    for plugin, wanted in SETTINGS.items():
        file = settings / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(wanted))
    env = {**os.environ, "JUPYTER_TOKEN": token, "JUPYTER_PREFER_ENV_PATH": "1", "IPYTHONDIR": str(base / "ipython")}
    env |= {f"JUPYTER_{kind.upper()}_DIR": str(base / kind) for kind in ("config", "data", "runtime")}
    options = ["--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={root}"]
    options += ["--allow-root", "--LabApp.extension_manager=readonly", "--LabApp.news_url=None"]
    with (base / "server.log").open("wb") as log:
        server = psutil.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, cwd=root, stdout=log, stderr=log)
    try:
        yield Lab(_address(server, base), token, root)
    finally:
        started = [server, *server.children(recursive=True)]
        server.terminate()
        _, left = psutil.wait_procs(started, timeout=15)
        for process in left:
            process.kill()
        assert not left, f"the server left these processes: {left}"


def _address(server: psutil.Popen, base: Path) -> str:
    deadline = time.monotonic() + WAIT
    while not (told := [text for file in (base / "runtime").glob("jpserver-*.json") if (text := file.read_text()).endswith("}")]):
        try:
            server.wait(timeout=0.1)
        except psutil.TimeoutExpired:
            assert time.monotonic() < deadline, "JupyterLab did not start: " + (base / "server.log").read_text()
        else:
            pytest.fail("JupyterLab ended: " + (base / "server.log").read_text())
    return json.loads(told[0])["url"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium; Playwright's own download is not needed."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("there is no chromium: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, chromium_sandbox=os.getuid() != 0)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pictures go: NBENGINE_SCREENSHOTS names another folder."""
    folder = Path(os.environ.get("NBENGINE_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def console(browser: Browser) -> list[str]:
    """What the page complained of."""
    return []


@pytest.fixture(scope="module")
def front_end() -> str:
    """Under which path the server opens a notebook: JupyterLab's, where a module does not say otherwise."""
    return "lab/tree"


@pytest.fixture(scope="module")
def notebook(browser: Browser, lab: Lab, shots: Path, console: list[str], front_end: str) -> Iterator[Notebook]:
    """A notebook of one empty cell, open in the front end."""
    path = lab.root / "tales.ipynb"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell()], metadata={"kernelspec": kernel}), path)
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(1000 * WAIT)
    expect.set_options(timeout=1000 * WAIT)
    page.on("console", lambda message: _note(console, message))
    page.on("pageerror", lambda error: _note_error(console, error))
    page.goto(f"{lab.url}{front_end}/{path.name}?token={lab.token}")
    notebook = Notebook(page, path, shots, front_end)
    notebook.idle.wait_for()  # the toolbar's indicator says so before there is a kernel
    yield notebook
    page.close()


# ipywidgets' own: a widget that is resized in the moment of its end looks for the view that it has let go of. Lumino catches it, or not.
_NOT_OURS = "null (reading 'processLuminoMessage')"


def _note_error(console: list[str], error: Error) -> None:
    if _NOT_OURS not in error.message:
        console.append(f"{error.name}: {error.message}\n{error.stack}")


def _note(console: list[str], message: ConsoleMessage) -> None:
    if message.type == "error" and _NOT_OURS not in message.text:
        console.append(f"{message.text} ({message.location.get('url')})")
