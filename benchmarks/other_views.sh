#!/usr/bin/env bash
# Make an environment with lightly-train (AGPL-3.0; nothing of dinocli imports it) and torchcodec, for the rows of
# benchmarks/data.py that need them. It uses the torch of the Python that runs it, so that all rows have the same one.
#
#     bash benchmarks/other_views.sh FOLDER [PYTHON]
#     python benchmarks/data.py PHOTOS --others FOLDER
set -eu
python=${2:-python}
"$python" -m venv "$1"
"$python" -c 'import site; print(site.getsitepackages()[0])' > "$("$1/bin/python" -c 'import site; print(site.getsitepackages()[0])')/beside.pth"
"$1/bin/pip" install --quiet "lightly-train==0.18.*" torchcodec
