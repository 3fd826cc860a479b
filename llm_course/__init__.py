"Learn how large language models are built, by building one. Submodules load on first use."
__version__ = "0.1.0"

import os, sys

# How long torch's threads spin while they wait for one another, before they sleep: short, or one
# training step takes ten times as long beside a busy browser (benchmarks/spin.py). The libraries
# read this as they are loaded, so it must stand here before torch's first import.
SPIN = {"GOMP_SPINCOUNT": "1000",  # GNU's runtime, in rounds: torch on Linux
        "KMP_BLOCKTIME": "0"}      # LLVM's and Intel's, in milliseconds: macOS, Windows
OWN_SPIN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # a user's own choice wins


def short_spin(environment, torch_is_loaded=False):
    "Let threads spin shortly, in a mapping of environment variables; is it too late for that?"
    if any(name in environment for name in OWN_SPIN):
        return False
    environment.update(SPIN)  # the processes that this one starts will have it
    return torch_is_loaded


spin_is_late = short_spin(os.environ, "torch" in sys.modules)


def __getattr__(name):
    import importlib
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
