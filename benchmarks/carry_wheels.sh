#!/usr/bin/env bash
# Fetch into wheels/ what `python -m nbengine.bench kernel` needs beside torch and transformers, for a machine without a network:
#     benchmarks/carry_wheels.sh [PYTHON_VERSION]              here, 3.12 unless told
#     pip install --no-index --find-links wheels ipykernel ipywidgets anywidget nest-asyncio2      there
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-3.12}
pip=.venv/bin/pip
[ -x "$pip" ] || pip=pip
rm -rf wheels
platforms=()
for tag in manylinux2014_x86_64 manylinux_2_17_x86_64 manylinux_2_28_x86_64 manylinux_2_12_x86_64 manylinux2010_x86_64; do
    platforms+=(--platform "$tag")
done
"$pip" download --quiet --dest wheels --constraint constraints.txt --python-version "$version" --implementation cp "${platforms[@]}" \
    --only-binary=:all: ipykernel ipython ipywidgets anywidget jupyter_client nest-asyncio2
du -sh wheels
