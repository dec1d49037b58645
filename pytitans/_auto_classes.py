"""Makes transformers' Auto classes know Titans without importing transformers.

`AutoModelForCausalLM.from_pretrained` of a Titans checkpoint needs our classes registered; they
cost seconds to import. So they are registered when transformers' own Auto modules are imported, or
at once where they already have been.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec

AUTO = "transformers.models.auto."
AFTER = {  # ours that registers itself: transformers' modules, after the first of which it does so
    "pytitans.models.configuration_titans": [AUTO + "configuration_auto"],
    # modeling_layers imports modeling_auto before it has what ours needs of it
    "pytitans.models.modeling_titans": [AUTO + "modeling_auto", "transformers.modeling_layers"],
}


class _ThenOurs(Loader):
    """Runs the real loader of one of transformers' modules, then imports ours, unless another that
    ours waits for is under way: then at the end of that."""

    def __init__(self, real: Loader, ours: str):
        self.real, self.ours = real, ours

    def create_module(self, spec):
        return self.real.create_module(spec)

    def exec_module(self, module):
        self.real.exec_module(module)
        _finished.add(module.__name__)
        if all(name in _finished for name in AFTER[self.ours] if name in sys.modules):
            import_module(self.ours)


class _Watch(MetaPathFinder):
    def __init__(self, theirs: str, ours: str):
        self.theirs, self.ours = theirs, ours

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.theirs:
            return None
        sys.meta_path.remove(self)  # and let the others find it
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenOurs(spec.loader, self.ours)
        return spec


_finished: set[str] = set()


def register_when_imported() -> None:
    """See the module's docstring."""
    for ours, after in AFTER.items():
        _finished.update(name for name in after if name in sys.modules)
        for theirs in after:
            if theirs not in sys.modules:
                sys.meta_path.insert(0, _Watch(theirs, ours))
        if after[0] in sys.modules:
            import_module(ours)
