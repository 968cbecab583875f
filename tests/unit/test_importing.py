"""Garbage collection is left out while modules are imported, and comes back."""

import gc

import pytest

from raytorch.system.importing import without_garbage_collection


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_afterwards_what_it_was_before(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), without_garbage_collection():
            raise ImportError
        assert gc.isenabled() == enabled
        with without_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
