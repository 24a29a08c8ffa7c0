"""Try an installed wheel: `make smoke` runs this with the wheel's own interpreter, from a directory without a checkout."""

import time

start = time.perf_counter()
import nbengine

elapsed = time.perf_counter() - start

# ruff: noqa: E402 - nothing may be imported before nbengine: what it needs counts
import importlib
import json
import pkgutil
import subprocess
import sys
from importlib.metadata import files, version
from pathlib import Path

home = Path(nbengine.__file__).parent
checkout = Path(__file__).parents[2]

assert checkout / "nbengine" != home, "this is the checkout, not the wheel"
assert [Path(path) for path in nbengine.__path__] == [home], nbengine.__path__
assert version("nbengine") == nbengine.__version__
assert elapsed < 0.05, f"import nbengine took {elapsed * 1000:.0f} ms"
print(f"  import nbengine took {elapsed * 1000:.1f} ms, from {home.parent.name}")

modules = [module.name for module in pkgutil.walk_packages([str(home)], "nbengine.")]
kernels = sorted(path.stem for path in (home / "kernels").glob("*.py"))
assert kernels == sorted(path.stem for path in (checkout / "kernels").glob("*.py")), kernels
for name in [*modules, *(f"nbengine.kernels.{kernel}" for kernel in kernels)]:
    importlib.import_module(name)
print(f"  {len(modules)} modules and {len(kernels)} kernels import")

listed = {str(path) for path in files("nbengine") or []}
assert not [path for path in listed if path.startswith(("kernels/", "widgets/", "tests/"))], listed
model = {path.name for path in (checkout / "nbengine/tales").iterdir() if path.is_file()}
assert model <= {path.name for path in (home / "tales").iterdir()}, model

enabled = Path(sys.prefix) / "etc/jupyter/jupyter_server_config.d/nbengine.json"
assert json.loads(enabled.read_text())["ServerApp"]["jpserver_extensions"] == {"nbengine": True}
listed = subprocess.run(
    [sys.executable, "-c", "from jupyter_server.extension.serverextension import main; main()", "list"],
    capture_output=True,
    text=True,
    check=True,
)
lines = [line.strip() for line in (listed.stdout + listed.stderr).splitlines() if "nbengine" in line]
assert any("enabled" in line for line in lines), listed
assert any(nbengine.__version__ in line and "OK" in line for line in lines), listed
print("  a Jupyter server loads its extension")

with nbengine.LLM("tales", max_model_len=128).engine as engine:
    [result] = engine.generate(["Once upon a time"], nbengine.SamplingParams(max_tokens=24, temperature=0))
assert result.finished
assert result.outputs[0].token_ids
print(f"  tales says: {result.prompt}{result.outputs[0].text}".replace("\n", " "))
