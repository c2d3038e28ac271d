"""A call that must be refused, on one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def check_refused(
    error: type[Exception], message: str, call: Callable[..., Any], /, *arguments: Any, **options: Any
) -> None:
    """Checks that a call with these arguments raises this error, whose message matches."""
    with pytest.raises(error, match=message):
        call(*arguments, **options)
