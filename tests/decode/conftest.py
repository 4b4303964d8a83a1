"""A tiny model, and what plain transformers makes of it."""

from __future__ import annotations

import pytest

from tests.models import make_tiny_model
from tests.reference import Reference


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model_dir):
    return Reference(model_dir)
