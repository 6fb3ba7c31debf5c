"""The plugin keeps to the interface of axolotl's, which is not installed here: a stand-in has its names."""

import importlib
import sys
import types

import pytest


@pytest.fixture
def plugins(monkeypatch):
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "graphfuse.integrations.axolotl", raising=False)
    yield importlib.import_module("graphfuse.integrations.axolotl")
    sys.modules.pop("graphfuse.integrations.axolotl")


@pytest.mark.parametrize("options", [None, {"inner": "eager", "show_report": True}])
def test_gives_the_trainer_a_callback(plugins, options):
    plugin = plugins.GraphfusePlugin()
    module, name = plugin.get_input_args().rsplit(".", 1)
    arguments = getattr(sys.modules[module], name)(**({} if options is None else {"graphfuse": options}))
    (callback,) = plugin.add_callbacks_pre_trainer(arguments, model=None)
    assert type(callback).__name__ == "GraphfuseCallback"
    assert callback.options == ({"inner": "eager"} if options else {})
    assert callback.show_report == bool(options)


def test_says_what_is_missing():
    with pytest.raises(ImportError, match=r"graphfuse\.integrations\.axolotl: expected axolotl to be installed"):
        importlib.import_module("graphfuse.integrations.axolotl")
