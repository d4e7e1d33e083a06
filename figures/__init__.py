"""DRAWS stored tables: tables become views (tidy frames), views become pictures.

Never loads torch.
"""

import contextlib
import os
import sys


def _import_matplotlib() -> None:
    """Whatever a notebook names as its backend.

    MPLBACKEND is inherited by all that a notebook starts, and matplotlib is not imported under a name
    that it cannot find. Figures are drawn into files and need no backend at all; a notebook that has
    the one it names keeps it.
    """
    if "matplotlib" in sys.modules:
        return
    named = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if named is not None:
        os.environ["MPLBACKEND"] = named
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = named


_import_matplotlib()
