"""Fixtures that tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from parts import HashingEncoder, small_recipe

from retrodiff.builder import Builder
from retrodiff.interfaces import Database
from retrodiff.model import Model
from retrodiff.testing import small_database


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take many minutes")


def pytest_configure() -> None:
    """A shell starts what it puts into the background with Ctrl-C ignored; tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes many minutes: pytest --slow"))


@pytest.fixture(autouse=True, scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The key of this user's seals lies in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRODIFF_STATE", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def encoder() -> HashingEncoder:
    return HashingEncoder()


@pytest.fixture
def database() -> Database:
    return small_database(rows=40, dim=8, seed=0)


@pytest.fixture
def recipe(encoder: HashingEncoder, database: Database) -> Builder:
    return small_recipe(encoder, database)


@pytest.fixture
def model(recipe: Builder) -> Model:
    return recipe.build()
