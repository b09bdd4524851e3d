"""FP8 state; always off. Megatron takes this module's import as the sign that Transformer Engine is there."""

import contextlib
from collections.abc import Iterator


class FP8GlobalStateManager:
    """No FP8 here."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, **kwargs: object) -> Iterator[None]:
    assert not enabled
    yield


fp8_model_init = fp8_autocast
