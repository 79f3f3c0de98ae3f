from __future__ import annotations

from importlib.metadata import version

import dinocli
from dinocli.core.version import __version__


def test_the_version_equals_that_of_the_installed_package() -> None:
    assert dinocli.__version__ == __version__ == version("dinocli")
