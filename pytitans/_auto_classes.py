"""Makes transformers' Auto classes know Titans without importing transformers.

`AutoModelForCausalLM.from_pretrained` of a Titans checkpoint needs our classes registered; they
cost seconds to import. So they are registered when transformers' own Auto modules are imported, or
at once where they already have been.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec

AFTER = {  # transformers' module: ours that registers itself with it
    "transformers.models.auto.configuration_auto": "pytitans.models.configuration_titans",
    "transformers.models.auto.modeling_auto": "pytitans.models.modeling_titans",
}


class _ThenOurs(Loader):
    """Runs the real loader of one of transformers' modules, then imports ours."""

    def __init__(self, real: Loader, ours: str):
        self.real, self.ours = real, ours

    def create_module(self, spec):
        return self.real.create_module(spec)

    def exec_module(self, module):
        self.real.exec_module(module)
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


def register_when_imported() -> None:
    """See the module's docstring."""
    for theirs, ours in AFTER.items():
        if theirs in sys.modules:
            import_module(ours)
        else:
            sys.meta_path.insert(0, _Watch(theirs, ours))
