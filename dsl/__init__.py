"""dsl: how small DeepSeek-style language models attend, route and learn, behind the notebooks and the commands.

Nothing is loaded until it is used: `import dsl` costs no torch and no transformers, and yet lets transformers' Auto
classes open a dsl checkpoint.
"""

import importlib
import importlib.util
import os
import sys

# Before torch is loaded: how long its threads (GNU's OpenMP) spin while they wait for each other. A millisecond by
# default, in which they hold the processors that the rest of them need, on a machine that does something else too.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOME = {
    "ModelConfig": "config",
    **dict.fromkeys(("DataConfig", "TrainConfig", "Run", "preset"), "settings"),
    "register_mixer": "attention",
    "register_router": "moe",
    **dict.fromkeys(("DslConfig", "DslForCausalLM", "load"), "hub"),
    "train": "training",
}


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(importlib.import_module(f"dsl.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name.startswith("_") or importlib.util.find_spec(f"dsl.{name}") is None:
        raise AttributeError(f"module 'dsl' has no attribute {name!r}")
    return importlib.import_module(f"dsl.{name}")


def __dir__() -> list[str]:
    import pkgutil

    return sorted({*globals(), *_HOME, *(module.name for module in pkgutil.iter_modules(__path__))})


_AUTO = "transformers.models.auto.configuration_auto"


def _register() -> None:
    """Tell transformers, without loading our side of it, that model type "dsl" is described by dsl.DslConfig.

    transformers looks a config class up by name in a module when a checkpoint asks for it. Loading `dsl.hub` then
    registers both classes in the public way.
    """
    mapping = sys.modules[_AUTO].CONFIG_MAPPING
    mapping._mapping.setdefault("dsl", "DslConfig")
    mapping._modules["dsl"] = sys.modules[__name__]


class _WhenLoaded:
    """A finder of modules that finds one: it runs `_register` once transformers' table of configs is loaded."""

    def find_spec(self, name, path, target=None):
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _register()

        spec.loader.exec_module = exec_module
        return spec


if _AUTO in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _WhenLoaded())
