"""Fixtures of the steps' tests that the registry's verbs need too."""

from tests.components.conftest import empty_store, store, toy

__all__ = ["empty_store", "store", "toy"]
