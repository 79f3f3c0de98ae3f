#!/usr/bin/env bash
# Under torch's FakeTensorMode a tensor can be made in pinned memory, but not be moved there: pin_memory() is an assertion.
#
# A dry run of a training step with fake tensors therefore ends at the copy that every loader makes for a GPU, with an
# AssertionError and not with the errors of unsupported operators, which such dry runs catch. A copy into an empty tensor
# that is pinned from the start passes. Source: pytorch/pytorch, issue 123252, open.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException

print(f"torch {torch.__version__}")
with FakeTensorMode():
    batch = torch.ones(4, 3)
    try:
        batch.pin_memory()
        found = "passes"
    except UnsupportedOperatorException as error:
        found = f"unsupported operator: {error}"
    except AssertionError as error:
        found = f"AssertionError: {error}"
    print(f"pin_memory(): {found}")
    copied = torch.empty(4, 3, pin_memory=True).copy_(batch)
    print(f"empty(pin_memory=True).copy_(): a {type(copied).__name__}, is_pinned() says {copied.is_pinned()}")
assert found.startswith("AssertionError: NYI"), "fake tensors can be pinned now, or say otherwise that they cannot"
assert copied.shape == (4, 3), "a fake tensor can no longer be made in pinned memory"
PYTHON
