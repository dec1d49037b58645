"""The paper's ablation (table 5), memory depth 1 to 4 and chunk 8 to 256, on bytes of books.

    python recipes/ablation.py --data "books/*.txt.xz"
    python recipes/ablation.py --data "books/*.txt.xz" --models base no_momentum --seeds 0

Base is the LMM of `recipes/language.py`, of depth 2 and chunk 16. Each other model is base with one
thing changed; feed-forward layers make up for parameters that this takes or gives. All have the
learning rate that is best for base of the sweep. Tables: bits per byte by position in the test
books. How runs are kept: `recipes/experiment.py`.
"""

from experiment import SHAPE, build, run
from language import Language, add_arguments

ABLATIONS = {
    "base": {},
    "linear_memory": {"memory_depth": 1},
    "no_convolution": {"conv_size": 0},
    "no_momentum": {"memory_momentum": False},
    "no_weight_decay": {"memory_decay": False},
    "no_persistent_memory": {"num_persistent": 0},
    "no_norm_in_memory": {"memory_norm": False},
    "depth3": {"memory_depth": 3},
    "depth4": {"memory_depth": 4},
    "chunk8": {"chunk_size": 8},
    "chunk32": {"chunk_size": 32},
    "chunk64": {"chunk_size": 64},
    "chunk128": {"chunk_size": 128},
    "chunk256": {"chunk_size": 256},
}


class Ablation(Language):
    models = tuple(ABLATIONS)

    def build(self, name: str, seed: int):
        return build("lmm", SHAPE, seed, **ABLATIONS[name])

    def swept(self, name: str) -> str:
        return "base"


if __name__ == "__main__":
    raise SystemExit(run(Ablation, __doc__, "runs/ablation", add_arguments))
