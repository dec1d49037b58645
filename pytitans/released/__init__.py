"""Small trained models that come with the package, by name: `titans eval --model needle`.

Each is a folder as `save_pretrained` writes it, with a model card, README.md, that says what it was
trained on, by which command, and what it scores.
"""

from pathlib import Path

FOLDER = Path(__file__).parent


def released() -> list[str]:
    """Their names."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def released_folder(name: str) -> str | None:
    """Where the model of that name is; None if there is none."""
    return str(FOLDER / name) if name in released() else None
