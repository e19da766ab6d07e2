"""jaxblip: training of BLIP-2-style vision-language models in JAX and Flax.

    model = jaxblip.load("runs/demo/stage2")
    model.caption("cat.png")
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxblip.api import Model, load

__version__ = "0.1.0"
__all__ = ["Model", "load"]

# transformers is here for its tokenizers: that no PyTorch is installed is no news.
logging.getLogger("transformers").addFilter(
    lambda record: not str(record.msg).startswith("PyTorch was not found")
)


def __getattr__(name: str) -> Any:
    # Imported when they are used, so that `import jaxblip` is light.
    if name in __all__:
        from jaxblip import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
